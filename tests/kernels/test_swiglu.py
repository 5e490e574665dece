from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from cadre.kernels.swiglu import swiglu as fused
from cadre.kernels.swiglu import swiglu_reference


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return fused(torch.cat((gate, up), dim=-1))


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Wide enough to reach both flat ends of the sigmoid.
    return [(6 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for _ in range(2)]


def formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate / (1 + torch.exp(-gate)) * up


@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_value_and_gradient_equal_the_formula_in_float64(shape, seed):
    gate, up = inputs(*shape, seed=seed)
    gate64, up64 = (x.detach().double().requires_grad_() for x in (gate, up))
    want = formula(gate64, up64)
    got = swiglu(gate, up)
    assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    direction = torch.randn(shape)
    got_grads = torch.autograd.grad(got, (gate, up), direction)
    want_grads = torch.autograd.grad(want, (gate64, up64), direction.double())
    for ours, exact in zip(got_grads, want_grads, strict=True):
        assert_close(ours.double(), exact, atol=1e-4, rtol=1e-5)


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, inputs(3, 5, dtype=torch.float64))


def test_halves_of_one_matrix():
    """Gate and up come as the two halves of one product's output."""
    both = torch.randn(7, 10, requires_grad=True)
    fused(both).backward(direction := torch.randn(7, 5))
    apart = [half.detach().clone().requires_grad_() for half in both.chunk(2, dim=-1)]
    swiglu_reference(*apart).backward(direction)
    assert_close(both.grad, torch.cat([half.grad for half in apart], dim=-1))


def test_bfloat16_rounds_and_no_more():
    gate, up = inputs(64, 32, dtype=torch.bfloat16)
    got = swiglu(gate, up)
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), formula(gate.double(), up.double()), atol=1e-2, rtol=2**-7)


def test_extremes_stay_finite():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    got = swiglu(gate, torch.ones(5))
    got.sum().backward()
    assert_close(got, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    assert_close(gate.grad, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
