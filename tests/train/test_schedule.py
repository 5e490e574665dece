import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.train.recipe import ScheduleSection
from cadre.train.schedule import rate


def factors(total: int, **fields) -> list[float]:
    schedule = ScheduleSection(**fields)
    return [rate(schedule, step, total) for step in range(total)]


@given(
    kind=st.sampled_from(["constant", "cosine", "decay", "steps"]), warmup=st.integers(0, 60), total=st.integers(1, 120),
    final=st.floats(0, 1), share=st.floats(0.001, 1), 
    at=st.lists(st.floats(0.001, 0.999), max_size=3).map(sorted), times=st.floats(0.001, 1),
)  # fmt: skip
def test_rises_to_the_peak_then_never_rises_again(kind, warmup, total, final, share, at, times):
    got = factors(
        total, kind=kind, warmup_steps=warmup, final=final, decay_share=share, step_at=at, step_factor=times
    )  # fmt: skip
    assert all(0 <= factor <= 1 for factor in got)
    assert got[:warmup] == pytest.approx([(step + 1) / warmup for step in range(min(warmup, total))])
    after = got[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    if kind in ("cosine", "decay"):
        assert all(factor >= final - 1e-12 for factor in after)


def test_constant_stays_at_the_peak():
    assert factors(6, kind="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1, 1]


def test_decay_is_constant_then_a_straight_line_to_the_final_rate():
    got = factors(100, kind="decay", warmup_steps=10, decay_share=0.2, final=0.1)
    assert set(got[10:81]) == {1.0}
    assert got[90] == pytest.approx(0.55)
    assert got[99] == pytest.approx(0.1 + 0.9 / 20)  # one step short of the end, which is `final`
    assert factors(100, kind="decay", warmup_steps=50, decay_share=1.0, final=0)[75] == pytest.approx(0.5)


def test_cosine_is_half_way_down_in_the_middle():
    got = factors(110, kind="cosine", warmup_steps=10, final=0.2)
    assert got[60] == pytest.approx(0.6)
    assert got[35] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_steps_multiply_at_their_shares_of_the_run():
    got = factors(100, kind="steps", warmup_steps=10, step_at=[0.6, 0.9], step_factor=0.316)
    assert (got[59], got[60], got[89]) == (1.0, 0.316, 0.316)
    assert got[90] == pytest.approx(0.316**2)
