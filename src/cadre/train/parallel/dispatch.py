"""Expert parallelism: each token is sent to the ranks that hold its experts, and what the experts compute is sent back.

A token is sent once to each rank that holds any of its experts, with its choices among the experts there, and one row comes
back from that rank: the weighted sum of their outputs. (DeepSeek-V3 does so between nodes: its report, section 3.2.2.) A
layer's forward pass:

    counts      an all-to-all of a few integers: how many tokens each rank will get. All ranks wait for it. (In shared memory
                the counts lie beside the tokens, and there is nothing to wait for.)
    dispatch    an all-to-all of the tokens, in the compute dtype or in 8 bits, each with the experts that it chose and their
                weights; the shared experts compute meanwhile
    experts     each rank sorts the tokens received by expert, applies its experts and sums their outputs by token (a kernel of
                the experts does all three, where there is one)
    combine     an all-to-all of these sums back to the tokens' ranks, which add them up over the ranks that they come from

The backward pass makes the two large all-to-alls in reverse: combine's gradients go to the experts, dispatch's come back.

Bytes of a layer's pass, including those that a rank keeps for itself, summed over each token and each rank that it goes to:

    forward     hidden x (bytes of an element in dispatch + bytes of an element in combine) + 8 x choices of a token
    backward    the same with 4 x choices of a token

No token is dropped and none is padded. With 8 bits, the factors of the experts' products are sent in 8 bits: the tokens in
dispatch, and in the backward pass the gradients of the experts' sums. What combine sends, and the gradients of dispatch, keep
the compute dtype (section 3.3.3 there).

Letters in names: T token, D hidden, K expert choices of a token, S rank, L row sent (a token, once for each rank that it goes
to), A row received, N expert of this rank, R row of one of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cadre.kernels.permute import sort_choices
from cadre.model.experts import Experts, MixtureOfExperts, Plan, Routes
from cadre.train.parallel.fp8_rows import dequantize, quantize
from cadre.train.parallel.shared_memory import RowType, SharedMemory


@dataclass
class ExpertGroup:
    """The ranks that share one copy of the experts. `fp8`: whether tokens go to the experts in 8 bits. `shared`: the memory
    that the ranks share, if they do; it is used in place of messages. `sent_bytes`: of tokens, their choices and their
    gradients, by all layers so far."""

    process_group: dist.ProcessGroup
    fp8: bool = False
    shared: SharedMemory | None = None
    sent_bytes: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        return self.process_group.size()

    def exchange_counts(self, send_count_S: Tensor) -> tuple[list[int], list[int]]:
        """From how many tokens this rank sends to each rank: those numbers, and how many it receives from each. The latter are
        empty with shared memory, where they are known only once the tokens have arrived."""
        if self.shared is not None:
            return send_count_S.tolist(), []
        recv_count_S = torch.empty_like(send_count_S)
        dist.all_to_all_single(recv_count_S, send_count_S, group=self.process_group)
        send_counts, recv_counts = torch.stack((send_count_S, recv_count_S)).tolist()
        return send_counts, recv_counts


@dataclass
class AllToAll:
    """The two all-to-alls of one layer's pass, `dispatch` to the experts and `combine` back, and their gradients. `tokens`: how
    many this rank has. `send_counts`, `recv_counts`: how many rows dispatch sends to each rank and receives from each.
    `token_L`: the tokens that dispatch sends, those for rank 0 first, then those for rank 1, and so on.

    One all-to-all sends several tensors with a row for each token. The first of them is as wide as the tokens. On the way to
    the experts its rows are selected from all of this rank's tokens [T, D]; on the way back they are added up into [T, D]."""

    group: ExpertGroup
    tokens: int
    send_counts: list[int]
    recv_counts: list[int]
    token_L: Tensor
    # Of the all-to-all that is under way: the types of its rows, the first tensor's dtype before it was quantized, how to wait
    # for its rows (by rank, a tensor of each type), and the bytes that are being sent, which must live so long.
    row_types: list[RowType] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    receive: Callable[[], list[list[Tensor]]] | None = None
    sent: Tensor | None = None

    @classmethod
    def plan(cls, group: ExpertGroup, rank_TK: Tensor) -> AllToAll:
        """rank_TK: the rank that holds each chosen expert."""
        goes_ST = rank_TK.new_zeros(group.size, len(rank_TK), dtype=torch.bool)
        goes_ST.scatter_(0, rank_TK.t(), True)
        send_counts, recv_counts = group.exchange_counts(goes_ST.sum(dim=1))
        token_L = goes_ST.flatten().nonzero().squeeze(1).remainder_(max(1, len(rank_TK)))
        return cls(group, len(rank_TK), send_counts, recv_counts, token_L)

    def start(self, tensors: tuple[Tensor, ...], to_experts: bool) -> None:
        """Start to send rows to the experts or back. To the experts: of the first of `tensors` the rows `token_L`, in 8 bits if
        the group says so; everything else as it is."""
        send_counts, recv_counts = (self.send_counts, self.recv_counts) if to_experts else (self.recv_counts, self.send_counts)
        first, rest = tensors[0], tensors[1:]
        self.dtype, shared, select = first.dtype, self.group.shared, to_experts
        if to_experts and self.group.fp8:
            first, select = quantize(first.index_select(0, self.token_L)), False
        self.row_types = [(tensor.shape[1], tensor.dtype) for tensor in (first, *rest)]
        rows = sum(send_counts)
        self.group.sent_bytes += sum(rows * width * dtype.itemsize for width, dtype in self.row_types)
        if shared is not None:
            buffer, *buffers = shared.send_buffers(send_counts, self.row_types)
            if select:
                torch.index_select(first, 0, self.token_L, out=buffer)
            else:
                buffer.copy_(first)
            for other, tensor in zip(buffers, rest, strict=True):
                other.copy_(tensor)
            self.receive = partial(shared.receive, self.row_types)
            return
        sent = [first.index_select(0, self.token_L) if select else first, *rest]
        joined = torch.cat([_bytes(tensor) for tensor in sent], dim=1)
        received = joined.new_empty(sum(recv_counts), joined.shape[1])
        work = dist.all_to_all_single(received, joined, recv_counts, send_counts, group=self.group.process_group, async_op=True)

        def receive() -> list[list[Tensor]]:
            work.wait()
            widths = [width * dtype.itemsize for width, dtype in self.row_types]
            columns = zip(received.split(widths, dim=1), self.row_types, strict=True)
            # Not `contiguous`, which leaves a single row, or none, where no number of this dtype may lie.
            whole = [column.clone(memory_format=torch.contiguous_format).view(dtype) for column, (_, dtype) in columns]
            return [list(of_rank) for of_rank in zip(*(tensor.split(recv_counts) for tensor in whole), strict=True)]

        self.receive, self.sent = receive, joined

    def wait(self, to_experts: bool, width: int) -> tuple[Tensor, ...]:
        """The tensors of the all-to-all that was started in this direction. At the experts: the rows [A, ...] from all ranks,
        in order of rank. Back: of the first tensor each token's sum [T, width], of the others the rows [L, ...] in the order of
        `token_L`."""
        assert self.receive is not None
        by_rank = self.receive()
        firsts, *rest = zip(*by_rank, strict=True)
        if to_experts:
            self.recv_counts = [len(rows) for rows in firsts]
        others = [torch.cat(of_ranks) for of_ranks in rest]
        if not to_experts:
            first = firsts[0].new_zeros(self.tokens, width)
            for token_L, rows in zip(self.token_L.split(self.send_counts), firsts, strict=True):
                first.index_add_(0, token_L, rows)
        elif self.group.fp8:
            first = dequantize(torch.cat(firsts), width, self.dtype)
        else:
            first = torch.cat(firsts)
        self.receive, self.sent = None, None
        return first, *others

    def dispatch_start(self, *tensors: Tensor) -> Tensor:
        """Start dispatch, of the tokens [T, D] and of the choices [L, K] of the rows sent: weights and experts. The result is
        for `dispatch_wait`; what is computed between the two calls overlaps with dispatch, and in the backward pass with its
        gradients."""
        return _Start.apply(self, True, tensors[0].shape[1], *tensors)

    def dispatch_wait(self, started: Tensor, width: int) -> tuple[Tensor, ...]:
        """What this rank receives in dispatch: tokens [A, width], and weights and experts of their choices [A, K]."""
        return _Wait.apply(self, True, width, started)

    def combine(self, y_AD: Tensor) -> Tensor:
        """Send back what the experts made of the tokens received, and add up what comes back: [T, D]."""
        width = y_AD.shape[1]
        (y_TD,) = _Wait.apply(self, False, width, _Start.apply(self, False, width, y_AD))
        return y_TD


