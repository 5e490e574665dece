"""Experts spread over ranks: tokens travel to the ranks that hold their experts, and what these make of them travels back.

A token goes once to each rank that holds some of its experts, with its choices there, and comes back as the weighted sum of
what they made of it (DeepSeek-V3 does so between nodes: its report, section 3.2.2). All by all-to-all:

    counts      how many tokens go to each rank: a few integers, and the only wait for the processor
    tokens      in the compute dtype or in 8 bits, and beside each the experts it chose and their weights; the shared experts
                work meanwhile
    experts     on what has arrived, sorted by expert (by the experts' kernel itself, where there is one), added up by token
    back        the same way, to be added up over the ranks; gradients make the same two journeys in reverse

A layer's forward pass sends, for each token and rank that it goes to, hidden x (dispatch bytes + combine bytes) and 8 bytes a
choice, what stays on its rank included; the backward pass as much, with 4 bytes a choice. No token is dropped and none is
padded. In 8 bits are what experts multiply, the tokens on their way there and the gradients of what they made; the sums on
their way home are not (section 3.3.3 there).

Letters in names: T token, D hidden, K expert choices of a token, S rank, L token leaving for a rank, A token arrived from one,
N expert of this rank, R row of an expert here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cadre.kernels.permute import sort_choices
from cadre.model.experts import Experts, MixtureOfExperts, Plan, Routes
from cadre.train.parallel.fp8 import pack, packed_width, unpack
from cadre.train.parallel.memory import Shared


@dataclass
class Exchange:
    """The ranks that share one copy of the experts. `fp8`: whether tokens go to the experts in 8 bits. `sent_bytes`: of tokens,
    their choices and their gradients, by all layers so far. `shared`: memory of the ranks, if they have any; it stands for the
    longer messages."""

    group: dist.ProcessGroup
    fp8: bool = False
    shared: Shared | None = None
    sent_bytes: int = field(default=0, init=False)

    @property
    def ranks(self) -> int:
        return self.group.size()

    def meet(self, leaving_S: Tensor) -> tuple[list[int], list[int]]:
        """Tell each rank how many tokens it gets from here. Returns those numbers, and how many each sends here."""
        arriving_S = torch.empty_like(leaving_S)
        dist.all_to_all_single(arriving_S, leaving_S, group=self.group)
        there, here = torch.stack((leaving_S, arriving_S)).tolist()
        return there, here


@dataclass
class Journey:
    """One layer's tokens on their way to other ranks' experts. `there`, `here`: tokens to and from each rank; `token_L`: which
    of this rank's tokens leave, those for one rank together."""

    exchange: Exchange
    there: list[int]
    here: list[int]
    token_L: Tensor
    end: Callable[[], Any] | None = None
    leaving: Tensor | None = None
    arriving: Tensor | None = None
    arrived: tuple[Tensor, ...] = ()
    narrow: bool = False

    @classmethod
    def plan(cls, exchange: Exchange, rank_TK: Tensor) -> Journey:
        """rank_TK: the rank of each choice."""
        goes_ST = rank_TK.new_zeros(exchange.ranks, len(rank_TK), dtype=torch.bool)
        goes_ST.scatter_(0, rank_TK.t(), True)
        there, here = exchange.meet(goes_ST.sum(dim=1))
        token_L = goes_ST.flatten().nonzero().squeeze(1).remainder_(max(1, len(rank_TK)))
        return cls(exchange, there, here, token_L)

    def start(self, parts: tuple[Tensor, ...], outward: bool) -> tuple[Tensor, ...]:
        """Send what belongs to each token off as one row, to the experts or home. What is returned is filled when `wait`
        returns. The first part is rows of tokens, in 8 bits on their way out if the exchange says so."""
        sizes, arriving = (self.there, self.here) if outward else (self.here, self.there)
        self.arrived = tuple(part.new_empty(sum(arriving), *part.shape[1:]) for part in parts)
        self.narrow = outward and self.exchange.fp8
        packed = (pack(parts[0]), *parts[1:]) if self.narrow else parts
        if len(packed) == 1:
            self.leaving = packed[0].contiguous()
        else:
            self.leaving = torch.cat([part.contiguous().view(torch.uint8) for part in packed], dim=1)
        whole = len(parts) == 1 and not self.narrow
        self.arriving = self.arrived[0] if whole else self.leaving.new_empty(sum(arriving), self.leaving.shape[1])
        self.exchange.sent_bytes += self.leaving.nbytes
        if self.exchange.shared is None:
            group = self.exchange.group
            self.end = dist.all_to_all_single(self.arriving, self.leaving, arriving, sizes, group=group, async_op=True).wait
        else:
            self.end = self.exchange.shared.all_to_all(self.arriving, self.leaving, sizes)
            self.leaving = None  # it lies in their memory
        return self.arrived

    def wait(self) -> tuple[Tensor, ...]:
        assert self.end is not None and self.arriving is not None
        self.end()
        arrived, arriving = self.arrived, self.arriving
        if arriving is not arrived[0]:
            first = packed_width(arrived[0].shape[1]) if self.narrow else arrived[0].shape[1] * arrived[0].element_size()
            widths = [first, *(part.shape[1] * part.element_size() for part in arrived[1:])]
            for part, taken in zip(arrived, arriving.split(widths, dim=1), strict=True):
                if self.narrow and part is arrived[0]:
                    part.copy_(unpack(taken, part.shape[1], part.dtype))
                else:
                    part.view(torch.uint8).copy_(taken)
        self.end = self.leaving = self.arriving = None
        self.arrived = ()
        return arrived

    def depart(self, x_LD: Tensor, weight_LK: Tensor, expert_LK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _Depart.apply(self, True, x_LD, weight_LK, expert_LK)

    def arrive(self, *underway: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [A, D], and of the choices [A, K] of each weights and experts, as `depart` was given them elsewhere."""
        return _Arrive.apply(self, True, *underway)

    def bring_back(self, y_AD: Tensor) -> Tensor:
        """What was made of tokens where they came from, in the order in which they left: [L, D]."""
        (y_LD,) = _Arrive.apply(self, False, *_Depart.apply(self, False, y_AD))
        return y_LD


class _Depart(torch.autograd.Function):
    """Start a journey; its gradient is one that `_Arrive` has started the other way and that arrives here."""

    @staticmethod
    def forward(ctx: Any, journey: Journey, outward: bool, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.journey = journey
        underway = journey.start(parts, outward)
        ctx.mark_non_differentiable(*(part for part in underway if not part.is_floating_point()))
        return underway

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arrived = ctx.journey.wait()
        return None, None, *arrived, *(None,) * (len(grads) - len(arrived))


class _Arrive(torch.autograd.Function):
    """End a journey; what is computed between the two in either direction is computed while the tokens travel."""

    @staticmethod
    def forward(ctx: Any, journey: Journey, outward: bool, *underway: Tensor) -> tuple[Tensor, ...]:
        ctx.journey, ctx.outward = journey, outward
        ctx.differentiable = [part.is_floating_point() for part in underway]
        journey.wait()
        there = tuple(part.view_as(part) for part in underway)  # the same memory, filled
        ctx.mark_non_differentiable(*(part for part in there if not part.is_floating_point()))
        return there

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        real = [grad for grad, wanted in zip(grads, ctx.differentiable, strict=True) if wanted]
        ctx.journey.start(tuple(real), not ctx.outward)
        # The gradients are on their way and of other shapes than autograd expects: these say only that they have left.
        said = [grad.new_zeros(()).expand_as(grad) if wanted else None
                for grad, wanted in zip(grads, ctx.differentiable, strict=True)]  # fmt: skip
        return None, None, *said


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
        underway = journey.depart(x_TD.index_select(0, journey.token_L), *_choices(routes, rank_TK, here, journey))
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        y_LD = journey.bring_back(self._made(here, *journey.arrive(*underway)))
        y_TD = torch.zeros_like(x_TD).index_add(0, journey.token_L, y_LD)
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
