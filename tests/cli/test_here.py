"""`cadre plan --here`: what is measured is asked of `calibrate`; here is what is made of it and what is refused."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from cadre.cli import here
from cadre.cli import main as module
from cadre.plan.here import forecast
from cadre.plan.shape import Shape
from cadre.train.bench import calibrate
from cadre.train.bench.calibrate import Effort, Step, fewest_blocks, measure, with_limits
from cadre.train.recipe import read_recipe
from tests.runs import write_recipe
from tests.shapes import small

SHORT = Effort(repeats=1, most=1, seconds=0, pass_seconds=5)


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cadre", "plan", *map(str, arguments), "--here"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code or 0


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list:
    """What was asked to be measured; it is, briefly and in this process."""
    found = []

    def measured(config, step, *, dtype, limits):
        found.append((config, step, dtype))
        device = torch.device("cpu")
        return with_limits(measure(fewest_blocks(config), step, dtype, device, SHORT), device)

    monkeypatch.setattr(calibrate, "calibrate", measured)
    monkeypatch.setattr(calibrate, "_GEMM_SIZES", (16, 32))
    monkeypatch.setattr(calibrate, "memory_bytes_per_second", lambda *_: 1e10)
    monkeypatch.setattr(here, "_decode_seconds", lambda config, context: 0.004)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_recipe_is_predicted_as_it_would_train(asked, monkeypatch, capsys, tmp_path):
    path = write_recipe(tmp_path)
    assert plan(monkeypatch, path, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    recipe = read_recipe(str(path))
    assert asked == [(recipe.config(300), Step.of(recipe), torch.float32)]
    assert made["steps"] == 12 and made["tokens_per_second"] == pytest.approx(4 * 16 / made["seconds_per_step"])
    assert made["training_seconds"] == pytest.approx(12 * made["seconds_per_step"])
    assert made["decode_tokens_per_second"] == pytest.approx(250)
    assert made["calibration"]["gemm_flops_per_second"]["float32"].keys() == {"16", "32"}
    calibration = calibrate.Calibration(**made["calibration"])
    again = forecast(Shape.from_config(recipe.config(300)), calibration)
    assert again.peak_memory_bytes == made["peak_memory_bytes"]
    assert plan(monkeypatch, path) == 0
    shown = capsys.readouterr().out
    for part in ("4 x 16 tokens a step", "sparse blocks", "peak memory", "12 steps", "decoding", "product of 32, bfloat16"):
        assert part in shown, part


def test_counts_are_those_of_the_plan(asked, monkeypatch, capsys, tmp_path):
    path = write_recipe(tmp_path, train={"mtp_share": 0.25})
    assert plan(monkeypatch, path, "--json") == 0
    here_ = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["cadre", "plan", str(path), "--json"])
    with pytest.raises(SystemExit):
        module.main()
    planned = json.loads(capsys.readouterr().out)
    assert planned["precision"] == "fp32" and planned["parameters"]["multi_token_prediction"]
    for name in here_.keys() & planned.keys() - {"tokens_per_second", "notes"}:
        assert here_[name] == planned[name], name


def test_a_recipe_is_measured_in_the_precision_asked_for(asked, monkeypatch, capsys, tmp_path):
    path = write_recipe(tmp_path, train={"dtype": "float32"})
    assert plan(monkeypatch, path) == 0 and plan(monkeypatch, path, "--precision", "bf16") == 0
    capsys.readouterr()
    assert [dtype for _, _, dtype in asked] == [torch.float32, torch.bfloat16]


def test_a_config_is_predicted_with_the_options_given(asked, monkeypatch, capsys, tmp_path):
    config = small("llama", max_position_embeddings=64)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_hf()))
    options = ("--context", 32, "--batch", 2, "--optimizer", "muon", "--precision", "bf16", "--json")
    assert plan(monkeypatch, file, *options) == 0
    made = json.loads(capsys.readouterr().out)
    ((_, step, dtype),) = asked
    assert (step.batch, step.micro_batch, step.seq_len, step.optimizer.name) == (2, 2, 32, "muon")
    assert dtype == torch.bfloat16 and made["steps"] is None and made["total_parameters"] > 0


def test_a_recipe_that_begins_with_a_run_is_of_its_model(asked, monkeypatch, capsys, tmp_path):
    config = small("llama", max_position_embeddings=64)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps(config.to_hf()))
    path = write_recipe(tmp_path)
    text = re.sub(r"(?ms)^\[model\]\n.*?(?=^\[)", f'[model]\nfrom = "{tmp_path / "run"}"\n\n', path.read_text())
    path.write_text(text.replace("vocab_size", "# vocab_size"))
    assert plan(monkeypatch, path, "--json") == 0, capsys.readouterr().err
    assert asked[0][0] == config and json.loads(capsys.readouterr().out)["total_parameters"] > 0


@pytest.mark.parametrize("arguments, wanted", [
    (["pocket", "--hardware", "h100"], "--here and --hardware exclude each other"),
    (["pocket", "--devices", "2"], "--here and --devices exclude each other"),
    (["pocket", "--optimizer", "adamw-bf16"], "--optimizer adamw-bf16: --here measures the recipe's own, muon"),
    (["deepseek-v3"], "--here deepseek-v3: trains blocks to measure them; give a recipe, a run or a config.json"),
    (["config.json", "--precision", "fp8"], "--precision fp8: --here measures fp32 and bf16"),
    (["config.json", "--context", "65"], "--context 65: the model's context is 64"),
    (["foreign.json"], "foreign.json"),
])  # fmt: skip
def test_what_cannot_be_measured_is_one_line(asked, monkeypatch, capsys, arguments, wanted):
    config = small("llama", max_position_embeddings=64).to_hf()
    Path("config.json").write_text(json.dumps(config))
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    Path("foreign.json").write_text(json.dumps({**config, "model_type": "qwen3", "head_dim": 8, **windows}))
    assert plan(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("cadre: ") and err.count("\n") == 1 and wanted in err, err
    assert not asked


def test_a_large_model_is_decoded_in_parts(monkeypatch):
    """Two models with few blocks: their difference is what every further block takes."""
    seconds = {2: 0.010, 3: 0.013}
    monkeypatch.setattr(here, "_median_step", lambda config, context: seconds[config.num_hidden_layers])
    monkeypatch.setattr(here, "_WHOLE_PARAMETERS", 1)
    assert here._decode_seconds(small("deepseek_v3", num_hidden_layers=12), 8) == pytest.approx(0.010 + 10 * 0.003)
    monkeypatch.undo()
    assert here._decode_seconds(small("deepseek_v3", num_hidden_layers=3), 8) > 0