class _Start(torch.autograd.Function):
    """Start an all-to-all. Returns a zero for `_Wait`, which so depends on it for autograd. The backward pass waits for the
    gradients: the all-to-all in the other direction that the backward pass of `_Wait` has started."""

    @staticmethod
    def forward(ctx: Any, all_to_all: AllToAll, to_experts: bool, width: int, *tensors: Tensor) -> Tensor:
        ctx.all_to_all, ctx.to_experts, ctx.width, ctx.count = all_to_all, to_experts, width, len(tensors)
        all_to_all.start(tensors, to_experts)
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.all_to_all.wait(not ctx.to_experts, ctx.width)
        return None, None, None, *grads, *(None,) * (ctx.count - len(grads))


class _Wait(torch.autograd.Function):
    """Wait for an all-to-all. The backward pass starts that of the gradients."""

    @staticmethod
    def forward(ctx: Any, all_to_all: AllToAll, to_experts: bool, width: int, started: Tensor) -> tuple[Tensor, ...]:
        ctx.all_to_all, ctx.to_experts = all_to_all, to_experts
        received = all_to_all.wait(to_experts, width)
        ctx.real = [tensor.is_floating_point() for tensor in received]
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        ctx.all_to_all.start(tuple(grad for grad, real in zip(grads, ctx.real, strict=True) if real), not ctx.to_experts)
        return None, None, None, grads[0].new_zeros(())


