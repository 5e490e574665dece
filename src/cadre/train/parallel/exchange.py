"""Experts spread over ranks: tokens travel to the ranks that hold their experts, and what these make of them travels back.

A token goes once to each rank that holds some of its experts, with its choices there, and comes back as the weighted sum of
what they made of it (DeepSeek-V3 does so between nodes: its report, section 3.2.2). All by all-to-all:

    counts      how many tokens go to each rank: a few integers, for which all wait (in shared memory they lie beside the tokens)
    tokens      in the compute dtype or in 8 bits, and beside each the experts it chose and their weights; the shared experts
                work meanwhile
    experts     on what has arrived, sorted by expert (by the experts' kernel itself, where there is one), added up by token
    back        the same way, to be added up over the ranks; gradients make the same two journeys in reverse

Bytes of a layer's pass, what stays on its rank included, summed over each token and each rank that it goes to:

    forward     hidden x (bytes of an element on its way out + bytes of one on its way back) + 8 x choices there
    backward    the same with 4 x choices

No token is dropped and none is padded. In 8 bits travels what experts multiply, the tokens on their way there and the gradients
of what they made; the sums on their way home do not (section 3.3.3 there).

Letters in names: T token, D hidden, K expert choices of a token, S rank, L token leaving for a rank, A token arrived from one,
N expert of this rank, R row of an expert here.
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
from cadre.train.parallel.fp8 import pack, unpack
from cadre.train.parallel.shared_memory import RowType, SharedMemory


@dataclass
class Exchange:
    """The ranks that share one copy of the experts. `fp8`: whether tokens go to the experts in 8 bits. `sent_bytes`: of tokens,
    their choices and their gradients, by all layers so far. `shared`: memory of the ranks, if they have any; it stands for
    messages."""

    group: dist.ProcessGroup
    fp8: bool = False
    shared: SharedMemory | None = None
    sent_bytes: int = field(default=0, init=False)

    @property
    def ranks(self) -> int:
        return self.group.size()

    def meet(self, leaving_S: Tensor) -> tuple[list[int], list[int]]:
        """Tell each rank how many tokens it gets from here. Returns those numbers, and how many each sends here, which in shared
        memory is known only when they arrive: none yet."""
        if self.shared is not None:
            return leaving_S.tolist(), []
        arriving_S = torch.empty_like(leaving_S)
        dist.all_to_all_single(arriving_S, leaving_S, group=self.group)
        there, here = torch.stack((leaving_S, arriving_S)).tolist()
        return there, here


@dataclass
class Journey:
    """One layer's tokens on their way to other ranks' experts. `tokens`: how many this rank has; `there`, `here`: how many go
    to and come from each rank; `token_L`: which of this rank's leave, those for one rank together.

    What travels are rows that belong to tokens, several tensors at a time, of which the first is as wide as the tokens: out
    from the rank's own [T, D], home to their sum."""

    exchange: Exchange
    tokens: int
    there: list[int]
    here: list[int]
    token_L: Tensor
    kinds: list[RowType] = field(default_factory=list)  # of what is on its way, and of the first tensor as it was
    dtype: torch.dtype = torch.float32
    end: Callable[[], list[list[Tensor]]] | None = None
    sent: Tensor | None = None

    @classmethod
    def plan(cls, exchange: Exchange, rank_TK: Tensor) -> Journey:
        """rank_TK: the rank of each choice."""
        goes_ST = rank_TK.new_zeros(exchange.ranks, len(rank_TK), dtype=torch.bool)
        goes_ST.scatter_(0, rank_TK.t(), True)
        there, here = exchange.meet(goes_ST.sum(dim=1))
        token_L = goes_ST.flatten().nonzero().squeeze(1).remainder_(max(1, len(rank_TK)))
        return cls(exchange, len(rank_TK), there, here, token_L)

    def start(self, parts: tuple[Tensor, ...], outward: bool) -> None:
        """Send rows off, to the experts or home: of the first of `parts` outward those of `token_L`, in 8 bits if the exchange
        says so; of the others each its own."""
        sizes, arriving = (self.there, self.here) if outward else (self.here, self.there)
        first, rest = parts[0], parts[1:]
        self.dtype, shared = first.dtype, self.exchange.shared
        if outward and self.exchange.fp8:
            first, outward = pack(first.index_select(0, self.token_L)), False
        self.kinds = [(part.shape[1], part.dtype) for part in (first, *rest)]
        rows = sum(sizes)
        self.exchange.sent_bytes += sum(rows * width * dtype.itemsize for width, dtype in self.kinds)
        if shared is not None:
            room, *rooms = shared.send_buffers(sizes, self.kinds)
            if outward:
                torch.index_select(first, 0, self.token_L, out=room)
            else:
                room.copy_(first)
            for place, part in zip(rooms, rest, strict=True):
                place.copy_(part)
            self.end = partial(shared.receive, self.kinds)
            return
        leaving = [first.index_select(0, self.token_L) if outward else first, *rest]
        joined = torch.cat([part.contiguous().view(torch.uint8) for part in leaving], dim=1)
        arrived = joined.new_empty(sum(arriving), joined.shape[1])
        work = dist.all_to_all_single(arrived, joined, arriving, sizes, group=self.exchange.group, async_op=True)

        def end() -> list[list[Tensor]]:
            work.wait()
            widths = [width * dtype.itemsize for width, dtype in self.kinds]
            columns = zip(arrived.split(widths, dim=1), self.kinds, strict=True)
            whole = [part.contiguous().view(dtype) for part, (_, dtype) in columns]
            return [list(parts) for parts in zip(*(part.split(arriving) for part in whole), strict=True)]

        self.end, self.sent = end, joined

    def wait(self, outward: bool, width: int) -> tuple[Tensor, ...]:
        """What arrives where that journey ends. Out: the rows of all ranks, in order. Home: the sum of each token's first rows
        [T, width], and the others' in the order in which they left."""
        assert self.end is not None
        by_rank = self.end()
        firsts, *rest = zip(*by_rank, strict=True)
        if outward:
            self.here = [len(rows) for rows in firsts]
        others = [torch.cat(parts) for parts in rest]
        if not outward:
            first = firsts[0].new_zeros(self.tokens, width)
            for token_L, rows in zip(self.token_L.split(self.there), firsts, strict=True):
                first.index_add_(0, token_L, rows)
        elif self.exchange.fp8:
            first = unpack(torch.cat(firsts), width, self.dtype)
        else:
            first = torch.cat(firsts)
        self.end, self.sent = None, None
        return first, *others

    def depart(self, *parts: Tensor) -> Tensor:
        """Start for the experts with tokens [T, D] and the choices [L, K] of those that leave: weights and experts. What is
        returned is to be given to `arrive`; what is computed in between, in either direction, is while they travel."""
        return _Depart.apply(self, True, parts[0].shape[1], *parts)

    def arrive(self, underway: Tensor, width: int) -> tuple[Tensor, ...]:
        """What `depart` was given elsewhere: tokens [A, width], and weights and experts of their choices [A, K]."""
        return _Arrive.apply(self, True, width, underway)

    def bring_back(self, y_AD: Tensor) -> Tensor:
        """What was made of tokens elsewhere, added up: [T, D]."""
        width = y_AD.shape[1]
        (y_TD,) = _Arrive.apply(self, False, width, _Depart.apply(self, False, width, y_AD))
        return y_TD


