import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.train.loads import dead_experts, effective_share, evenness, load_ratio, max_violation

loads = st.lists(st.integers(0, 50), min_size=1, max_size=16).filter(any)


@given(loads)
def test_every_measure_is_its_formula(load):
    mean, total = sum(load) / len(load), sum(load)
    assert load_ratio(load).tolist() == pytest.approx([x / mean for x in load])
    assert max_violation(load) == pytest.approx(max(load) / mean - 1)
    entropy = -sum(x / total * math.log(x / total) for x in load if x)
    assert evenness(load) == pytest.approx(entropy / math.log(len(load)) if len(load) > 1 else 1)
    assert effective_share(load) == pytest.approx(math.exp(entropy) / len(load))
    assert dead_experts(load) == sum(x < 0.01 * mean for x in load)


@pytest.mark.parametrize("load, violation", [([5, 5, 5], 0), ([9, 0, 0], 2), ([4, 2, 3, 3], 1 / 3)])
def test_max_violation_is_the_excess_of_the_busiest_over_the_mean(load, violation):
    assert max_violation(load) == pytest.approx(violation)


def test_half_the_experts_evenly_used_are_half_effective():
    assert effective_share([7, 7, 0, 0]) == pytest.approx(0.5)
    assert (evenness([3, 0]), evenness([3, 3])) == (0, 1)


def test_an_expert_below_a_hundredth_of_the_mean_is_dead():
    assert dead_experts([[0, 100, 100, 100], [2, 100, 100, 100], [25, 25, 25, 25], [0, 0, 0, 0]]).tolist() == [1, 0, 0, 0]
    assert dead_experts([399, 1, 0]) == 2


def test_layers_are_measured_apart_and_one_without_choices_has_no_measure():
    load = [[1, 3], [0, 0], [2, 2]]
    assert max_violation(load).tolist()[::2] == [0.5, 0] and np.isnan(max_violation(load)[1])
    assert np.isnan(evenness(load)[1]) and np.isnan(load_ratio(load)[1]).all()
