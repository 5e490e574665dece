from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.testing import assert_close

from cadre.kernels import grouped, routing
from cadre.kernels.native.library import own_products_faster
from cadre.kernels.routing import choose_experts, choose_experts_reference
from cadre.model import experts, layers
from cadre.model.config import ModelConfig
from cadre.model.experts import MixtureOfExperts, Router, Routes, combine, dispatch
from cadre.model.families import FAMILIES
from cadre.model.layers import SwiGLU
from tests.shapes import SPARSE, configs, small

GROUPED = dict(n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3)


@st.composite
def sparse_configs(draw: DrawFn) -> ModelConfig:
    return draw(configs(SPARSE).filter(lambda config: config.has_experts))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(config: ModelConfig, seed: int = 0) -> MixtureOfExperts:
    """A mixture with weights of order one, and a bias large enough to change choices."""
    mixture = MixtureOfExperts(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        if mixture.gate.e_score_correction_bias is not None:
            mixture.gate.e_score_correction_bias.normal_(std=0.3, generator=generator)
    return mixture


def routes_by_hand(config: ModelConfig, router: Router, x: Tensor) -> list[dict[int, float]]:
    """The papers' equations, one token and one expert at a time: {expert: weight} of each token."""
    result = []
    bias = [0.0] * len(router.weight) if router.e_score_correction_bias is None else router.e_score_correction_bias.tolist()
    per_group = len(bias) // config.n_group
    for token in x.double():
        logits = [float(torch.dot(row, token)) for row in router.weight.detach().double()]
        if config.scoring_func == "softmax":
            total = sum(math.exp(logit) for logit in logits)
            scores = [math.exp(logit) / total for logit in logits]
        else:
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        wanted = [score + b for score, b in zip(scores, bias, strict=True)]
        groups = [range(g * per_group, (g + 1) * per_group) for g in range(config.n_group)]
        best_of = 1 if config.scoring_func == "softmax" else 2
        worth = [sum(sorted((wanted[e] for e in group), reverse=True)[:best_of]) for group in groups]
        open_groups = sorted(range(config.n_group), key=lambda g: worth[g], reverse=True)[: config.topk_group]
        candidates = [e for g in open_groups for e in groups[g]]
        chosen = sorted(candidates, key=lambda e: wanted[e], reverse=True)[: config.num_experts_per_tok]
        norm = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        result.append({e: scores[e] / norm * config.routed_scaling_factor for e in chosen})
    return result


def as_dicts(routes: Routes) -> list[dict[int, float]]:
    return [
        dict(zip(experts, weights, strict=True))
        for experts, weights in zip(routes.expert_TK.tolist(), routes.weight_TK.tolist(), strict=True)
    ]


@pytest.mark.parametrize("native", [True, False])
@given(config=sparse_configs(), tokens=st.integers(1, 9), seed=st.integers(0, 999))
def test_router_follows_the_equations(native, config: ModelConfig, tokens, seed):
    router, x = filled(config, seed).gate, random(tokens, config.hidden_size, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            through_torch(patch)
        routes = router(x)
    assert routes.weight_TK.dtype == routes.score_TE.dtype == torch.float32
    for ours, by_hand in zip(as_dicts(routes), routes_by_hand(config, router, x), strict=True):
        assert ours == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


def choices(kind: str, logit_TE: torch.Tensor, bias: torch.Tensor | None = None, **changes) -> set[int]:
    """Of both backends, which must agree."""
    rule = Router(small(kind, **changes)).rule
    found = [set(choose(logit_TE, bias, rule)[0].flatten().tolist()) for choose in (choose_experts, choose_experts_reference)]
    assert found[0] == found[1]
    return found[0]


def test_groups_of_v3_count_by_their_two_best_and_of_v2_by_their_best():
    """Group 0 has the single best expert, group 1 the best pair."""
    score = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    shape = dict(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1)
    assert choices("deepseek_v3", score.logit(), **shape) == {2}
    assert choices("deepseek_v2", score.log(), **shape) == {0}


def test_a_closed_group_stays_closed_though_its_expert_would_win():
    score = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.5, 0.4]])
    assert choices("deepseek_v3", score.logit(), n_group=2, topk_group=1, num_experts_per_tok=3) == {3, 4, 5}


def test_negative_wanted_scores_never_lose_to_closed_groups():
    """A large negative bias on every expert: masking closed groups with 0 instead of -inf would open them."""
    score = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.1, 0.1]])
    groups = dict(n_group=2, topk_group=1, num_experts_per_tok=3)
    assert choices("deepseek_v3", score.logit(), bias=torch.full((6,), -5.0), **groups) == {0, 1, 2}


def test_bias_changes_the_choice_but_not_the_weight():
    config = small("deepseek_v3", norm_topk_prob=False, num_experts_per_tok=1)
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(random(6, config.hidden_size))
    x = random(50, config.hidden_size)
    router.e_score_correction_bias[4] = 9.0
    routes = router(x)
    assert torch.all(routes.expert_TK == 4)
    assert_close(routes.weight_TK[:, 0], (x @ router.weight[4]).sigmoid())
    assert_close(routes.score_TE, (x @ router.weight.T).sigmoid())


