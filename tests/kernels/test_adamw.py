"""AdamW's step with moments of bfloat16, in C++ and through torch, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from cadre.kernels.adamw import AdamWStep, adamw_in_place, adamw_reference


def steps(shapes: list[tuple[int, ...]], seed: int) -> list[AdamWStep]:
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        AdamWStep(
            random(shape), random(shape), random(shape).bfloat16(), random(shape).square().bfloat16(),
            beta1=0.9, beta2=0.95, eps=1e-8, keep=0.99, rate=-0.1 * (1 + index), unbias=1.5,
        )
        for index, shape in enumerate(shapes)
    ]  # fmt: skip


def expected(step: AdamWStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, mean and square, in float64."""
    weight, gradient, mean, square = (t.double() for t in (step.weight, step.gradient, step.mean, step.square))
    mean = step.beta1 * mean + (1 - step.beta1) * gradient
    square = step.beta2 * square + (1 - step.beta2) * gradient**2
    return step.keep * weight + step.rate * mean / (step.unbias * square.sqrt() + step.eps), mean, square


SHAPES = st.lists(st.lists(st.integers(1, 20), max_size=3).map(tuple), min_size=1, max_size=5)


@pytest.mark.parametrize("way", [adamw_in_place, adamw_reference])
@given(SHAPES, st.integers(0, 99))
@example([(2**14 + 3,), (1,), (3 * 2**14,)], 0)
def test_equals_float64(way: Callable[[Sequence[AdamWStep]], None], shapes: list[tuple[int, ...]], seed: int) -> None:
    made = steps(shapes, seed)
    truth, gradients = [expected(step) for step in made], [step.gradient.clone() for step in made]
    way(made)
    for step, (weight, mean, square), gradient in zip(made, truth, gradients, strict=True):
        assert_close(step.weight.double(), weight, atol=1e-5, rtol=1e-5)
        for moment, exact in ((step.mean, mean), (step.square, square)):
            assert moment.dtype == torch.bfloat16
            assert_close(moment.double(), exact, atol=1e-6, rtol=2**-8)
        assert torch.equal(step.gradient, gradient)


def test_tensors_that_do_not_lie_in_one_piece_go_through_torch() -> None:
    (whole,) = steps([(6, 4)], 0)
    turned = replace(whole, **{name: getattr(whole, name).clone().t() for name in ("weight", "gradient", "mean", "square")})
    adamw_in_place([whole])
    adamw_in_place([turned])
    for name in ("weight", "mean", "square"):
        assert_close(getattr(turned, name).t(), getattr(whole, name))
