"""The balance losses, each an object of its own: what a forward pass chose goes in, a number to make small comes out.

All but the router z-loss are the V3 report's equations 17 to 20 over stretches of different length: what share of the
choices an expert takes (f, no gradient) times how much affinity it is given (P), summed over experts; 1 at balance. What
counts as a choice is what the family's own report counts: with sigmoid affinities the top-k of the bare affinities
(V3, equation 18: neither bias nor groups, so the loss evens out the affinities themselves, whatever the bias makes of
them), with softmax affinities the experts that were selected (V2, equation 24).

Letters in names: B stretch, T token, E expert, K choices, L sparse layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cadre.kernels.routing import balance_terms, top_experts
from cadre.model.experts import Router, Routes


@dataclass
class RecordedRoutes:
    """The routes of one layer in one micro-batch. `layer`: its place among the sparse layers. `sequences`: how many the
    tokens make up, equally long. `part`: their share of what the layer sees in an optimizer step, times the number of
    micro-batches, so that the layer's losses, averaged over micro-batches, are those of the whole batch."""

    layer: int
    router: Router
    routes: Routes
    sequences: int
    part: float


class BalanceLoss(Protocol):
    """`key` names it in the metrics; calling it gives a float32 scalar whose gradient reaches the router."""

    key: str
    weight: float

    def __call__(self, recorded: RecordedRoutes) -> Tensor: ...


def counted_loads(recorded: RecordedRoutes, stretches: int) -> Tensor:
    """How often each expert counts as chosen in each of equal stretches of tokens: float32 [B, E]."""
    routes, expert_TK = recorded.routes, recorded.routes.expert_TK
    if recorded.router.rule.sigmoid:
        expert_TK = top_experts(routes.logit_TE, expert_TK.shape[1])
    expert_BR = expert_TK.reshape(stretches, -1)
    load_BE = routes.score_TE.detach().new_zeros(stretches, routes.score_TE.shape[1])
    return load_BE.scatter_add_(1, expert_BR, torch.ones_like(expert_BR, dtype=load_BE.dtype))


def balance_loss(score_TE: Tensor, load_BE: Tensor) -> Tensor:
    """Equations 17 to 20 without their factor, averaged over the B equal stretches of the T tokens. load_BE: the choices
    that count, in any unit, for each stretch or (B = 1) for all."""
    frequency_BE = load_BE * (score_TE.shape[1] / load_BE.sum(dim=-1, keepdim=True))
    return balance_terms(score_TE, frequency_BE).mean()


def _whole(load_BE: Tensor) -> Tensor:
    return load_BE


@dataclass
class SequenceLoss:
    """Every sequence on its own (V3 report, equations 17-20). `total` adds up the counts of the processes that share these
    sequences; the mean of their losses is then that of whole sequences."""

    weight: float
    total: Callable[[Tensor], Tensor] = _whole
    key: str = "balance_loss"

    def __call__(self, recorded: RecordedRoutes) -> Tensor:
        return balance_loss(recorded.routes.score_TE, self.total(counted_loads(recorded, recorded.sequences)))


@dataclass
class BatchLoss:
    """All that is computed at once: a micro-batch (as in Switch Transformers, arXiv 2101.03961, section 2.2)."""

    weight: float
    total: Callable[[Tensor], Tensor] = _whole
    key: str = "batch_balance_loss"

    def __call__(self, recorded: RecordedRoutes) -> Tensor:
        return balance_loss(recorded.routes.score_TE, self.total(counted_loads(recorded, 1)))


class GlobalLoss:
    """All micro-batches of an optimizer step (arXiv 2501.11873). Its frequencies must be known before the first gradient:
    of several micro-batches they are collected beforehand by `collect_loads`, of a single one they are its own."""

    key = "global_balance_loss"

    def __init__(self, weight: float, layers: int) -> None:
        self.weight = weight
        self.load_LE: list[Tensor | None] = [None] * layers

    def collect_loads(self, recorded: RecordedRoutes) -> None:
        load_BE, before = counted_loads(recorded, 1), self.load_LE[recorded.layer]
        self.load_LE[recorded.layer] = load_BE if before is None else before + load_BE

    def reset(self) -> None:
        self.load_LE = [None] * len(self.load_LE)

    def __call__(self, recorded: RecordedRoutes) -> Tensor:
        collected = self.load_LE[recorded.layer]
        return balance_loss(recorded.routes.score_TE, counted_loads(recorded, 1) if collected is None else collected)


@dataclass
class RouterZLoss:
    """mean over tokens of (log sum_e exp(logit_e))^2, which keeps logits small (ST-MoE, arXiv 2202.08906, equation 5)."""

    weight: float
    key: str = "router_z_loss"

    def __call__(self, recorded: RecordedRoutes) -> Tensor:
        return recorded.routes.logit_TE.logsumexp(dim=-1).square().mean()