def test_bias_gets_no_gradient_and_the_router_weight_does():
    mixture = filled(small("deepseek_v3"))
    assert "gate.e_score_correction_bias" not in dict(mixture.named_parameters())
    mixture(random(1, 9, 24)).square().sum().backward()
    assert mixture.gate.e_score_correction_bias.grad is None
    assert not mixture.gate.e_score_correction_bias.requires_grad
    assert mixture.gate.weight.grad.abs().max() > 1e-6


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to dtype": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "to a tensor's dtype": lambda module: module.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type": lambda module: module.type(torch.bfloat16),
    "twice": lambda module: module.bfloat16().half(),
    "there and back": lambda module: module.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_bias_stays_float32_to_the_last_bit_under_every_cast(cast):
    mixture = filled(small("deepseek_v3"))
    before = mixture.gate.e_score_correction_bias.clone()
    cast(mixture)
    assert mixture.gate.e_score_correction_bias.dtype == torch.float32
    assert_close(mixture.gate.e_score_correction_bias, before, rtol=0, atol=0)
    assert "gate.e_score_correction_bias" in mixture.state_dict()


def test_bias_moves_with_the_model():
    mixture = filled(small("deepseek_v3")).to("meta")
    assert mixture.gate.e_score_correction_bias.device.type == "meta"
    mixture.to_empty(device="cpu")
    assert mixture.gate.e_score_correction_bias.device.type == "cpu"
    mixture.to(device="meta", dtype=torch.bfloat16)
    assert mixture.gate.e_score_correction_bias.device.type == "meta"
    assert mixture.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("family", SPARSE)
def test_routing_is_float32_whatever_flows(family):
    mixture = filled(small(family, **(GROUPED if FAMILIES[family].like_deepseek else {}))).bfloat16()
    x = random(40, 24).bfloat16()
    routes = mixture.gate(x)
    exact = copy.deepcopy(mixture.gate).float()(x.float())
    assert_close(routes.weight_TK, exact.weight_TK, rtol=0, atol=0)
    assert torch.equal(routes.expert_TK, exact.expert_TK)


