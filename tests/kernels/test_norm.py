"""The closed-form norm, in C++ and through torch, equals its reference in value and gradient."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.kernels import norm as module
from cadre.kernels.norm import rms_norm, rms_norm_reference


def through_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_kernels_take", lambda *_: False)
        return rms_norm(x, weight, eps)


BACKENDS = [rms_norm, through_torch, rms_norm_reference]


@pytest.mark.parametrize("norm", BACKENDS)
@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), width=st.integers(1, 40), seed=st.integers(0, 999))
def test_value_and_gradient_equal_the_reference(norm: Callable, shape: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, width, generator=generator)
    weight, grad = torch.randn(width, generator=generator), torch.randn(*shape, width, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
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


@pytest.mark.parametrize("norm", BACKENDS)
def test_part_of_a_wider_tensor_with_a_strided_gradient(norm: Callable) -> None:
    """As the latent beside the rotary key; several threads, and rows enough for all of them."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(3, 500, 40, generator=generator, requires_grad=True)
    weight, grad = torch.randn(33, generator=generator, requires_grad=True), torch.randn(500, 3, 33, generator=generator)
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for x, scale in ((wide, weight), (wide.detach().double().requires_grad_(), weight.detach().double().requires_grad_())):
            y = (norm if x.dtype == torch.float32 else lambda x, w, eps: _in_float64(x, w))(x[..., 5:38], scale, 1e-6)
            results.append([y, *torch.autograd.grad(y, (x, scale), grad.to(x.dtype).transpose(0, 1))])
    finally:
        torch.set_num_threads(before)
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=2e-5)


@pytest.mark.parametrize("norm", BACKENDS)
def test_no_rows(norm: Callable) -> None:
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = norm(x, weight, 1e-6)
    y.sum().backward()
    assert y.shape == (0, 8) and weight.grad is not None and (weight.grad == 0).all()
