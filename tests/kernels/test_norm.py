"""The closed-form norm equals its reference in value and gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.kernels.norm import rms_norm, rms_norm_reference


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), width=st.integers(1, 40), seed=st.integers(0, 999))
def test_value_and_gradient_equal_the_reference(shape: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, width, generator=generator)
    weight, grad = torch.randn(width, generator=generator), torch.randn(*shape, width, generator=generator)
    results = []
    for norm, dtype in ((rms_norm, torch.float32), (rms_norm_reference, torch.float64)):
        leaf, scale = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = _in_float64(leaf, scale) if dtype == torch.float64 else norm(leaf, scale, 1e-6)
        results.append([y, *torch.autograd.grad(y, (leaf, scale), grad.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=2e-5, rtol=2e-5)


def _in_float64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad is not None and x.grad.isfinite().all()


def test_bfloat16_keeps_its_statistics_in_float32() -> None:
    x = torch.full((1, 4096), 200.0, dtype=torch.bfloat16)
    y = rms_norm(x, torch.ones(4096), 1e-6)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.ones(1, 4096))
