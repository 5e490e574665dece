"""Numbers as people read them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.units import clock, compact, duration, short, si, size


@given(st.floats(0, 1e30))
def test_scaled_numbers_keep_three_digits(number: float) -> None:
    for text, base in ((short(number), 1000), (si(number, "FLOP"), 1000), (size(number), 1024)):
        digits = re.match(r"[\d,.]+", text)
        assert digits and (number < 1e5 or number > 9e14 or float(digits[0].replace(",", "")) < base)


@given(st.floats(1, 9e26), st.integers(3, 4))
def test_compact_numbers_are_those_they_stand_for(number: float, digits: int) -> None:
    value, prefix = re.fullmatch(r"([\d.]+) ?(\D?)", compact(number, digits, " ")).groups()
    assert float(value) < 1000
    assert float(value) * 1000 ** " kMGTPEZY".index(prefix or " ") == pytest.approx(number, rel=0.6 * 10 ** (1 - digits))


def test_compact_numbers_have_no_zeros_at_their_end() -> None:
    assert [compact(number) for number in (16.5e6, 2e14, 1e15, 999.6, 20)] == ["16.5M", "200T", "1P", "1k", "20"]
    assert compact(3.5e12, 4, " ") == "3.5 T"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(41.6, "42 s"), (59.7, "1 min 00 s"), (358.4, "5 min 58 s"), (3599.6, "1 h 00 min"), (200_000, "2 d 8 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 90, 5400)] == ["0:00", "1:00", "1:30", "1:30:00"]
