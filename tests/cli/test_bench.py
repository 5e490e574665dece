import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from cadre.cli import bench_tables, bench_train
from cadre.cli import main as module
from cadre.plan.count import count
from cadre.train.bench import peer, profile, sweep, tax, worker
from tests.shapes import small
from tests.workers import Here

KEYS = {"tokens_per_second", "step_seconds_median", "model_flops_per_second", "gemm_flops_per_second", "mfu",
        "peak_memory_bytes"}  # fmt: skip


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cadre", "bench", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code or 0


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small("deepseek_v3", num_nextn_predict_layers=1).to_hf()))
    return path


def test_json_is_one_object_of_sound_numbers(monkeypatch, capsys, config):
    assert bench(monkeypatch, "--config", config, "--batch", 2, "--seq", 32, "--steps", 3, "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 1
    result = json.loads(shown.out)
    assert result.keys() >= KEYS
    assert all(result[key] > 0 for key in KEYS)
    assert len(result["step_seconds"]) == 3
    assert result["step_seconds_median"] == sorted(result["step_seconds"])[1]
    assert result["tokens_per_second"] == pytest.approx(2 * 32 / result["step_seconds_median"])
    flops = count(small("deepseek_v3", num_nextn_predict_layers=1), context=32).training_flops_per_token
    assert result["model_flops_per_second"] == pytest.approx(result["tokens_per_second"] * flops)
    assert result["mfu"] == pytest.approx(result["model_flops_per_second"] / result["gemm_flops_per_second"])


def test_people_get_lines(monkeypatch, capsys, config):
    assert bench(monkeypatch, "--config", config, "--batch", 1, "--seq", 8, "--steps", 1, "--dtype", "float32") == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("tokens/s", "(float32)", "MFU", "peak memory"))


@pytest.mark.parametrize("content, wanted", [
    (None, "no such file"), ("{", "cannot be read as JSON"), ("[]", "holds list"),
    ('{"model_type": "gpt2"}', "model_type is 'gpt2'"),
    (json.dumps({**small("deepseek_v3").to_hf(), "n_group": 5}), "n_group is 5"),
])  # fmt: skip
def test_a_config_that_cannot_be_built_is_refused_in_one_line(monkeypatch, capsys, tmp_path, content, wanted):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert bench(monkeypatch, "--config", path) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"cadre: {path}: ") and wanted in shown.err and shown.err.count("\n") == 1


@pytest.fixture
def here(monkeypatch):
    """Every mode on few and small points, without processes or measured limits of this machine."""
    for owner in (peer, worker):
        monkeypatch.setattr(owner, "Worker", Here)
    monkeypatch.setattr(peer, "modes", lambda config: [peer.Mode("eager", "float32"), peer.Mode("batched_mm", "float32")])
    monkeypatch.setattr(peer, "selected_bytes", lambda config, mode, tokens: 2**50 * (mode.experts == "batched_mm"))
    monkeypatch.setattr(sweep, "LENGTHS", (16, 32))
    monkeypatch.setattr(sweep, "EXPERTS", (8, 16))
    for owner in (peer, profile):
        monkeypatch.setattr(owner, "gemm_flops_per_second", lambda *_: 1e9)
    monkeypatch.setattr(profile, "memory_bytes_per_second", lambda *_: 1e9)


