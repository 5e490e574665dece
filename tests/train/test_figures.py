import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.train.figures import curve_figure, inline_svg, load_colours, load_figure, load_history, series, svg, tick


def loss_records(values: list[float]) -> list[dict]:
    return [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]


def load_record(step: int, load: list[list[float]]) -> dict:
    return {"step": step, "loss": 1.0, "load": load, "load_layers": list(range(3, 3 + len(load)))}


def test_series_leaves_out_what_is_no_number() -> None:
    records = [{"step": 1, "mfu": 0.5}, {"step": 2, "mfu": None}, {"step": 3, "event": "x"}, {"step": 4, "mfu": 1}]
    steps, values = series(records, "mfu")
    assert steps.tolist() == [1, 4] and values.tolist() == [0.5, 1]
    assert series([], "mfu")[0].size == 0


@settings(deadline=None)  # the first example imports matplotlib
@given(steps=st.integers(1001, 5000), data=st.data())
def test_a_long_curve_is_thinned_without_losing_a_spike(steps: int, data: st.DataObject) -> None:
    values = [3.0] * steps
    spike = data.draw(st.integers(0, steps - 1))
    values[spike] = 50.0
    raw = curve_figure(loss_records(values)).axes[0].lines[0]
    assert len(raw.get_xdata()) <= 1000
    assert (spike + 1, 50.0) in set(zip(raw.get_xdata(), raw.get_ydata(), strict=True))


def test_the_smoothed_curve_follows_the_fall_and_averages_the_noise() -> None:
    rng = np.random.default_rng(0)
    clean = [3 + 5 * math.exp(-step / 60) for step in range(2000)]
    noisy = [value + 0.3 * rng.normal() for value in clean]
    smooth = curve_figure(loss_records(noisy)).axes[0].lines[1]
    points = {int(x): y for x, y in zip(smooth.get_xdata(), smooth.get_ydata(), strict=True)}
    late = [abs(y - clean[x - 1]) for x, y in points.items() if x > 100]
    assert max(late) < 0.25
    assert smooth.get_ydata()[0] == pytest.approx(noisy[0])


def test_load_history_averages_columns_and_bridges_gaps() -> None:
    skewed, even = [[0.75, 0.25]], [[0.5, 0.5]]
    steps = [*range(1, 251), *range(750, 1001)]
    history = load_history([load_record(step, skewed if step <= 250 else even) for step in steps])
    assert history is not None
    assert (history.first_step, history.last_step, history.layers) == (1, 1000, [3])
    assert history.ratio.shape == (200, 1, 2)
    assert np.allclose(history.ratio[:140, 0], [1.5, 0.5])  # the gap shows the last known load
    assert np.allclose(history.ratio[150:, 0], 1)
    assert load_history(loss_records([1.0])) is None


def test_one_record_is_enough_for_every_picture() -> None:
    record = load_record(7, [[0.5, 0.5], [1.0, 0.0]]) | {"mtp_loss": [2.0], "max_vio": [0.0, 1.0]}
    assert "Layer 4" in svg(load_figure([record]))
    assert "Training loss" in svg(curve_figure([record, {"step": 7, "bits_per_byte": 2.0}]))


def test_the_last_score_is_of_other_text_and_stands_beside_the_curve() -> None:
    scores = [(0, 4.2, False), (5, 3.5, False), (10, 3.4, False), (10, 3.0, True)]
    records = loss_records([3.0]) + [{"step": step, "bits_per_byte": score, "final": final} for step, score, final in scores]
    curve, ring = curve_figure(records).axes[1].lines
    assert (curve.get_xdata().tolist(), curve.get_ydata().tolist()) == ([0, 5, 10], [4.2, 3.5, 3.4])
    assert (ring.get_xdata().tolist(), ring.get_ydata().tolist(), ring.get_linestyle()) == ([10], [3.0], "None")


def test_pictures_without_data_are_refused() -> None:
    with pytest.raises(UsageError, match="dense"):
        load_figure(loss_records([1.0]))
    with pytest.raises(UsageError, match="no training loss"):
        curve_figure([{"step": 1, "event": "stopped", "message": ""}])


def test_svg_is_reproducible_and_holds_text_not_outlines() -> None:
    records = loss_records([3.0, 2.5, 2.0])
    assert svg(curve_figure(records)) == svg(curve_figure(records))
    assert ">Training loss, nats per token</text>" in svg(curve_figure(records))


def test_inline_svg_takes_the_page_width_and_escapes_its_label() -> None:
    text = inline_svg(curve_figure(loss_records([3.0, 2.0])), "loss", '"><script>')
    head = text[: text.index(">")]
    assert "width=" not in head and "height=" not in head and "viewBox=" in head
    assert "<script" not in text and "<style" not in text
    assert 'id="loss-figure_1"' in text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (250, "250"), (1500, "1,500"), (20_000, "20,000"), (200_000, "200k"), (2.5e6, "2.5M")]
)
def test_tick(value: float, text: str) -> None:
    assert tick(value) == text


def test_load_colours_are_blank_at_balance_and_opposite_beside_it() -> None:
    starved, balanced, double, more, unknown = load_colours([0, 1, 2, 5, np.nan])
    assert balanced[3] == unknown[3] == 0
    assert starved[3] == double[3] == 1
    assert starved[2] > starved[0] and double[0] > double[2]
    assert (double == more).all()
