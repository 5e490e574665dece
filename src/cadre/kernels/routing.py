"""The router behind its logits: affinities, choices and their weights (DeepSeek-V3 report, equations 12 to 16; V2's, 20 to 22),
and what balance losses ask of them. Float32 on a CPU takes one pass with gradients through the C++ kernels (`routing.cpp`).

Letters in names: T token, E expert, K choices of a token, G group, B stretch of tokens.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import kernels, training_kernels_take
from cadre.kernels.native.structs import Router, Routing, RoutingGradient, address


@dataclass(frozen=True)
class RoutingRule:
    """How experts are chosen: sigmoid or softmax affinities, the best `top_groups` of `groups`, `top_k` experts within them,
    weights that sum to 1 if `normed`, times `scaling`."""

    top_k: int
    groups: int
    top_groups: int
    sigmoid: bool
    normed: bool
    scaling: float


def choose_experts_reference(logit_TE: Tensor, correction_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
    """expert_TK: int64 choices in any order; weight_TK: their weights; score_TE: the affinities of all experts, both in the
    logits' dtype. correction_E, float32 or none, is added to affinities for the choice only."""
    score_TE = logit_TE.sigmoid() if rule.sigmoid else logit_TE.softmax(dim=-1)
    expert_TK = _choices(score_TE.detach(), correction_E, rule)
    weight_TK = score_TE.gather(1, expert_TK)
    if rule.normed:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return expert_TK, weight_TK * rule.scaling, score_TE


def _choices(score_TE: Tensor, correction_E: Tensor | None, rule: RoutingRule) -> Tensor:
    """A sigmoid's group counts by the sum of its two best experts (V3), a softmax's by its best (V2)."""
    choice_TE = score_TE if correction_E is None else score_TE + correction_E
    if rule.top_groups < rule.groups:
        choice_TGE = choice_TE.unflatten(1, (rule.groups, -1))
        group_TG = choice_TGE.topk(2, dim=-1).values.sum(dim=-1) if rule.sigmoid else choice_TGE.amax(dim=-1)
        best = group_TG.topk(rule.top_groups, dim=-1, sorted=False).indices
        closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, best, False)
        choice_TE = choice_TGE.masked_fill(closed_TG[:, :, None], float("-inf")).flatten(1)
    return choice_TE.topk(rule.top_k, dim=-1, sorted=False).indices


def choose_experts(logit_TE: Tensor, correction_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    if training_kernels_take(logit_TE):
        return _Choose.apply(logit_TE, correction_E, rule)
    return choose_experts_reference(logit_TE, correction_E, rule)


def top_experts(logit_TE: Tensor, count: int) -> Tensor:
    """Each token's `count` experts with the largest logits, int64 [T, K] in any order; no gradient."""
    logit_TE = logit_TE.detach()
    if not training_kernels_take(logit_TE) or count > logit_TE.shape[-1]:  # which torch refuses
        return logit_TE.topk(count, dim=-1, sorted=False).indices
    logit = logit_TE.contiguous()
    expert_TK = logit.new_empty(len(logit), count, dtype=torch.int64)
    kernels().cadre_top_experts(address(logit), *logit.shape, count, torch.get_num_threads(), address(expert_TK))
    return expert_TK


def balance_terms_reference(score_TE: Tensor, frequency_BE: Tensor) -> Tensor:
    """What each token adds to a balance loss, float32 [T] (V3 report, equations 17 to 20, tokens outside and experts inside):
    sum_e f_e s_e / sum_e s_e, with affinities score_TE and the frequencies f of its stretch, one of B equal ones."""
    share_TE = score_TE / score_TE.sum(dim=-1, keepdim=True)
    return torch.bmm(share_TE.unflatten(0, (len(frequency_BE), -1)), frequency_BE[:, :, None]).flatten()


def balance_terms(score_TE: Tensor, frequency_BE: Tensor) -> Tensor:
    """As the reference; frequency_BE gets no gradient. Float32 on a CPU takes one pass over memory, and one back."""
    frequency_BE = frequency_BE.detach()
    fits = len(score_TE) % len(frequency_BE) == 0 and score_TE.shape[1] == frequency_BE.shape[1]
    if fits and training_kernels_take(score_TE, frequency_BE):
        return _BalanceTerms.apply(score_TE, frequency_BE)
    return balance_terms_reference(score_TE, frequency_BE)


class _BalanceTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_TE: Tensor, frequency_BE: Tensor) -> Tensor:
        score, frequency = score_TE.contiguous(), frequency_BE.contiguous()
        met_T, total_T = score.new_empty(len(score)), score.new_empty(len(score))
        ctx.sizes = (*score.shape, len(score) // len(frequency), torch.get_num_threads())
        kernels().cadre_balance_terms(address(score), address(frequency), *ctx.sizes, address(met_T), address(total_T))
        ctx.save_for_backward(frequency, met_T, total_T)
        return met_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        frequency, met_T, total_T = ctx.saved_tensors
        grad_T = grad_T.resolve_neg().contiguous()
        grad_TE = frequency.new_empty(ctx.sizes[:2])
        at = (address(tensor) for tensor in (frequency, met_T, total_T, grad_T))
        kernels().cadre_balance_terms_gradient(*at, *ctx.sizes, address(grad_TE))
        return grad_TE, None


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logit_TE: Tensor, correction_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
        logit = logit_TE.contiguous()
        correction = None if correction_E is None else correction_E.contiguous()
        score_TE = torch.empty_like(logit)
        expert_TK = logit.new_empty(len(logit), rule.top_k, dtype=torch.int64)
        weight_TK = logit.new_empty(len(logit), rule.top_k)
        kernels().cadre_routing(byref(_struct(logit, correction, score_TE, expert_TK, weight_TK, rule)))
        ctx.save_for_backward(score_TE, expert_TK)
        ctx.rule = rule
        ctx.mark_non_differentiable(expert_TK)
        ctx.set_materialize_grads(False)
        return expert_TK, weight_TK, score_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad_TK: Tensor | None, grad_TE: Tensor | None) -> tuple[Tensor, None, None]:
        score_TE, expert_TK = ctx.saved_tensors
        weight, score = (None if grad is None else grad.resolve_neg().contiguous() for grad in (grad_TK, grad_TE))
        grad_logit = torch.empty_like(score_TE)
        gradient = RoutingGradient(address(weight), address(score), address(grad_logit))
        kernels().cadre_routing_gradient(byref(_struct(None, None, score_TE, expert_TK, None, ctx.rule)), byref(gradient))
        return grad_logit, None, None


def _struct(
    logit: Tensor | None, correction: Tensor | None, score: Tensor, expert: Tensor, weight: Tensor | None, rule: RoutingRule
) -> Routing:
    tokens, experts = score.shape
    return Routing(
        address(logit), router(rule, address(correction), experts), address(score), address(expert), address(weight), tokens,
        torch.get_num_threads(),
    )  # fmt: skip


def router(rule: RoutingRule, correction: int | None, experts: int) -> Router:
    """The rule as the kernels take it. correction: an address, or None."""
    return Router(correction, experts, rule.top_k, rule.groups, rule.top_groups, rule.sigmoid, rule.normed, rule.scaling)
