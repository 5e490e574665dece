"""Measuring blocks: what is measured is the step, and what a child process says is what a run keeps."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.plan.here import Calibration, forecast, kinds
from cadre.plan.shape import Shape
from cadre.train.bench import calibrate as module
from cadre.train.bench.calibrate import Effort, Step, calibrate, fewest_blocks, measure, predict_run, read_prediction
from cadre.train.bench.step import TrainingStep
from cadre.train.recipe import OptimizerSection
from tests.shapes import small

SHORT = Effort(repeats=1, most=1, seconds=0, pass_seconds=5)
CPU = torch.device("cpu")


def step(batch: int = 4, micro: int = 2, name: str = "adamw") -> Step:
    return Step(batch, micro, 8, 0.5, OptimizerSection(name=name, lr=1e-3))


@pytest.mark.parametrize("config, wanted, sparse", [
    (small("deepseek_v3", num_hidden_layers=5, num_nextn_predict_layers=1), 2, 1),
    (small("deepseek_v3", num_hidden_layers=3, first_k_dense_replace=0), 1, 1),
    (small("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=4, num_nextn_predict_layers=1), 1, 0),
    (small("deepseek_v2", num_hidden_layers=4, first_k_dense_replace=4), 1, 0),
    (small("glm4_moe", num_hidden_layers=4), 2, 1),
    (small("llama", num_hidden_layers=6), 1, 0),
    (small("qwen3", num_hidden_layers=6), 1, 0),
    (small("qwen3_moe", num_hidden_layers=6), 2, 1),
    (small("mixtral", num_hidden_layers=6), 1, 1),
])  # fmt: skip
def test_one_block_of_each_kind_is_left(config: ModelConfig, wanted: int, sparse: int):
    few = fewest_blocks(config)
    assert few.num_hidden_layers == wanted
    assert kinds(Shape.from_config(few)).get("sparse", 0) == sparse
    assert set(kinds(Shape.from_config(few))) == set(kinds(Shape.from_config(config)))
    assert few.num_nextn_predict_layers == config.num_nextn_predict_layers
    assert (few.hidden_size, few.vocab_size) == (config.hidden_size, config.vocab_size)


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16", "muon"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_every_part_is_measured(family: str, name: str):
    config = small(family, num_hidden_layers=3)
    found = measure(fewest_blocks(config), step(name=name), torch.float32, CPU, SHORT)
    assert set(found.block_pass_seconds) == set(kinds(Shape.from_config(config)))
    numbers = [found.pass_seconds, found.update_seconds]
    numbers += [*found.block_pass_seconds.values(), *found.block_update_seconds.values()]
    assert min(numbers) > 0 and (found.rows, found.batch, found.micro_batch) == (2, 4, 2)
    made = forecast(Shape.from_config(config), found)
    assert made.seconds_per_step > 0 and made.peak_memory_bytes >= found.process_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_by_itself_gets_what_flows_between_blocks(dtype: torch.dtype):
    """On some processors that is float32 in a bfloat16 run."""
    trained = TrainingStep(small("deepseek_v3"), batch=1, seq_len=8, dtype=dtype, device=CPU)
    block = trained.model.layers[0]
    assert isinstance(block, module.Block)
    alone = module._Alone(trained, block, step().optimizer)
    assert alone.x.dtype == trained.model.embed(trained.tokens()).dtype
    assert alone.forward().dtype == alone.x.dtype


def test_what_a_block_holds_is_counted():
    """Weights, gradients and two moments; and of a linear layer, its input and no weight."""
    config = small("llama")
    found = measure(fewest_blocks(config), step(), torch.float32, CPU, SHORT)
    block = module.Block(config, 0)
    weights = sum(parameter.nbytes for parameter in block.parameters())
    steps = 4 * sum(1 for _ in block.parameters())
    assert found.block_state_bytes["dense"] == 4 * weights + steps
    linear = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    assert module._kept_bytes(lambda: linear(x) * 1.0, linear) == x.nbytes


def test_sequences_are_left_out_where_a_pass_would_take_too_long(monkeypatch):
    monkeypatch.setattr(module, "gemm_flops_per_second", lambda *_: 1e9)
    config = small("llama")
    flops = module.count(config, context=8).training_flops_per_token * 8
    wide = step(batch=64, micro=64)

    def rows(seconds: float, deadline: float = 1e12) -> int:
        effort = Effort(repeats=3, most=3, seconds=0, pass_seconds=seconds, deadline=deadline)
        return module._rows(config, wide, torch.float32, CPU, effort)

    assert rows(3.5 * flops / (1e9 * module._LEAST_SHARE)) == 3
    assert rows(1e-12) == 1 and rows(1e12) == 64
    with pytest.raises(UsageError, match=r"measuring them on one sequence of 8 tokens takes .* s here or more: plan without"):
        rows(1e12, deadline=8 * flops / 1e9)


def test_a_model_beyond_the_memory_is_refused_in_one_line():
    vast = small("llama", vocab_size=2**24, hidden_size=4096)
    with pytest.raises(UsageError, match=r"one block of each kind .* GiB, but of the memory that is free .*: plan without"):
        calibrate(vast, step(), dtype=torch.float32)


def test_memory_decides_how_many_sequences_are_measured(monkeypatch):
    """Four fifths of what is free, for all that a measurement holds."""
    few, wide = fewest_blocks(small("deepseek_v3", num_hidden_layers=4)), step(batch=64, micro=64)
    for free, rows in ((module.measuring_bytes(few, wide, CPU, 5) + 1, 5), (1e15, 64)):
        monkeypatch.setattr(module, "free_bytes", lambda _, free=free: free / module._MEMORY_USED)
        assert module._rows_in_memory(few, wide, CPU) == rows
    monkeypatch.setattr(module, "free_bytes", lambda _: module.measuring_bytes(few, wide, CPU, 1))
    with pytest.raises(UsageError, match="on one sequence of 8 tokens to measure takes"):
        module._rows_in_memory(few, wide, CPU)


@pytest.mark.parametrize("family, name", [("deepseek_v3", "muon"), ("llama", "adamw")])
def test_a_measurement_takes_no_more_memory_than_is_said(family: str, name: str):
    """On blocks whose activations and states are nearly what a process is without them."""
    config = small(
        family, num_hidden_layers=2, hidden_size=128, intermediate_size=512, vocab_size=4096, max_position_embeddings=1024,
        **({} if family == "llama" else dict(moe_intermediate_size=256)),
    )  # fmt: skip
    few = fewest_blocks(config)
    wanted = Step(4, 4, 1024, 1.0, OptimizerSection(name=name, lr=1e-3))
    found = calibrate(config, wanted, dtype=torch.float32, effort=SHORT)
    said = module.measuring_bytes(few, wanted, CPU, found.rows)
    assert said / 4 < found.process_bytes + found.growth_bytes < said


def test_a_process_of_its_own_answers(monkeypatch, tmp_path):
    found = calibrate(small("deepseek_v3", num_hidden_layers=4), step(), dtype=torch.float32, effort=SHORT)
    assert isinstance(found, Calibration) and set(found.block_pass_seconds) == {"dense", "sparse"}
    assert found.process_bytes > 50e6 and found.growth_bytes >= 0
    chatty = tmp_path / "chatty"
    chatty.write_text(f'#!/bin/sh\necho "a library says hello"\nexec {shlex.quote(sys.executable)} "$@"\n')
    chatty.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(chatty))
    assert isinstance(calibrate(small("llama"), step(), dtype=torch.float32, effort=SHORT), Calibration)
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(module.RunError, match="measuring this machine failed: status 1"):
        calibrate(small("llama"), step(), dtype=torch.float32, effort=SHORT)


@pytest.mark.parametrize(
    ("body", "error", "line"),
    [
        ("exec sleep 60", module.RunError, "had not ended after 1 s and was stopped"),
        ("kill -9 $$", module.RunError, "measuring this machine failed: killed, most likely for want of memory"),
        ("echo warning >&2; echo too slow >&2; exit 2", UsageError, "^too slow$"),
    ],
)
def test_a_process_that_does_not_answer_is_one_line(monkeypatch, tmp_path, body, error, line):
    mute = tmp_path / "mute"
    mute.write_text(f"#!/bin/sh\n{body}\n")
    mute.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(mute))
    with pytest.raises(error, match=line):
        calibrate(small("llama"), step(), dtype=torch.float32, effort=dataclasses.replace(SHORT, deadline=1.0))


def test_a_run_keeps_its_prediction(lab, monkeypatch):
    run = lab.start("run")
    assert read_prediction(run.path) is None
    asked = []

    def measured(config, wanted, *, dtype, effort):
        asked.append((config, wanted, dtype))
        return measure(fewest_blocks(config), wanted, dtype, CPU, SHORT)

    monkeypatch.setattr(module, "calibrate", measured)
    made = predict_run(run)
    assert asked == [(run.config, Step.of(run.recipe), torch.float32)]
    kept = read_prediction(run.path)
    assert kept and kept["seconds_per_step"] == made.seconds_per_step
    assert kept["calibration"]["batch"] == 4 and made.peak_memory_bytes > 50e6
    (run.path / "prediction.json").write_text("{", encoding="utf-8")
    assert read_prediction(run.path) is None


def test_the_prediction_stands_in_the_report(lab, monkeypatch):
    from cadre.cli.summary import summarize
    from cadre.train.report import write_report

    run = lab.start("run")
    said = {"seconds_per_step": 1e9, "peak_memory_bytes": 2**20, "calibration": {}}
    Path(run.path / "prediction.json").write_text(json.dumps(said), encoding="utf-8")
    result, _ = lab.train(run)
    page = write_report(run.path, summarize(run, result, [], "cadre train")).read_text(encoding="utf-8")
    assert "Prediction and fact" in page and "1e+09 s predicted" in page and "1.00 MiB predicted" in page
