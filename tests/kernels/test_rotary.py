"""Turning halves of heads, in C++ and through torch, is a rotation of pairs in value and gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.kernels import rotary as module
from cadre.kernels.rotary import rotate_halves, rotate_halves_reference


def through_torch(x, turn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_kernels_take", lambda *_: False)
        return rotate_halves(x, turn)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(positions, rotary, magnitude=1.3):
    angle = 6 * torch.rand(positions, rotary // 2, generator=torch.Generator().manual_seed(positions))
    return torch.polar(torch.full_like(angle, magnitude), angle)


def by_hand(x, turn):
    """One pair after the other, in float64."""
    half, out = turn.shape[1], x.clone()
    for i in range(half):
        cos, sin = turn.real[:, i, None].double(), turn.imag[:, i, None].double()
        out[..., i] = x[..., i] * cos - x[..., half + i] * sin
        out[..., half + i] = x[..., half + i] * cos + x[..., i] * sin
    return out


@pytest.mark.parametrize("rotate", [rotate_halves, through_torch])
@given(
    sizes=st.tuples(*(st.integers(1, 5),) * 3), pairs=st.integers(1, 37), still=st.integers(0, 9), seed=st.integers(0, 99)
)  # fmt: skip
def test_value_and_gradient(rotate, sizes, pairs, still, seed):
    x, turn = random(*sizes, 2 * pairs + still, seed=seed), table(sizes[1], 2 * pairs)
    grad, sides = random(*x.shape, seed=seed + 1), []
    for function, dtype in ((rotate, torch.float32), (by_hand, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf, turn)
        sides.append((y, *torch.autograd.grad(y, leaf, grad.to(dtype))))
    for ours, exact in zip(*sides, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_lie_apart_and_the_gradient_of_a_sum(threads):
    """Heads that are part of a wider projection; a gradient that is one number seen everywhere; rows enough for all threads."""
    wide, turn = random(3, 70, 5 * 24 + 7), table(70, 24)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sides = []
        for function in (rotate_halves, rotate_halves_reference):
            leaf = wide.clone().requires_grad_()
            y = function(leaf[..., 7:].unflatten(-1, (5, 24)), turn)
            sides.append((y, *torch.autograd.grad(y.sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for ours, reference in zip(*sides, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_other_dtypes_keep_theirs():
    x, turn = random(1, 4, 2, 8).to(torch.bfloat16), table(4, 6)
    y = rotate_halves(x, turn)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), by_hand(x.double(), turn), atol=0.03, rtol=0.01)
    assert torch.equal(y[..., 6:], x[..., 6:])
