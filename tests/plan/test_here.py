import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.plan.here import HEAP_GAPS, Calibration, compare, forecast, kinds
from cadre.plan.shape import Shape
from tests.shapes import small


def measured(**changes) -> Calibration:
    values = dict(
        device="cpu", dtype="float32", threads=2, batch=16, micro_batch=8, seq_len=32, rows=4,
        pass_seconds=1.0, update_seconds=0.5, block_pass_seconds={"dense": 0.2, "sparse": 0.3},
        block_update_seconds={"dense": 0.01, "sparse": 0.04}, process_bytes=1000, growth_bytes=500, kept_bytes=20,
        block_kept_bytes={"dense": 5, "sparse": 10}, block_state_bytes={"dense": 7, "sparse": 70},
        copy_bytes=300, block_copy_bytes={"dense": 4, "sparse": 40},
    )  # fmt: skip
    return Calibration(**{**values, **changes})


def shape(layers: int) -> Shape:
    return Shape.from_config(small("deepseek_v3", num_hidden_layers=layers))


def test_a_step_is_passes_of_all_blocks_and_one_update():
    """4 passes of 4 sequences; 1 dense and 3 sparse blocks, of which one each is in the measured model."""
    made = forecast(shape(4), measured())
    assert made.terms["dense blocks"] == pytest.approx(4 * 0.2)
    assert made.terms["sparse blocks"] == pytest.approx(4 * 3 * 0.3)
    assert made.terms["embedding, head and loss, prediction modules"] == pytest.approx(4 * (1.0 - 0.5))
    assert made.terms["clipping, balance and optimizer"] == pytest.approx(0.5 + 2 * 0.04)
    assert made.seconds_per_step == pytest.approx(sum(made.terms.values()))
    assert made.tokens_per_second == pytest.approx(16 * 32 / made.seconds_per_step)


def test_memory_is_the_process_the_measured_model_and_what_further_blocks_hold():
    made = forecast(shape(4), measured())
    kept = (8 - 4) * 20 + 2 * 8 * 10
    assert made.peak_memory_bytes == round(1000 + 500 + 2 * 70 + 300 + 2 * 40 + HEAP_GAPS * kept)
    assert forecast(shape(4), measured(), process_bytes=3000).peak_memory_bytes == made.peak_memory_bytes + 2000
    assert forecast(shape(4), measured(device="cuda:0")).peak_memory_bytes == 1000 + 500 + 2 * 70 + 300 + 2 * 40 + kept


@given(st.floats(0.5, 3), st.integers(2, 9))
def test_a_model_of_the_measured_blocks_takes_what_was_measured(factor: float, layers: int):
    there = measured(rows=8, batch=8, pass_seconds=factor)
    assert forecast(shape(2), there).seconds_per_step == pytest.approx(factor + 0.5)
    more = forecast(shape(layers), there).seconds_per_step - forecast(shape(2), there).seconds_per_step
    assert more == pytest.approx((layers - 2) * (0.3 + 0.04))


def test_kinds_that_a_model_lacks_are_left_out():
    assert kinds(Shape.from_config(small("llama"))) == {"dense": 2}
    assert kinds(Shape.from_config(small("glm4_moe", first_k_dense_replace=0))) == {"sparse": 2}


def test_decoding_is_what_was_measured():
    assert forecast(shape(2), measured()).decode_tokens_per_second is None
    assert forecast(shape(2), dataclasses.replace(measured(), decode_seconds=0.02)).decode_tokens_per_second == 50


def test_prediction_beside_fact():
    said = {"seconds_per_step": 1.1, "peak_memory_bytes": 900}
    step, memory = compare(said, 1.0, 1000)
    assert (step["name"], step["off"]) == ("seconds_per_step", pytest.approx(0.1))
    assert (memory["measured"], memory["off"]) == (1000, pytest.approx(-0.1))
    assert [row["name"] for row in compare(said, None, 1000)] == ["peak_memory_bytes"]
