"""Each balance loss against its paper's formula, one sum at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.kernels.routing import choose_experts_reference
from cadre.model.experts import Router, Routes
from cadre.train.balance_losses import BatchLoss, GlobalLoss, RecordedRoutes, RouterZLoss, SequenceLoss
from tests.shapes import small

V3 = dict(n_routed_experts=6, num_experts_per_tok=2)
GROUPED = dict(n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=1)


def record(kind: str, sequences: int, length: int, seed: int, *, layer: int = 0, **changes) -> RecordedRoutes:
    """Routes of random tokens through a router whose bias and groups matter. Gradients are taken at the logits."""
    router = Router(small(kind, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(std=0.4, generator=generator)
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(std=0.5, generator=generator)
    x = torch.randn(sequences * length, router.weight.shape[1], generator=generator)
    logit_TE = (x @ router.weight.T).detach().requires_grad_()
    chosen = choose_experts_reference(logit_TE, router.e_score_correction_bias, router.rule)
    return RecordedRoutes(layer, router, Routes(*chosen, logit_TE), sequences, 1.0)


def v3_by_hand(parts: list[tuple[RecordedRoutes, range]]) -> torch.Tensor:
    """Equations 17 to 20 without alpha over one stretch of tokens, which may lie in several micro-batches. Equation 18 asks
    whether expert i is among the K highest affinities; V2's equation 24 whether it was selected."""
    router = parts[0][0].router
    experts, choices = len(router.weight), router.rule.top_k
    tokens = [(recorded, t) for recorded, stretch in parts for t in stretch]
    total = torch.zeros(())
    for i in range(experts):
        f, p = 0.0, torch.zeros(())
        for recorded, t in tokens:
            score = recorded.routes.score_TE[t]
            if router.rule.sigmoid:
                chosen = sorted(range(experts), key=lambda e: -float(score[e].detach()))[:choices]
            else:
                chosen = recorded.routes.expert_TK[t].tolist()
            f += experts / (choices * len(tokens)) * (i in chosen)
            p = p + score[i] / score.sum() / len(tokens)
        total = total + f * p
    return total


def same(fast: torch.Tensor, slow: torch.Tensor, *recorded: RecordedRoutes) -> None:
    torch.testing.assert_close(fast, slow)
    for one in recorded:
        gradients = [torch.autograd.grad(v, one.routes.logit_TE, retain_graph=True)[0] for v in (fast, slow)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


kinds = st.sampled_from([("deepseek_v3", V3), ("deepseek_v3", GROUPED), ("deepseek_v2", V3), ("deepseek_v2", GROUPED)])


@given(kinds, st.integers(1, 3), st.integers(1, 5), st.integers(0, 999))
def test_sequence_wise_loss_is_the_reports_formula(kind, sequences, length, seed):
    recorded = record(kind[0], sequences, length, seed, **kind[1])
    stretches = [range(s * length, (s + 1) * length) for s in range(sequences)]
    same(SequenceLoss(1.0)(recorded), sum(v3_by_hand([(recorded, s)]) for s in stretches) / sequences, recorded)


@given(kinds, st.integers(1, 3), st.integers(1, 5), st.integers(0, 999))
def test_batch_wise_loss_is_the_same_over_all_that_is_computed_at_once(kind, sequences, length, seed):
    recorded = record(kind[0], sequences, length, seed, **kind[1])
    same(BatchLoss(1.0)(recorded), v3_by_hand([(recorded, range(sequences * length))]), recorded)


@given(kinds, st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_global_loss_is_the_same_over_all_micro_batches(kind, parts, length, seed):
    recorded = [record(kind[0], 2, length, seed + part, layer=1, **kind[1]) for part in range(parts)]
    loss = GlobalLoss(1.0, layers=2)
    for one in recorded:
        loss.collect_loads(one)
    same(sum(loss(one) for one in recorded) / parts, v3_by_hand([(one, range(2 * length)) for one in recorded]), *recorded)
    loss.reset()
    same(loss(recorded[0]), v3_by_hand([(recorded[0], range(2 * length))]), recorded[0])


def test_the_choices_that_count_are_of_the_bare_affinities():
    """Equation 18 knows neither bias nor groups: choices that these alone have evened out do not satisfy the loss."""
    recorded = record("deepseek_v3", 1, 1, 0, **V3)
    routes = recorded.routes
    routes.score_TE = torch.tensor([[0.9, 0.8, 0.1, 0.1, 0.1, 0.1]] * 3)
    routes.logit_TE = routes.score_TE.logit()
    routes.expert_TK = torch.tensor([[0, 1], [2, 3], [4, 5]])  # as a bias might have it
    assert SequenceLoss(1.0)(recorded) == pytest.approx(3 * 1.7 / 2.1)
    recorded.router.rule = replace(recorded.router.rule, sigmoid=False)
    assert SequenceLoss(1.0)(recorded) == pytest.approx(1)


def test_losses_are_one_at_balance_and_differ_in_where_they_want_it():
    score = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]])
    router = Router(small("deepseek_v3", n_routed_experts=4))
    recorded = RecordedRoutes(0, router, Routes(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), score, score.logit()), 2, 1.0)
    assert SequenceLoss(1.0)(recorded) == pytest.approx(1.8)  # balanced over the batch, but not within its two sequences
    assert BatchLoss(1.0)(recorded) == pytest.approx(1)


@given(kinds, st.integers(1, 7), st.integers(0, 99))
def test_router_z_loss_is_st_moes_equation_5(kind, tokens, seed):
    recorded = record(kind[0], 1, tokens, seed, **kind[1])
    rows = recorded.routes.logit_TE
    slow = sum(torch.log(sum(torch.exp(x) for x in row)) ** 2 for row in rows) / tokens
    same(RouterZLoss(1.0)(recorded), slow, recorded)
