"""The router behind its logits, in one pass with gradients through the C++ kernel (`routing.cpp`): float32 on a CPU.

Letters in names: T token, E expert, K choices of a token.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import library, trains
from cadre.kernels.native.structs import Router, Routing, RoutingGradient


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


def choose_experts(logit_TE: Tensor, correction_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
    """expert_TK: int64 choices, best first; weight_TK and score_TE: float32 weights of the choices, affinities of all experts.
    correction_E is added to affinities for the choice only. logit_TE: float32 on a CPU, where the native library is."""
    return _Choose.apply(logit_TE, correction_E, rule)


def greatest(logit_TE: Tensor, count: int) -> Tensor:
    """The so many experts of greatest logits of each token, int64 [T, K] in any order; no gradient."""
    logit_TE = logit_TE.detach()
    if not trains(logit_TE) or count > logit_TE.shape[-1]:  # which torch refuses
        return logit_TE.topk(count, dim=-1, sorted=False).indices
    logit = logit_TE.contiguous()
    expert_TK = logit.new_empty(len(logit), count, dtype=torch.int64)
    _library().cadre_greatest(_at(logit), *logit.shape, count, torch.get_num_threads(), _at(expert_TK))
    return expert_TK


def frequency_met_reference(score_TE: Tensor, frequency_BE: Tensor) -> Tensor:
    """What each token adds to a balance loss, float32 [T] (V3 report, equations 17 to 20, tokens outside and experts inside):
    sum_e f_e s_e / sum_e s_e, with affinities score_TE and the frequencies f of its stretch, one of B equal ones."""
    share_TE = score_TE / score_TE.sum(dim=-1, keepdim=True)
    return torch.bmm(share_TE.unflatten(0, (len(frequency_BE), -1)), frequency_BE[:, :, None]).flatten()


def frequency_met(score_TE: Tensor, frequency_BE: Tensor) -> Tensor:
    """As the reference; frequency_BE gets no gradient. Float32 on a CPU takes one pass over memory, and one back."""
    frequency_BE = frequency_BE.detach()
    if trains(score_TE, frequency_BE) and len(score_TE) % len(frequency_BE) == 0 and score_TE.shape[1] == frequency_BE.shape[1]:
        return _FrequencyMet.apply(score_TE, frequency_BE)
    return frequency_met_reference(score_TE, frequency_BE)


class _FrequencyMet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_TE: Tensor, frequency_BE: Tensor) -> Tensor:
        score, frequency = score_TE.contiguous(), frequency_BE.contiguous()
        met_T, total_T = score.new_empty(len(score)), score.new_empty(len(score))
        ctx.sizes = (*score.shape, len(score) // len(frequency), torch.get_num_threads())
        _library().cadre_frequency_met(_at(score), _at(frequency), *ctx.sizes, _at(met_T), _at(total_T))
        ctx.save_for_backward(frequency, met_T, total_T)
        return met_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        frequency, met_T, total_T = ctx.saved_tensors
        grad_T = grad_T.resolve_neg().contiguous()
        grad_TE = frequency.new_empty(ctx.sizes[:2])
        at = (_at(tensor) for tensor in (frequency, met_T, total_T, grad_T))
        _library().cadre_frequency_met_gradient(*at, *ctx.sizes, _at(grad_TE))
        return grad_TE, None


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logit_TE: Tensor, correction_E: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
        logit = logit_TE.contiguous()
        correction = None if correction_E is None else correction_E.contiguous()
        score_TE = torch.empty_like(logit)
        expert_TK = logit.new_empty(len(logit), rule.top_k, dtype=torch.int64)
        weight_TK = logit.new_empty(len(logit), rule.top_k)
        _library().cadre_routing(byref(_struct(logit, correction, score_TE, expert_TK, weight_TK, rule)))
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
        gradient = RoutingGradient(_at(weight), _at(score), _at(grad_logit))
        _library().cadre_routing_gradient(byref(_struct(None, None, score_TE, expert_TK, None, ctx.rule)), byref(gradient))
        return grad_logit, None, None


def _struct(
    logit: Tensor | None, correction: Tensor | None, score: Tensor, expert: Tensor, weight: Tensor | None, rule: RoutingRule
) -> Routing:
    tokens, experts = score.shape
    return Routing(
        _at(logit), router(rule, _at(correction), experts), _at(score), _at(expert), _at(weight), tokens,
        torch.get_num_threads(),
    )  # fmt: skip


def router(rule: RoutingRule, correction: int | None, experts: int) -> Router:
    """The rule as the kernels take it. correction: an address, or None."""
    return Router(correction, experts, rule.top_k, rule.groups, rule.top_groups, rule.sigmoid, rule.normed, rule.scaling)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _library() -> Any:
    native = library()
    assert native is not None
    return native