class ExpertParallelMixture(MixtureOfExperts):
    """A mixture of experts of which this rank holds the router and the shared experts whole, and its run of the routed ones."""

    def __init__(self, whole: MixtureOfExperts, group: ExpertGroup) -> None:
        nn.Module.__init__(self)
        self.gate, self.experts, self.shared_experts = whole.gate, whole.experts, whole.shared_experts
        self.keeps_routes, self.routes = True, None
        self.group = group
        rank = group.process_group.rank()
        for name, parameter in whole.experts.named_parameters():
            local = parameter.detach().chunk(group.size)[rank].clone()
            setattr(self.experts, name, nn.Parameter(local))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, -2)
        routes = self.gate(x_TD)
        local = routes.score_TE.shape[1] // self.group.size
        rank_TK = routes.expert_TK // local
        all_to_all = AllToAll.plan(self.group, rank_TK)
        started = all_to_all.dispatch_start(x_TD, *_choices_sent(routes, rank_TK, local, all_to_all))
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        y_TD = all_to_all.combine(self._apply_experts(local, *all_to_all.dispatch_wait(started, x_TD.shape[1])))
        if self.training and self.keeps_routes:
            self.routes = routes
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BTD)

    def _apply_experts(self, local: int, x_AD: Tensor, weight_AK: Tensor, expert_AK: Tensor) -> Tensor:
        """[A, D]: for each token received, the weighted sum of the outputs of its experts among the `local` ones of this
        rank."""
        # Choices of other ranks' experts have the number `local`, so that they are sorted after all others and cut off.
        row_AK, token_R, load = sort_choices(expert_AK.long(), local + 1)
        load_N = load[:local]
        if isinstance(self.experts, Experts) and self.experts.moves_rows(x_AD):
            return self.experts(x_AD, load_N, Plan(row_AK, token_R, load_N, weight_AK))
        rows = int(load_N.sum())
        choice_R = torch.empty_like(token_R)
        choice_R[row_AK.flatten()] = torch.arange(len(token_R), device=token_R.device)
        token_R, choice_R = token_R[:rows], choice_R[:rows]
        y_RD = self.experts(x_AD.index_select(0, token_R), load_N)
        weight_R = weight_AK.flatten().index_select(0, choice_R).to(y_RD.dtype)
        return torch.zeros_like(x_AD).index_add(0, token_R, y_RD * weight_R[:, None])


def _bytes(rows: Tensor) -> Tensor:
    """uint8 [rows, bytes of one]. First as one row: of none, or of one element each, the strides may be anything."""
    return rows.reshape(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.itemsize)


def _choices_sent(routes: Routes, rank_TK: Tensor, local: int, all_to_all: AllToAll) -> tuple[Tensor, Tensor]:
    """What is sent with each token: its weights [L, K], and its experts by their number on the receiving rank, int32 [L, K]
    from 0 to `local` - 1. A choice of another rank's expert has weight 0 and number `local`."""
    token_L, ranks = all_to_all.token_L, torch.arange(all_to_all.group.size)
    rank_L = ranks.repeat_interleave(torch.tensor(all_to_all.send_counts)).to(token_L.device)
    there_LK = rank_TK[token_L] == rank_L[:, None]
    expert_LK = torch.where(there_LK, routes.expert_TK[token_L] % local, local).to(torch.int32)
    return routes.weight_TK.index_select(0, token_L) * there_LK, expert_LK
