"""The mixture of experts: router -> dispatch -> experts -> combine (DeepSeek-V3 report, section 2.1.2).

Three separate objects: the Router scores and chooses, dispatch and combine move tokens, Experts compute. Balance lives in
training: it reads the loads and moves the router's bias.

Letters in names: T token, D hidden, E expert, K expert choices of a token, R = T*K routed rows, F expert width, G group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from cadre.kernels.grouped import expert_swiglu
from cadre.kernels.linear import linear
from cadre.kernels.native.library import kernels_take_rows
from cadre.kernels.permute import gather_rows, sort_choices, sum_choices
from cadre.kernels.routed import Dense, routed_swiglu
from cadre.kernels.routing import RoutingRule, choose_experts
from cadre.model.config import ModelConfig
from cadre.model.layers import SwiGLU, is_watched


@dataclass
class Routes:
    """Where each token goes. expert_TK: int64 choices; weight_TK: float32 weights of the choices. Kept for balance losses:
    logit_TE, the router's float32 logits, and score_TE, their affinities (sigmoid or softmax, without bias)."""

    expert_TK: Tensor
    weight_TK: Tensor
    score_TE: Tensor
    logit_TE: Tensor


class Router(nn.Module):
    """Scores every expert for every token and picks top-k, limited to the best groups. All arithmetic in float32, but for the
    factors of its gradients' products where `narrow`.

    deepseek_v3, glm4_moe: sigmoid affinities; the choice (not the weight) adds `e_score_correction_bias`; a group counts
    by the sum of its two best (V3 report, equations 12-16). deepseek_v2: softmax affinities; a group counts by its best.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.n_routed_experts or 0
        self.rule = RoutingRule(
            config.num_experts_per_tok or 1, config.n_group, config.topk_group, config.scoring_func == "sigmoid",
            config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.narrow = False
        if config.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The bias moves between devices with the model but keeps float32 under every cast: its steps are near 1e-3,
        below bfloat16's resolution."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(device=moved.device)
        return self

    def forward(self, x_TD: Tensor) -> Routes:
        logit_TE = linear(x_TD.float(), self.weight.float(), narrow_back=self.narrow)
        return Routes(*choose_experts(logit_TE, self.e_score_correction_bias, self.rule), logit_TE)


@dataclass
class Plan:
    """How routed rows lie. row_TK: the row of each token's each choice; token_R: the token of each row; load_E: rows per
    expert; weight_TK: the router's weights. Rows of one expert are adjacent, experts in order, tokens in order within."""

    row_TK: Tensor
    token_R: Tensor
    load_E: Tensor
    weight_TK: Tensor


def arrange(routes: Routes) -> Plan:
    """Sort the tokens' choices by expert. No choice is ever dropped."""
    return Plan(*sort_choices(routes.expert_TK, routes.score_TE.shape[1]), routes.weight_TK)


def dispatch(x_TD: Tensor, routes: Routes) -> tuple[Tensor, Plan]:
    """Copy each token to the rows of its experts: [R, D] sorted by expert, and the plan that brings them back."""
    plan = arrange(routes)
    return gather_rows(x_TD, plan.token_R, plan.row_TK), plan


def combine(y_RD: Tensor, plan: Plan) -> Tensor:
    """Bring rows back to their tokens and add them, each by its router weight: [T, D] in y's dtype."""
    return sum_choices(y_RD, plan.weight_TK, plan.row_TK, plan.token_R)


class Experts(nn.Module):
    """The routed experts' weights, fused as transformers 5 keeps them: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts or 0, config.hidden_size, config.moe_intermediate_size or 0
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.narrow = self.fp8 = False

    def forward(self, x: Tensor, load_E: Tensor, plan: Plan | None = None, shared: Dense | None = None) -> Tensor:
        """Rows [R, D] sorted by expert in, rows out. With a plan, where `moves_rows`: tokens [T, D] in, tokens out, what the
        shared experts make of them added if those are given."""
        matrices = self.gate_up_proj, self.down_proj
        if plan is None:
            assert shared is None
            return expert_swiglu(x, load_E, *matrices, self.narrow, self.fp8)
        return routed_swiglu(x, plan.weight_TK, plan.row_TK, plan.token_R, load_E, *matrices, self.narrow, shared)

    def moves_rows(self, x_TD: Tensor) -> bool:
        """Whether dispatch and combine can be had as part of the experts' kernel, so that no row is ever stored."""
        return not self.fp8 and kernels_take_rows(x_TD, self.gate_up_proj, self.down_proj, narrow=self.narrow)


class MixtureOfExperts(nn.Module):
    """A token's chosen experts, weighted, plus the shared experts that every token passes.

    In training mode the routes of a forward pass stay in `routes` for balancing, unless `keeps_routes` is off: a pass
    repeated within the backward pass (activation recomputation) must neither count twice nor hold memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * (config.moe_intermediate_size or 0)
        self.shared_experts = SwiGLU(config.hidden_size, width) if width else None
        self.keeps_routes = True
        self.routes: Routes | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no part in the graph that the last pass's routes hang on."""
        return {**self.__dict__, "routes": None}

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, -2)
        routes = self.gate(x_TD)
        shared, joined = self.shared_experts, None
        if self.experts.moves_rows(x_TD):
            plan = arrange(routes)
            joined = self._shared_weights(x_TD)
            y_TD = self.experts(x_TD, plan.load_E, plan, joined)
        else:
            x_RD, plan = dispatch(x_TD, routes)
            y_TD = combine(self.experts(x_RD, plan.load_E), plan)
        if self.training and self.keeps_routes:
            self.routes = routes
        if shared is not None and joined is None:
            y_TD = y_TD + shared(x_TD)
        return y_TD.view_as(x_BTD)

    def _shared_weights(self, x_TD: Tensor) -> Dense | None:
        """The shared experts' matrices, where the routed ones' kernel can compute both."""
        shared = self.shared_experts
        if not isinstance(shared, SwiGLU) or is_watched(shared):
            return None
        weights = shared.weights(x_TD)
        return weights if weights is not None and shared.gate_proj.narrow == self.experts.narrow else None