class _Depart(torch.autograd.Function):
    """Start a journey; its gradient is one that `_Arrive` has started the other way and that arrives here. Returns a
    zero that stands for the journey, so that autograd puts what follows after it."""

    @staticmethod
    def forward(ctx: Any, journey: Journey, outward: bool, width: int, *parts: Tensor) -> Tensor:
        ctx.journey, ctx.outward, ctx.width, ctx.count = journey, outward, width, len(parts)
        journey.start(parts, outward)
        return parts[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        arrived = ctx.journey.wait(not ctx.outward, ctx.width)
        return None, None, None, *arrived, *(None,) * (ctx.count - len(arrived))


class _Arrive(torch.autograd.Function):
    """End a journey."""

    @staticmethod
    def forward(ctx: Any, journey: Journey, outward: bool, width: int, underway: Tensor) -> tuple[Tensor, ...]:
        ctx.journey, ctx.outward = journey, outward
        arrived = journey.wait(outward, width)
        ctx.real = [part.is_floating_point() for part in arrived]
        ctx.mark_non_differentiable(*(part for part in arrived if not part.is_floating_point()))
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        ctx.journey.start(tuple(grad for grad, real in zip(grads, ctx.real, strict=True) if real), not ctx.outward)
        return None, None, None, grads[0].new_zeros(())


class SpreadMixture(MixtureOfExperts):
    """A mixture of which this rank holds every shared expert and the router, but only its run of the routed experts."""

    def __init__(self, whole: MixtureOfExperts, exchange: Exchange) -> None:
        nn.Module.__init__(self)
        self.gate, self.experts, self.shared_experts = whole.gate, whole.experts, whole.shared_experts
        self.keeps_routes, self.routes = True, None
        self.exchange = exchange
        rank = exchange.group.rank()
        for name, parameter in whole.experts.named_parameters():
            mine = parameter.detach().chunk(exchange.ranks)[rank].clone()
            setattr(self.experts, name, nn.Parameter(mine))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, -2)
        routes = self.gate(x_TD)
        here = routes.score_TE.shape[1] // self.exchange.ranks
        rank_TK = routes.expert_TK // here
        journey = Journey.plan(self.exchange, rank_TK)
        underway = journey.depart(x_TD, *_choices(routes, rank_TK, here, journey))
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        y_TD = journey.bring_back(self._made(here, *journey.arrive(underway, x_TD.shape[1])))
        if self.training and self.keeps_routes:
            self.routes = routes
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BTD)

    def _made(self, here: int, x_AD: Tensor, weight_AK: Tensor, expert_AK: Tensor) -> Tensor:
        """The weighted sum of what each token's experts of the `here` on this rank make of it: [A, D]."""
        # The last expert is nobody: rows of choices elsewhere come after all others.
        row_AK, token_R, load = sort_choices(expert_AK.long(), here + 1)
        load_N = load[:here]
        if isinstance(self.experts, Experts) and self.experts.moves_rows(x_AD):
            return self.experts(x_AD, load_N, Plan(row_AK, token_R, load_N, weight_AK))
        rows = int(load_N.sum())
        choice_R = torch.empty_like(token_R)
        choice_R[row_AK.flatten()] = torch.arange(len(token_R), device=token_R.device)
        token_R, choice_R = token_R[:rows], choice_R[:rows]
        y_RD = self.experts(x_AD.index_select(0, token_R), load_N)
        weight_R = weight_AK.flatten().index_select(0, choice_R).to(y_RD.dtype)
        return torch.zeros_like(x_AD).index_add(0, token_R, y_RD * weight_R[:, None])


def _choices(routes: Routes, rank_TK: Tensor, here: int, journey: Journey) -> tuple[Tensor, Tensor]:
    """What each rank is told of the tokens that go to it: weights [L, K] and experts, int32 [L, K] from 0 to `here` - 1. A
    choice elsewhere weighs nothing and is `here`."""
    token_L, ranks = journey.token_L, torch.arange(journey.exchange.ranks)
    rank_L = ranks.repeat_interleave(torch.tensor(journey.there)).to(token_L.device)
    mine_LK = rank_TK[token_L] == rank_L[:, None]
    expert_LK = torch.where(mine_LK, routes.expert_TK[token_L] % here, here).to(torch.int32)
    return routes.weight_TK.index_select(0, token_L) * mine_LK, expert_LK
