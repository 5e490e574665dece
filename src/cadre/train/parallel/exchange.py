"""Experts spread over ranks: routed rows travel to the ranks that hold their experts, and back, by all-to-all.

The seam is between dispatch and the experts. `dispatch` has sorted the rows by expert, so those for one rank lie together:

    counts      how many rows go to each expert of each rank: a few integers, and the only wait for the processor
    rows        once, in the compute dtype or in 8 bits; the shared experts work meanwhile
    experts     on what has arrived, sorted by expert again (by the experts' kernel itself, where there is one)
    back        the same way, then `combine` as ever; gradients make the same two journeys in reverse

A layer's forward pass sends choices x hidden x (dispatch bytes + combine bytes) for each token, what stays on its rank
included, and the backward pass as much again. No token is dropped and none is padded. In 8 bits are what experts multiply, the
rows on their way there and the gradients of what they made; the sums on their way home are not (DeepSeek-V3 report, section
3.3.3).

Letters in names: T token, D hidden, R routed row here, A row arrived from all ranks, E expert, S rank, N expert of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cadre.model.experts import Experts, MixtureOfExperts, Plan, combine, dispatch
from cadre.train.parallel.fp8 import pack, packed_width, unpack


@dataclass
class Exchange:
    """The ranks that share one copy of the experts. `fp8`: whether rows go to the experts in 8 bits. `sent_bytes`: of rows and
    their gradients, by all layers so far."""

    group: dist.ProcessGroup
    fp8: bool = False
    sent_bytes: int = field(default=0, init=False)

    @property
    def ranks(self) -> int:
        return self.group.size()

    def meet(self, load_E: Tensor) -> Tensor:
        """Tell each rank how many rows its experts get from here. Returns what this rank's get from each: int64 [S, N]."""
        arriving = torch.empty_like(load_E)
        dist.all_to_all_single(arriving, load_E, group=self.group)
        return arriving.view(self.ranks, -1)


@dataclass
class Journey:
    """One layer's rows on their way to other ranks' experts. `there`, `here`: rows to and from each rank. `order_A` sorts
    what arrives by expert, `place_A` undoes it; `load_N`: rows of each expert of this rank, int64."""

    exchange: Exchange
    there: list[int]
    here: list[int]
    order_A: Tensor
    place_A: Tensor
    load_N: Tensor
    work: dist.Work | None = None
    leaving: Tensor | None = None
    arriving: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def plan(cls, exchange: Exchange, load_E: Tensor) -> Journey:
        arriving_SN = exchange.meet(load_E)
        leaving_S = load_E.view(exchange.ranks, -1).sum(dim=1)
        there, here = torch.stack((leaving_S, arriving_SN.sum(dim=1))).tolist()
        experts = torch.arange(arriving_SN.shape[1], device=load_E.device).repeat(exchange.ranks)
        order_A = experts.repeat_interleave(arriving_SN.flatten(), output_size=sum(here)).argsort(stable=True)
        place_A = torch.empty_like(order_A)
        place_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        return cls(exchange, there, here, order_A, place_A, arriving_SN.sum(dim=0))

    def start(self, rows: Tensor, outward: bool) -> Tensor:
        """Send rows off, to the experts or home. What is returned is filled when `wait` returns."""
        sizes, arriving = (self.there, self.here) if outward else (self.here, self.there)
        width, narrow = rows.shape[1], outward and self.exchange.fp8
        self.rows = rows.new_empty(sum(arriving), width)
        self.leaving = pack(rows) if narrow else rows.contiguous()  # must outlive the sending
        self.arriving = self.leaving.new_empty(sum(arriving), packed_width(width)) if narrow else self.rows
        self.exchange.sent_bytes += self.leaving.nbytes
        self.work = dist.all_to_all_single(
            self.arriving, self.leaving, arriving, sizes, group=self.exchange.group, async_op=True
        )
        return self.rows

    def wait(self) -> Tensor:
        assert self.work is not None and self.arriving is not None and self.rows is not None
        self.work.wait()
        arrived = self.rows
        if self.arriving is not arrived:
            arrived.copy_(unpack(self.arriving, arrived.shape[1], arrived.dtype))
        self.work = self.leaving = self.arriving = self.rows = None
        return arrived

    def depart(self, x_RD: Tensor) -> Tensor:
        return _Depart.apply(x_RD, self, True)

    def arrive(self, underway_AD: Tensor) -> Tensor:
        """The rows that other ranks sent, in the order of these: [A, D]."""
        return _Arrive.apply(underway_AD, self, True)

    def pass_through(self, experts: nn.Module, x_AD: Tensor) -> Tensor:
        """What the experts make of rows in the order of arrival: [A, D]."""
        if isinstance(experts, Experts) and experts.moves_rows(x_AD):
            once_A1 = x_AD.new_ones(len(x_AD), 1)
            return experts(x_AD, self.load_N, Plan(self.place_A[:, None], self.order_A, self.load_N, once_A1))
        sorted_AD = _Reorder.apply(x_AD, self.order_A, self.place_A)
        return _Reorder.apply(experts(sorted_AD, self.load_N), self.place_A, self.order_A)

    def bring_back(self, y_AD: Tensor) -> Tensor:
        """Rows where they came from and in the order in which they left: [R, D]."""
        return _Arrive.apply(_Depart.apply(y_AD, self, False), self, False)


class _Depart(torch.autograd.Function):
    """Start a journey; its gradient is one that `_Arrive` has started the other way and that arrives here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey, outward: bool) -> Tensor:
        ctx.journey = journey
        return journey.start(rows, outward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.journey.wait(), None, None


class _Arrive(torch.autograd.Function):
    """End a journey; what is computed between the two in either direction is computed while the rows travel."""

    @staticmethod
    def forward(ctx: Any, underway: Tensor, journey: Journey, outward: bool) -> Tensor:
        ctx.journey, ctx.outward = journey, outward
        journey.wait()
        return underway.view_as(underway)  # the same memory, filled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.journey.start(grad, not ctx.outward)
        # The gradient is on its way and of another shape than autograd expects: this says only that it has left.
        return grad.new_zeros(()).expand_as(grad), None, None


class _Reorder(torch.autograd.Function):
    """rows[order]; `place` is the inverse of `order`, so that the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


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
        x_RD, plan = dispatch(x_TD, routes)
        journey = Journey.plan(self.exchange, plan.load_E)
        underway_AD = journey.depart(x_RD)
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        y_AD = journey.pass_through(self.experts, journey.arrive(underway_AD))
        y_TD = combine(journey.bring_back(y_AD), plan)
        if self.training and self.keeps_routes:
            self.routes = routes
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BTD)
