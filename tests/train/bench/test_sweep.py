import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.errors import RunError
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.train.bench import sweep as module
from cadre.train.bench import worker
from cadre.train.bench.sweep import bench_sweep, exponent, growth, points, scaled
from tests.shapes import configs, small
from tests.workers import Here, Scripted


@given(st.floats(-3, 3), st.floats(0.01, 100), st.lists(st.integers(1, 9999), min_size=2, max_size=9, unique=True))
def test_the_exponent_of_a_power_law_is_its_power(power, factor, xs):
    assert exponent(xs, [factor * x**power for x in xs]) == pytest.approx(power, abs=1e-6)


def test_an_exponent_needs_two_places():
    assert exponent([], []) is None and exponent([3], [4]) is None and exponent([3, 3], [4, 5]) is None


@given(configs(), st.sampled_from([0.5, 0.75, 1.5, 2, 4]))
def test_a_scaled_model_can_be_built_and_keeps_heads_depth_and_experts(config, factor):
    wide = scaled(config, factor)
    kept = ("num_hidden_layers", "n_routed_experts", "num_experts_per_tok", "head_dim", "qk_nope_head_dim", "v_head_dim")
    assert all(getattr(wide, name) == getattr(config, name) for name in kept)
    with torch.device("meta"):
        Transformer(wide)


def test_twice_as_wide_is_twice_everything_that_is_width():
    config = small("deepseek_v3", hidden_size=64, moe_intermediate_size=32, kv_lora_rank=16, intermediate_size=96)
    wide = scaled(config, 2)
    names = ("hidden_size", "moe_intermediate_size", "kv_lora_rank", "intermediate_size", "num_attention_heads")
    assert all(getattr(wide, name) == 2 * getattr(config, name) for name in names)


def test_the_points_lie_on_their_axes():
    config = small("deepseek_v3")
    every = points(config, 16, 512)
    axes = {axis: [p for p in every if p.axis == axis] for axis in ("experts", "width", "sequence", "batch")}
    assert len(every) == sum(map(len, axes.values()))
    assert [p.value for p in axes["experts"]] == [8, 16, 32, 64, 128, 256]
    assert [p.value for p in axes["sequence"]] == [256, 512, 1024, 2048, 4096, 8192]
    assert [p.value for p in axes["batch"]] == [2, 4, 8, 16, 32]
    assert {p.batch * p.seq_len for p in axes["experts"] + axes["width"] + axes["sequence"]} == {16 * 512}
    active = {count(p.config).active_parameters - count(p.config).parts["router"] for p in axes["experts"]}
    assert len(active) == 1
    for p in every:
        assert p.seq_len <= p.config.max_position_embeddings
        assert p.flops == count(p.config, context=p.seq_len).training_flops_per_token * p.batch * p.seq_len
    quick = points(config, 16, 512, quick=True)
    assert len(quick) < len(every) / 1.9 and {p.axis for p in quick} == set(axes)
    assert {(p.axis, p.value, *p.key) for p in quick} <= {(p.axis, p.value, *p.key) for p in every}


def test_a_dense_model_has_no_experts_to_vary():
    assert {p.axis for p in points(small("llama"), 2, 256)} == {"width", "sequence", "batch"}


def test_experts_start_from_as_many_as_a_token_takes():
    config = small("deepseek_v3", n_routed_experts=64, num_experts_per_tok=9)
    assert [p.value for p in points(config, 1, 8) if p.axis == "experts"] == [16, 32, 64, 128, 256]


def rows(time, memory=1.0):
    return [
        dict(value=x, step_seconds_median=x**time, flops=x**1.5, memory_bytes=1000 * x**memory, total_parameters=x**2)
        for x in (2, 4, 8)
    ]


@pytest.mark.parametrize("time, faster", [(1.4, False), (1.54, False), (1.56, True)])
def test_growth_names_what_grows_faster_than_its_arithmetic(time, faster):
    found = growth(rows(time, memory=0.5))
    assert found["faster"] is faster
    for powers in (found["exponents"], found["last_exponents"]):
        assert powers == pytest.approx(dict(seconds=time, flops=1.5, memory=0.5, parameters=2))


def test_the_last_two_points_speak_for_themselves():
    bent = rows(1.0)
    bent[-1]["step_seconds_median"] *= 4
    found = growth(bent)
    assert found["last_exponents"]["seconds"] == pytest.approx(3) and found["exponents"]["seconds"] == pytest.approx(2)
    assert growth(bent[:1])["faster"] is None


def bench(config, **changes):
    return bench_sweep(config, **{"batch": 2, "seq_len": 256, "steps": 1, "dtype": torch.float32, "quick": True,
                                  "note": lambda text: None, **changes})  # fmt: skip


def test_each_point_is_measured_once_and_one_that_fails_is_named(monkeypatch):
    built, notes = [], []

    def seconds(build):
        config, batch, seq_len, *_ = build.args
        built.append((config.model_dump_json(), batch, seq_len))
        if config.n_routed_experts == 128:
            return RunError("its process died")
        return 1e-9 * count(config, context=seq_len).training_flops_per_token * batch * seq_len

    monkeypatch.setattr(worker, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "seconds", staticmethod(seconds))
    found = bench(small("deepseek_v3", n_routed_experts=32), note=notes.append)
    assert len(built) == len(set(built)) == len(notes)
    axes = found["axes"]
    assert sum(len(axis["points"]) for axis in axes.values()) > len(built)
    *fine, failed = axes["experts"]["points"]
    assert failed["reason"] == "its process died" and failed["value"] == 128 and len(fine) == 2
    assert "step_seconds_median" not in failed
    for axis in ("experts", "width", "batch"):
        powers = axes[axis]["exponents"]
        assert powers["seconds"] == pytest.approx(powers["flops"]) and axes[axis]["faster"] is False
    assert axes["batch"]["exponents"]["flops"] == pytest.approx(1)
    assert fine[0]["memory_bytes"] == 2000 and fine[0]["peak_memory_bytes"] == 3000


def test_real_steps_are_swept(monkeypatch):
    monkeypatch.setattr(worker, "Worker", Here)
    for name in ("EXPERTS", "LENGTHS"):
        monkeypatch.setattr(module, f"QUICK_{name}", (4, 8))
    found = bench(small("deepseek_v3"), seq_len=8)
    assert set(found["axes"]) == {"experts", "width", "sequence", "batch"}
    for axis in found["axes"].values():
        assert all(math.isfinite(power) for power in axis["exponents"].values() if power is not None)
        assert all(point["step_seconds_median"] > 0 for point in axis["points"])
