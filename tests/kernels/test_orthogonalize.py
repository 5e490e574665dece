from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from cadre.kernels.native.library import own_products_faster, training_library
from cadre.kernels.orthogonalize import MuonStep, muon_in_place, muon_reference, orthogonalize, orthogonalize_reference

SIZE = st.integers(1, 70)


@given(st.integers(0, 9), SIZE, SIZE, st.integers(0, 6), st.integers(0, 99))
@example(8, 48, 192, 5, 0)
@example(8, 192, 128, 5, 0)
@example(8, 17, 1, 5, 0)
def test_equals_the_reference_in_float64(batch, rows, cols, steps, seed):
    g = torch.randn(batch, rows, cols, generator=torch.Generator().manual_seed(seed))
    want = orthogonalize_reference(g.double(), steps)
    assert_close(orthogonalize(g, steps).double(), want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", [(4, 12, 30), (4, 30, 12), (4, 20, 20)])
def test_singular_values_come_near_one(shape):
    made = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    values = torch.linalg.svdvals(made)
    # Random matrices' least values are small; five steps lift them as far as the quintic does.
    assert values.max() < 1.3 and values.median() > 0.6


def test_zeros_stay_zeros():
    assert not orthogonalize(torch.zeros(4, 5, 6)).any()


def test_reads_what_is_not_contiguous():
    g = torch.randn(6, 9, 4).mT
    assert_close(orthogonalize(g), orthogonalize_reference(g), atol=1e-5, rtol=1e-4)


def test_factors_of_bfloat16_move_singular_values_little():
    g = torch.randn(6, 40, 72, generator=torch.Generator().manual_seed(2))
    exact, made = orthogonalize_reference(g.double(), 3), orthogonalize(g, 3, narrow=True)
    assert 0 < (made - exact).norm() / exact.norm() < 0.02 or not own_products_faster(narrow=True)
    reference = orthogonalize_reference(g, 3, narrow=True)
    assert 0 < (reference - exact).norm() / exact.norm() < 0.02
    if own_products_faster(narrow=True):
        assert (reference - made).norm() / exact.norm() < 0.004


def steps(shapes: list[tuple[int, ...]], fused: int = 1, seed: int = 0) -> list[MuonStep]:
    generator = torch.Generator().manual_seed(seed)
    return [
        MuonStep(
            *(torch.randn(shape, generator=generator) for _ in range(3)),
            rows=shape[-2] // fused,
            iterations=3 + index % 3,
            beta=0.9 + 0.01 * index,
            keep=0.99,
            rate=-0.1 * (index + 1),
        )
        for index, shape in enumerate(shapes)
    ]


def double(step: MuonStep) -> MuonStep:
    return replace(step, weight=step.weight.double(), gradient=step.gradient.double(), momentum=step.momentum.double())


matrix = st.tuples(SIZE, SIZE)
experts = st.tuples(st.integers(0, 5), st.integers(1, 30).map(lambda half: 2 * half), SIZE)


@pytest.mark.skipif(training_library() is None, reason="no kernels")
@given(st.lists(matrix | experts, min_size=4, max_size=7), st.booleans(), st.booleans(), st.integers(0, 99))
@example([(48, 64), (3, 64, 48), (33, 17), (1, 5), (2, 2, 70)], True, False, 0)
@example([(530, 40), (40, 530), (270, 280), (2, 514, 16)], True, True, 0)
def test_a_whole_step_equals_the_reference_in_float64(shapes, halves, narrow, seed):
    narrow = narrow and own_products_faster(narrow=True)
    fused = 2 if halves and all(len(shape) == 3 for shape in shapes) else 1
    made = steps(shapes, fused, seed)
    want = [double(step) for step in made]
    gradients = [step.gradient.clone() for step in made]
    weights = [step.weight.double() for step in made]
    rounding = [replace(step, weight=step.weight.clone(), momentum=step.momentum.clone()) for step in made]
    muon_reference(want)
    muon_reference(rounding, narrow=True)
    if not muon_in_place(made, narrow):
        assert sum(step.batch for step in made) < torch.get_num_threads()
        return
    for step, exact, alike, gradient, before in zip(made, want, rounding, gradients, weights, strict=True):
        assert_close(step.momentum.double(), exact.momentum, atol=1e-5, rtol=1e-5)
        if narrow:  # as the reference that rounds, but for sums that fall to the other side; both may be a tenth off
            moved = (exact.weight - 0.99 * before).norm() + 1e-9
            assert (step.weight - alike.weight).norm() < 0.05 * moved
        else:
            assert_close(step.weight.double(), exact.weight, atol=3e-4, rtol=1e-3)
        assert torch.equal(step.gradient, gradient)


def test_fused_halves_are_matrices_of_their_own():
    made = steps([(3, 16, 10)], fused=2)
    halves = [made[0].weight[:, part].clone() for part in (slice(8), slice(8, 16))]
    parts = [
        replace(made[0], weight=half, gradient=made[0].gradient[:, part], momentum=made[0].momentum[:, part].clone())
        for half, part in zip(halves, (slice(8), slice(8, 16)), strict=True)
    ]
    muon_in_place(made) or muon_reference(made)
    muon_reference(parts)
    assert_close(made[0].weight, torch.cat(halves, dim=1), atol=1e-5, rtol=1e-4)


def test_steps_in_place_only_where_threads_have_work_and_tensors_lie_in_one_piece():
    few, strided = steps([(4, 4)]), steps([(9, 4, 4)])
    strided[0] = replace(strided[0], gradient=strided[0].gradient.mT)
    before = [step.weight.clone() for step in few + strided]
    assert not muon_in_place(strided)
    assert torch.get_num_threads() == 1 or not muon_in_place(few)
    assert torch.get_num_threads() == 1 or all(torch.equal(s.weight, w) for s, w in zip(few + strided, before, strict=True))
