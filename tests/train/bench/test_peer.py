import pickle
import sys

import pytest
import torch

from cadre.errors import RunError, UsageError
from cadre.plan.count import count
from cadre.train.bench import peer as module
from cadre.train.bench import worker
from cadre.train.bench.peer import Mode, PeerStep, bench_peer, comparable, modes, peer_step, selected_bytes
from cadre.train.bench.worker import ours
from tests.shapes import FAMILIES, small
from tests.workers import Here, Scripted

EAGER = Mode("eager", "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peer_is_the_same_shape_and_its_step_trains_it(family):
    config = small(family)
    mode = EAGER if config.has_experts else Mode(None, "float32")
    step = PeerStep(config, mode, batch=2, seq_len=8, device=torch.device("cpu"))
    assert sum(value.numel() for value in step.model.state_dict().values()) == count(config).total_parameters
    before = {name: value.clone() for name, value in step.model.named_parameters() if value.numel()}
    assert step() > 0
    after = dict(step.model.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype, weights", [("bfloat16", torch.bfloat16), ("autocast", torch.float32)])
def test_a_mode_is_what_the_peer_computes_in(experts, dtype, weights):
    seen = set()
    config = small("deepseek_v3", hidden_size=32, moe_intermediate_size=16)  # grouped products take rows of 16 bytes only
    step = PeerStep(config, Mode(experts, dtype), batch=1, seq_len=4, device=torch.device("cpu"))
    step.model.lm_head.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    assert step() > 0
    assert step.model.lm_head.weight.dtype == weights and seen == {torch.bfloat16}
    assert step.model.config._experts_implementation == experts and step.model.config._attn_implementation == "sdpa"


def test_what_is_built_in_another_process_can_travel():
    config = small("deepseek_v3", num_nextn_predict_layers=1)
    shape = {"batch": 1, "seq_len": 4}
    for build in (peer_step(comparable(config), EAGER, **shape), ours(config, **shape, dtype=torch.float32)):
        assert pickle.loads(pickle.dumps(build))()() > 0


def test_multi_token_prediction_is_left_out_on_both_sides():
    config = comparable(small("deepseek_v3", num_nextn_predict_layers=2))
    assert config == small("deepseek_v3")
    only_in_module = small("deepseek_v3", num_nextn_predict_layers=1, first_k_dense_replace=2)
    assert only_in_module.has_experts and not comparable(only_in_module).has_experts
    assert {mode.experts for mode in modes(comparable(only_in_module))} == {None}


def test_batched_products_copy_the_weights_of_each_choice():
    config = small("deepseek_v3", num_hidden_layers=3)  # two sparse layers, hidden 24, two of 7 wide
    assert selected_bytes(config, Mode("batched_mm", "autocast"), 10) == 2 * 10 * 2 * (3 * 24 * 7) * 4
    assert selected_bytes(config, Mode("batched_mm", "bfloat16"), 10) == 2 * 10 * 2 * (3 * 24 * 7) * 2
    assert selected_bytes(config, EAGER, 10) == 0


@pytest.fixture
def scripted(monkeypatch):
    """Runs the comparison with given seconds: by mode for transformers, for ours a second a step."""

    def run(by_mode, free=2**40, **changes):
        def seconds(build):
            return by_mode(build.args[1]) if isinstance(build.args[1], Mode) else [9.0, 9.0, 1.0, 1.0]

        for owner in (module, worker):
            monkeypatch.setattr(owner, "Worker", Scripted)
        monkeypatch.setattr(Scripted, "seconds", staticmethod(seconds))
        monkeypatch.setattr(Here, "turns", [])
        monkeypatch.setattr(module, "free_bytes", lambda device: free)
        rates = iter([10.0, 40.0])
        monkeypatch.setattr(module, "gemm_flops_per_second", lambda *_: next(rates))
        notes = []
        found = bench_peer(small("deepseek_v3", num_nextn_predict_layers=1),
                           **{"batch": 2, "seq_len": 8, "steps": 2, "dtype": torch.float32, "note": notes.append,
                              **changes})  # fmt: skip
        return found, notes

    return run


def test_the_fastest_mode_is_found_and_runs_in_turn_with_ours(scripted):
    def by_mode(mode):
        if mode.dtype == "bfloat16":
            return RunError(f"transformers ({mode}): no kernel")
        first = {"eager": 5.0, "grouped_mm": 4.0, "batched_mm": 11.0}[mode.experts] + (mode.dtype == "autocast") / 2
        return [first, first - 1, *[first - 1] * 9]

    found, notes = scripted(by_mode)
    assert found["peer"]["mode"] == {"experts": "grouped_mm", "dtype": "float32"}
    assert (found["peer"]["step_seconds_median"], found["ours"]["step_seconds_median"]) == (3.0, 1.0)
    assert found["speed_ratio"] == 3.0 and found["memory_ratio"] == 1.0
    name = "transformers (grouped_mm, float32)"
    assert Here.turns[-8:] == [name, "cadre"] * 4
    tried = {name: Here.turns[:-8].count(name) for name in Here.turns[:-8]}
    # The slow one is not waited for, nor asked twice, nor one that failed.
    assert tried == {f"transformers ({mode})": 1 if mode.experts == "batched_mm" or mode.dtype == "bfloat16" else 2
                     for mode in modes(small("deepseek_v3"))}  # fmt: skip
    probe = {(p["experts"], p["dtype"]): p for p in found["probe"]}
    assert probe["eager", "autocast"]["seconds"] == 4.5
    assert "not done within 6.0" in probe["batched_mm", "float32"]["reason"]  # twice the fastest, which took 3
    assert "no kernel" in probe["eager", "bfloat16"]["reason"]
    flops = count(small("deepseek_v3"), context=8).training_flops_per_token
    assert found["ours"]["mfu"] == pytest.approx(16 * flops / 40.0) and found["peer"]["training_flops_per_token"] == flops
    assert notes[0] == "probing transformers: eager, float32" and notes[-1].endswith("4 of 4 steps each")


def test_a_mode_that_would_fill_the_memory_is_not_tried(scripted):
    found, _ = scripted(lambda mode: 1.0, free=2**10)
    tried = {p["experts"]: p for p in found["probe"]}
    assert "of weights" in tried["batched_mm"]["reason"] and "seconds" in tried["eager"]
    assert not any("batched_mm" in name for name in Here.turns)


def test_a_peer_that_runs_in_no_mode_is_one_line(scripted):
    with pytest.raises(RunError, match="no mode of transformers ran this shape; the last one: out of luck"):
        scripted(lambda mode: RunError("out of luck"))


def test_a_missing_peer_is_one_line(monkeypatch, scripted):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="--peer transformers: it is not installed here"):
        scripted(lambda mode: 1.0)


def test_a_sequence_beyond_the_context_is_refused_before_anything_runs(scripted):
    with pytest.raises(UsageError, match="--seq 65"):
        scripted(lambda mode: 1.0, seq_len=65)
    assert Here.turns == []
