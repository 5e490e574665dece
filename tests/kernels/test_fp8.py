"""Experts' products in FP8: what is rounded and how far, the three products by the reference, and gradients through it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cadre.kernels.fp8 import (
    ELEMENT,
    RUN,
    exponent_of,
    grouped_linear_fp8,
    grouped_linear_fp8_reference,
    power_of_two,
    rounded_blocks,
    rounded_rows,
)
from cadre.kernels.grouped import expert_swiglu, expert_swiglu_reference
from tests.shapes import small


def near(x: Tensor, rounded: Tensor, most: Tensor) -> bool:
    """Within half a last place of an element, or of the least numbers under the scale of `most`."""
    least = power_of_two(exponent_of(most)) * 2.0**-10
    return bool(((rounded - x).abs() <= torch.maximum(x.abs() / 16, least)).all())


@given(st.integers(1, 5), st.integers(1, 300), st.integers(-30, 30), st.integers(0, 99))
def test_rows_keep_their_elements_to_a_sixteenth(rows: int, width: int, size: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    rounded = rounded_rows(x)
    for run in range(0, width, RUN):
        part = x[:, run : run + RUN]
        assert near(part, rounded[:, run : run + RUN], part.abs().amax(1, keepdim=True))
    assert torch.equal(rounded, rounded_rows(rounded))
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_a_block_of_a_weight_has_one_scale() -> None:
    """A large number costs the small ones of its own block, not those of the others."""
    w = torch.full((2, 130, 260), 2.0**-12)
    w[0, 0, 0] = 448.0
    rounded = rounded_blocks(w)
    changed = rounded != w
    assert changed[0, :128, :128].sum() == 128 * 128 - 1
    assert not changed[0, 128:].any() and not changed[0, :, 128:].any() and not changed[1].any()


@pytest.mark.parametrize("most, scale", [(448.0, 1.0), (449.0, 2.0), (0.875, 2.0**-9), (1.0, 2.0**-8), (3e38, 2.0**120)])
def test_the_scale_is_the_least_that_holds_the_largest(most: float, scale: float) -> None:
    assert power_of_two(exponent_of(torch.tensor([most]))).item() == scale
    assert torch.tensor(most / scale).to(ELEMENT).float().isfinite()


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(2, 200)
    x[0, 3], x[1, 150] = float("nan"), float("inf")
    assert not rounded_rows(x)[0, :RUN].isfinite().any() and not rounded_rows(x)[1, RUN:].isfinite().any()
    assert rounded_rows(x)[1, :RUN].isfinite().all()


def made(load: list[int], K: int, N: int, whole: bool, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if whole:  # numbers that E4M3 holds as they are, under any of these scales
            return torch.randint(-15, 16, shape, generator=random).float()
        return torch.randn(*shape, generator=random)

    R, E = sum(load), len(load)
    return draw(R, K).requires_grad_(), torch.tensor(load), draw(E, N, K).requires_grad_(), draw(R, N)


def products(grouped: object, x: Tensor, load: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
    y = grouped(x, load, w)  # type: ignore[operator]
    return [y, *torch.autograd.grad(y, (x, w), grad)]


def exact(x: Tensor, load: Tensor, w: Tensor) -> Tensor:
    return torch.cat([rows @ w_NK.t() for rows, w_NK in zip(x.split(load.tolist()), w, strict=True)])


LOADS = st.lists(st.integers(0, 200), min_size=1, max_size=4)


@given(LOADS, st.integers(1, 150), st.integers(1, 150), st.integers(0, 99))
def test_numbers_that_fp8_holds_are_multiplied_as_they_are(load: list[int], K: int, N: int, seed: int) -> None:
    tensors = made(load, K, N, whole=True, seed=seed)
    for mine, true in zip(products(grouped_linear_fp8, *tensors), products(exact, *tensors), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)


@given(LOADS, st.integers(1, 150), st.integers(1, 150), st.integers(0, 99))
def test_others_to_what_fp8_leaves_of_them(load: list[int], K: int, N: int, seed: int) -> None:
    """Each factor is off by a sixteenth at most, or by next to nothing of the largest in its run."""
    x, load_E, w, grad = made(load, K, N, whole=False, seed=seed)
    sizes = products(exact, x.detach().abs().requires_grad_(), load_E, w.detach().abs().requires_grad_(), grad.abs())
    sides = (products(way, x, load_E, w, grad) for way in (grouped_linear_fp8_reference, exact))
    for mine, true, size in zip(*sides, sizes, strict=True):
        assert ((mine - true).abs() <= (2 / 16 + 1 / 256) * size + 1e-3).all()


def test_gradients_have_their_tensors_dtypes() -> None:
    x, load, w, grad = made([3, 0, 5], 16, 24, whole=False, seed=0)
    x, w = x.detach().bfloat16().requires_grad_(), w.detach().bfloat16().requires_grad_()
    y, grad_x, grad_w = products(grouped_linear_fp8, x, load, w, grad.bfloat16())
    assert y.dtype == grad_x.dtype == grad_w.dtype == torch.bfloat16
    assert not grad_w[1].any()


def test_experts_in_fp8_are_the_experts_to_a_few_percent() -> None:
    torch.manual_seed(0)
    x, load = torch.randn(40, 24), torch.tensor([11, 0, 29])
    gate_up, down = torch.randn(3, 32, 24) / 5, torch.randn(3, 24, 16) / 4
    true, mine = expert_swiglu_reference(x, load, gate_up, down), expert_swiglu(x, load, gate_up, down, fp8=True)
    assert 0 < (mine - true).norm() <= 0.1 * true.norm()


def test_a_model_computes_them_where_it_is_told_to() -> None:
    from cadre.model.transformer import Transformer

    model = Transformer(small("deepseek_v3")).initialize(0)
    ids = torch.arange(12)[None]
    plain = model(ids)
    model.compute_in(torch.float32, fp8_experts=True)
    rounded = model(ids)
    model.compute_in(torch.float32)
    assert torch.equal(model(ids), plain)
    assert 0 < (rounded - plain).abs().max() < 0.1 * plain.abs().max()