SHAPE = ("--batch", 2, "--seq", 16, "--steps", 1, "--dtype", "float32")
MODES = {
    "peer": (("--peer", "transformers"), {"peer", "ours", "speed_ratio", "memory_ratio", "probe"}, "times as fast"),
    "tax": (("--tax", "--quick"), {"rows"}, "routing tax: at most"),
    "sweep": (("--sweep",), {"axes"}, "than the arithmetic"),
    "fp8": (("--fp8",), {"plain", "fp8", "speed_ratio"}, "a step with experts in FP8 is"),
    "profile": (("--profile",), {"parts", "watched_seconds", "difference"}, "embedding, head and loss"),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_its_json_and_its_lines(monkeypatch, capsys, config, here, mode):
    options, keys, words = MODES[mode]
    assert bench(monkeypatch, "--config", config, *SHAPE, *options, "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 1
    result = json.loads(shown.out)
    assert result.keys() >= keys | {"mode", "batch", "seq_len", "dtype", "threads", "device"} and result["mode"] == mode
    assert bench(monkeypatch, "--config", config, *SHAPE, *options) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and words in shown.out


def test_steps_of_a_mode_are_its_own_unless_given(monkeypatch, config, here):
    taken = []
    for owner, name in ((tax, "bench_tax"), (sweep, "bench_sweep")):
        monkeypatch.setattr(owner, name, lambda shape, steps, **_: taken.append(steps) or {})
    monkeypatch.setattr(bench_tables, "lines", lambda result: [])
    for options in (("--tax",), ("--sweep",), ("--sweep", "--steps", 2)):
        assert bench(monkeypatch, "--config", config, *options) == 0
    assert taken == [8, 3, 2]


@pytest.mark.parametrize("options, line", [
    (("--tax", "--sweep"), "--tax and --sweep exclude each other: choose one"),
    (("--profile", "--peer", "transformers"), "--peer and --profile exclude each other: choose one"),
    (("--quick",), "--quick makes --tax or --sweep shorter: give it with one of them, or else fewer --steps"),
    (("--profile", "--quick"), "--quick makes --tax or --sweep shorter: give it with one of them, or else fewer --steps"),
])  # fmt: skip
def test_modes_that_do_not_go_together_are_refused_in_one_line(monkeypatch, capsys, config, options, line):
    assert bench(monkeypatch, "--config", config, *options) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == f"cadre: {line}\n"


def test_an_unknown_peer_is_refused_with_those_there_are(monkeypatch, capsys, config):
    assert bench(monkeypatch, "--config", config, "--peer", "elephants") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("cadre: Invalid value for '--peer'") and "'transformers'" in shown.err
    assert shown.out == "" and shown.err.count("\n") == 1


def test_a_mode_that_cannot_be_is_one_line(monkeypatch, capsys, tmp_path, config):
    dense = tmp_path / "dense.json"
    dense.write_text(json.dumps(small("llama").to_hf()))
    assert bench(monkeypatch, "--config", dense, "--tax", "--seq", 8) == 2
    assert capsys.readouterr().err.startswith("cadre: --tax: the config has no experts")
    assert bench(monkeypatch, "--config", dense, "--fp8", "--seq", 8) == 2
    assert capsys.readouterr().err == "cadre: --fp8: the model has no experts\n"
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench(monkeypatch, "--config", config, "--peer", "transformers") == 2
    assert capsys.readouterr().err.startswith("cadre: --peer transformers: it is not installed here")


def test_a_point_that_did_not_run_is_named_with_the_reason():
    point = {"value": 8, "batch": 1, "seq_len": 4, "total_parameters": 10**6, "flops": 10**12, "reason": "no room"}
    nothing = {"exponents": {}, "last_exponents": {}, "faster": None}
    shown = bench_tables.lines({"mode": "sweep", "axes": {"experts": {"points": [point], **nothing}}})
    assert "8 did not run: no room" in shown and "too few points for an exponent" in shown
    assert shown[1].split() == ["8", "1", "4", "1.0M", "1.000", "-", "-"]


def test_a_distorted_profile_says_so():
    values = {"mode": "profile", "parts": [], "watched_seconds": 1.2, "step_seconds_median": 1.0, "difference": 0.2, "mfu": 0.5,
              "dtype": "float32"}  # fmt: skip
    assert "differ by more than 5%" in bench_tables.lines({**values, "distorted": True})[-1]
    assert "+20.0%" in bench_tables.lines({**values, "distorted": False})[-1]


ROOT = Path(__file__).parents[2]
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`cadre bench train (.*?)`", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_benchmarks_are_ones_there_are(monkeypatch, command):
    seen = []
    monkeypatch.setattr(bench_train, "_bench", lambda mode, quick: lambda config, **shape: seen.append((config, shape)) or {})
    monkeypatch.setattr(bench_tables, "lines", lambda result: [])
    monkeypatch.chdir(ROOT)
    assert bench(monkeypatch, *shlex.split(command)) == 0
    ((config, shape),) = seen
    assert shape["seq_len"] <= config.max_position_embeddings


def test_the_benchmarks_models_are_as_large_as_they_say():
    small_one, large_one = (count(ROOT / "benchmarks" / f"{name}.json") for name in ("20m", "1b"))
    assert round(small_one.total_parameters / 1e6, 1) == 20.5
    assert round(large_one.total_parameters / 1e9, 2) == 0.96
    assert round(large_one.active_parameters_without_input_embedding / 1e6) == 147
