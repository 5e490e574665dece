"""Who reaches whose loss how much sooner: the arithmetic on curves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.study.results import Curve, sooner, spread


def power_law(steps, scale, flops=1.0, seconds=1.0):
    """A curve whose loss falls by equal amounts in equal factors of steps."""
    return Curve(tuple(steps), tuple(2 - scale * math.log(step) for step in steps), flops, seconds)


def test_the_crossing_is_exact_where_loss_falls_with_the_logarithm():
    curve = power_law([10, 100, 1000], 0.1)
    assert curve.first_step_at(2 - 0.1 * math.log(250)) == pytest.approx(250)
    assert curve.first_step_at(curve.final) == pytest.approx(1000)
    assert curve.first_step_at(curve.final - 1e-9) is None
    # What the first evaluation has reached already counts as reached there, not before.
    assert curve.first_step_at(5.0) == 10


def test_a_bump_counts_from_where_the_loss_was_first_reached():
    curve = Curve((1, 2, 3, 4), (2.0, 1.0, 1.5, 0.9), 1.0, 1.0)
    assert curve.first_step_at(1.0) == 2


@given(st.floats(0.05, 0.2), st.floats(1.01, 1.9), st.floats(0.1, 10), st.floats(0.1, 10))
def test_factors_are_the_ratio_of_costs_to_the_same_loss(scale, gain, flops, seconds):
    steps = range(50, 1001, 50)
    slow, fast = power_law(steps, scale), power_law(steps, scale * gain, flops, seconds)
    factor = sooner(fast, slow)
    # scale gain ln(step) = scale ln(1000)
    step = max(50, math.exp(math.log(1000) / gain))
    assert factor["flops"] == pytest.approx(1000 / step / flops)
    assert factor["seconds"] == pytest.approx(1000 / step / seconds)
    assert sooner(slow, fast) is None


def test_an_arm_reaches_its_own_loss_at_its_end():
    curve = power_law([10, 100], 0.1, 3.0, 2.0)
    assert sooner(curve, curve) == pytest.approx({"flops": 1.0, "seconds": 1.0})


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"mean": 2.0, "least": 1.0, "most": 3.0}
    assert spread([]) is None
