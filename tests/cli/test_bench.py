import json
import sys

import pytest

from cadre.cli import main as module
from cadre.plan.count import count
from tests.shapes import small

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
