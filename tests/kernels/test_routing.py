"""The C++ router against autograd in float64; what it chooses, `tests/model/test_experts.py` holds against the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cadre.kernels import routing as module
from cadre.kernels.routing import RoutingRule, balance_terms, choose_experts, top_experts


@st.composite
def rules(draw: st.DrawFn) -> tuple[RoutingRule, int]:
    """With the number of experts."""
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(2, 14))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(8, top_groups * size)))
    sigmoid, normed, scaling = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([1.0, 2.5]))
    return RoutingRule(top_k, groups, top_groups, sigmoid, normed, scaling), groups * size


def through_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "training_kernels_take", lambda *_: False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_autograd(logit_TE: Tensor, expert_TK: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    score_TE = logit_TE.sigmoid() if rule.sigmoid else logit_TE.softmax(dim=-1)
    weight_TK = score_TE.gather(1, expert_TK)
    if rule.normed:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return weight_TK * rule.scaling, score_TE


@given(rules(), st.integers(0, 20), st.integers(0, 999), st.sampled_from(["weight", "score", "both"]))
def test_weights_affinities_and_gradients_equal_float64(rule_and_experts, tokens, seed, through) -> None:
    rule, experts = rule_and_experts
    logit, correction = random(tokens, experts, seed=seed).requires_grad_(), random(experts, seed=seed + 1) / 4
    expert, weight, score = choose_experts(logit, correction, rule)
    exact = logit.detach().double().requires_grad_()
    pairs = list(zip((weight, score), by_autograd(exact, expert, rule), strict=True))
    for ours, truth in pairs:
        assert_close(ours.double(), truth, atol=1e-6, rtol=1e-5)
    used = {"weight": pairs[:1], "score": pairs[1:], "both": pairs}[through]
    sides = [sum((side * random(*side.shape, seed=9).to(side.dtype)).sum() for side in one) for one in zip(*used, strict=True)]
    ours, truth = torch.autograd.grad(sides[0], logit)[0], torch.autograd.grad(sides[1], exact)[0]
    assert_close(ours.double(), truth, atol=1e-5, rtol=1e-4)


@given(rules(), st.integers(1, 20), st.integers(0, 999))
def test_choices_are_the_best_of_the_open_groups(rule_and_experts, tokens, seed) -> None:
    rule, experts = rule_and_experts
    correction = random(experts, seed=seed + 1) / 4
    expert, _, score = choose_experts(random(tokens, experts, seed=seed), correction, rule)
    wanted = score + correction
    by_group = wanted.unflatten(1, (rule.groups, -1))
    worth = by_group.topk(2, dim=-1).values.sum(dim=-1) if rule.sigmoid else by_group.amax(dim=-1)
    closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, worth.topk(rule.top_groups, dim=1).indices, False)
    best = by_group.masked_fill(closed[..., None], -torch.inf).flatten(1).topk(rule.top_k, dim=1).values
    assert torch.equal(wanted.gather(1, expert), best)


def test_of_equals_the_first_are_chosen() -> None:
    rule = RoutingRule(3, 1, 1, True, True, 1.0)
    expert, weight, _ = choose_experts(torch.zeros(1, 40), None, rule)
    assert expert.tolist() == [[0, 1, 2]]
    assert_close(weight, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("sigmoid", [True, False])
def test_nan_and_infinity_choose_experts_that_exist(sigmoid: bool) -> None:
    """A diverged run reports its loss; it must not reach into other memory on the way."""
    rule = RoutingRule(4, 1, 1, sigmoid, True, 1.0)
    for value in (torch.nan, torch.inf, -torch.inf):
        expert, _, _ = choose_experts(torch.full((3, 5), value), None, rule)
        assert ((expert >= 0) & (expert < 5)).all()


def test_extreme_logits_stay_finite() -> None:
    logit = torch.tensor([[-300.0, -200.0, 200.0, 300.0]], requires_grad=True)
    for sigmoid in (True, False):
        _, weight, score = choose_experts(logit, None, RoutingRule(2, 1, 1, sigmoid, True, 1.0))
        (gradient,) = torch.autograd.grad(weight.square().sum() + score.square().sum(), logit)
        assert weight.isfinite().all() and score.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("native", [True, False])
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 20), st.integers(0, 999))
def test_the_greatest_are_those_that_sorting_finds(native: bool, experts: int, count: int, tokens: int, seed: int) -> None:
    count, logit = min(count, experts), random(tokens, experts, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            through_torch(patch)
        found = top_experts(logit, count)
    assert torch.equal(found.sort(dim=1).values, logit.argsort(dim=1, descending=True)[:, :count].sort(dim=1).values)


def test_the_greatest_of_large_logits_are_told_apart() -> None:
    """Where affinities are not: a sigmoid of either is 1."""
    assert top_experts(torch.tensor([[90.0, 80.0, 91.0, 85.0]]), 2).tolist() == [[2, 0]]


def test_of_nan_some_experts_are_the_greatest() -> None:
    found = top_experts(torch.full((3, 5), torch.nan), 4)
    assert ((found >= 0) & (found < 5)).all()


@pytest.mark.parametrize("native", [True, False])
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 70), st.integers(0, 999))
def test_frequencies_met_equal_float64(native: bool, stretches: int, length: int, experts: int, seed: int) -> None:
    score = random(stretches * length, experts, seed=seed).sigmoid().requires_grad_()
    frequency, direction = random(stretches, experts, seed=seed + 1).abs(), random(stretches * length, seed=seed + 2)
    exact = score.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            through_torch(patch)
        ours = balance_terms(score, frequency)
        gradient = torch.autograd.grad(ours, score, direction)[0]
    parts = zip(exact.split(length), frequency.double(), strict=True)
    truth = torch.cat([(part * of_stretch).sum(dim=1) / part.sum(dim=1) for part, of_stretch in parts])
    assert_close(ours.double(), truth, atol=1e-6, rtol=1e-5)
    assert_close(gradient.double(), torch.autograd.grad(truth, exact, direction.double())[0], atol=1e-5, rtol=1e-4)