def mixture_by_hand(mixture: MixtureOfExperts, x_TD: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    routes, outputs = mixture.gate(x_TD), []
    for t, token in enumerate(x_TD):
        output = torch.zeros_like(token)
        for weight, expert in zip(routes.weight_TK[t], routes.expert_TK[t].tolist(), strict=True):
            gate, up = (mixture.experts.gate_up_proj[expert] @ token).chunk(2)
            output = output + weight * (mixture.experts.down_proj[expert] @ (F.silu(gate) * up))
        if (shared := mixture.shared_experts) is not None:
            inner = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            output = output + shared.down_proj.weight @ inner
        outputs.append(output)
    return torch.stack(outputs)


def through_torch(patch: pytest.MonkeyPatch) -> None:
    """As where the C++ kernels are not to be had."""
    patch.setattr(routing, "training_kernels_take", lambda *_: False)
    for module in (experts, grouped, layers):
        patch.setattr(module, "kernels_take_rows", lambda *_, **__: False)


@pytest.mark.parametrize("native", [True, False])
@given(config=sparse_configs(), tokens=st.integers(1, 7), seed=st.integers(0, 999))
def test_mixture_equals_a_loop_over_tokens_in_value_and_gradient(native, config: ModelConfig, tokens, seed):
    mixture, x = filled(config, seed), random(1, tokens, config.hidden_size, seed=seed).requires_grad_()
    weights = [x, *mixture.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            through_torch(patch)
        ours, by_hand = mixture(x), mixture_by_hand(mixture, x[0])[None]
    assert_close(ours, by_hand, atol=1e-5, rtol=1e-4)
    direction = random(*ours.shape, seed=seed + 1)
    got = torch.autograd.grad((ours * direction).sum(), weights, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad((by_hand * direction).sum(), weights, allow_unused=True, materialize_grads=True)
    for name, ours_grad, hand_grad in zip(["x", *dict(mixture.named_parameters())], got, want, strict=True):
        assert_close(ours_grad, hand_grad, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", SPARSE)
def test_renumbering_experts_changes_nothing(family):
    mixture = filled(small(family))
    renumbered = copy.deepcopy(mixture)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        renumbered.gate.weight.copy_(mixture.gate.weight[order])
        renumbered.experts.gate_up_proj.copy_(mixture.experts.gate_up_proj[order])
        renumbered.experts.down_proj.copy_(mixture.experts.down_proj[order])
        if mixture.gate.e_score_correction_bias is not None:
            renumbered.gate.e_score_correction_bias.copy_(mixture.gate.e_score_correction_bias[order])
    x = random(2, 20, 24)
    assert_close(renumbered(x), mixture(x), atol=1e-5, rtol=1e-4)


@given(sparse_configs(), st.integers(1, 30), st.integers(0, 999))
def test_no_token_is_ever_dropped(config: ModelConfig, tokens, seed):
    x = random(tokens, config.hidden_size, seed=seed)
    routes = filled(config, seed).gate(x)
    rows, plan = dispatch(x, routes)
    assert plan.load_E.sum() == len(rows) == tokens * config.num_experts_per_tok
    assert torch.equal(plan.load_E, torch.bincount(routes.expert_TK.flatten(), minlength=config.n_routed_experts))
    for expert, part in enumerate(plan.token_R.split(plan.load_E.tolist())):
        assert part.tolist() == [t for t, chosen in enumerate(routes.expert_TK.tolist()) if expert in chosen]
    assert torch.equal(rows, x[plan.token_R])
    assert torch.equal(plan.token_R[plan.row_TK], torch.arange(tokens)[:, None].expand_as(plan.row_TK))


def test_no_token_is_dropped_when_all_want_the_same_experts():
    config = small("deepseek_v3")
    mixture, x = filled(config), random(1, 200, config.hidden_size)
    mixture.gate.e_score_correction_bias.zero_()[1:3] = 100.0
    rows, plan = dispatch(x[0], mixture.gate(x[0]))
    assert plan.load_E.tolist() == [0, 200, 200, 0, 0, 0]
    assert rows.shape == (400, config.hidden_size)
    assert_close(mixture(x), mixture_by_hand(mixture, x[0])[None], atol=1e-5, rtol=1e-4)


@given(sparse_configs(), st.integers(1, 9))
def test_combine_undoes_dispatch(config: ModelConfig, tokens):
    x = random(tokens, config.hidden_size)
    routes = filled(config).gate(x)
    rows, plan = dispatch(x, routes)
    assert_close(combine(rows, plan), x * routes.weight_TK.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_shared_experts_are_one_wide_feed_forward(shared):
    mixture = MixtureOfExperts(small("deepseek_v3", n_shared_experts=shared))
    if shared:
        assert mixture.shared_experts.gate_proj.weight.shape == (7 * shared, 24)
    else:
        assert mixture.shared_experts is None


@pytest.mark.parametrize("part", ["", "down_proj"])
@pytest.mark.parametrize(
    "when",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_shared_experts_that_are_watched_are_called(part, when):
    mixture, x = filled(small("deepseek_v3", n_shared_experts=1)), random(1, 5, 24).requires_grad_()
    unwatched, seen = mixture(x), []
    watched = mixture.shared_experts.get_submodule(part)
    getattr(watched, when)(lambda module, *_: seen.append(module))
    y = mixture(x)
    y.sum().backward()
    assert_close(y, unwatched)
    assert seen == [watched]


def test_shared_experts_that_nobody_watches_join_the_routed_ones(monkeypatch):
    mixture, x = filled(small("deepseek_v3", n_shared_experts=1)), random(1, 5, 24)
    apart = mixture.shared_experts(x)
    alone = MixtureOfExperts(small("deepseek_v3", n_shared_experts=0))
    alone.load_state_dict(mixture.state_dict(), strict=False)
    monkeypatch.setattr(SwiGLU, "forward", None)
    assert_close(mixture(x), alone(x) + apart)


def test_shared_experts_of_another_kind_are_called():
    mixture, x = filled(small("deepseek_v3", n_shared_experts=1)), random(1, 5, 24)
    whole = mixture(x)
    apart = mixture.shared_experts(x)
    mixture.shared_experts.gate_proj = torch.nn.Sequential(mixture.shared_experts.gate_proj)
    assert_close(mixture(x), whole)
    mixture.shared_experts = torch.nn.Identity()
    assert_close(mixture(x), whole - apart + x)


def test_narrow_gradients_leave_the_router_itself_exact():
    router = filled(small("deepseek_v3")).gate
    x, results = random(40, 24), []
    for narrow in (False, True):
        router.narrow = narrow
        leaf = x.clone().requires_grad_()
        routes = router(leaf)
        results.append([*vars(routes).values(), torch.autograd.grad(routes.weight_TK.square().sum(), leaf)[0]])
    (*plain, gradient), (*same, rounded) = results
    assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))
    if own_products_faster(narrow=True):
        assert not torch.equal(gradient, rounded)
    assert_close(gradient, rounded, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


def test_routes_are_kept_for_balancing_only_while_training():
    mixture, x = filled(small("deepseek_v3")), random(1, 5, 24)
    mixture.eval()(x)
    assert mixture.routes is None
    mixture.train()(x)
    assert mixture.routes.expert_TK.shape == (5, 2)
    assert_close(mixture.routes.logit_TE.sigmoid(), mixture.routes.score_TE)
    mixture.routes, mixture.keeps_routes = None, False
    mixture(x)
    assert mixture.routes is None
