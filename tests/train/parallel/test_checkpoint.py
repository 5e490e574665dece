"""Checkpoints in parts: any number of processes goes on from those of any other; whole or not at all."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cadre.errors import DiskFullError, UsageError
from cadre.model.transformer import Transformer
from cadre.train.checkpoint import _state_file, checkpoints, load_checkpoint, read_state
from cadre.train.optimizer import Optimizer
from cadre.train.parallel import checkpoint
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import read_recipe
from cadre.train.resume import resume
from cadre.train.run import start
from cadre.train.trainer import Trainer
from tests.train.parallel.test_equal import EVERYTHING, Nobody, assert_same_run, recipe, several, train
from tests.train.parallel.world import world

__all__ = ["recipe"]
SETTINGS = (
    *EVERYTHING, "train.micro_batch=8", "train.steps=9", "eval.every=100", "checkpoint.every=3", "checkpoint.keep=9",
)  # fmt: skip


def go_on(parallel: Parallel, path: Path, expert: int) -> None:
    wanted = read_recipe(str(path / "recipe.toml"), [f"parallel.expert={expert}"])
    Trainer(resume(path, wanted, torch.device("cpu"), lambda line: None, parallel), Nobody()).train()


def forget(path: Path, step: int) -> None:
    """As if the run had been killed just after the checkpoint of that step."""
    for saved in checkpoints(path):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)


def test_a_run_goes_on_with_fewer_and_with_more_processes(tmp_path, recipe):
    train(Parallel(), recipe, tmp_path / "alone", SETTINGS)
    world(4, several, recipe, tmp_path, {"run": 2}, SETTINGS)
    forget(tmp_path / "run", 3)
    world(2, go_on, tmp_path / "run", 2)
    forget(tmp_path / "run", 6)
    go_on(Parallel(), tmp_path / "run", 1)
    assert_same_run(tmp_path / "alone", tmp_path / "run")
    forget(tmp_path / "alone", 3)
    shutil.copytree(tmp_path / "alone", tmp_path / "more")
    world(2, go_on, tmp_path / "more", 1)
    assert_same_run(tmp_path / "run", tmp_path / "more")


def fail_alone(parallel: Parallel) -> str:
    def work() -> None:
        if parallel.rank == 1:
            raise MemoryError("no room")

    try:
        parallel.together(work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_nobody_foresaw_on_one_process_is_told_to_all():
    assert world(2, fail_alone) == ["RunError: rank 1: MemoryError: no room", "MemoryError: no room"]


def test_moments_of_bfloat16_come_back_as_what_they_are(tmp_path, recipe):
    """From the parts that several processes wrote."""
    settings = [*SETTINGS, "train.steps=3", "optimizer.name=adamw-bf16"]
    train(Parallel(), recipe, tmp_path / "alone", settings)
    world(4, several, recipe, tmp_path, {"run": 2}, settings)
    made = read_recipe(str(tmp_path / "run" / "recipe.toml"))
    model = Transformer(made.config(made.model["vocab_size"]))
    optimizer = Optimizer(model, made.optimizer)
    load_checkpoint(checkpoints(tmp_path / "run")[-1], model, optimizer)
    whole = load_file(checkpoints(tmp_path / "alone")[-1] / "optimizer.safetensors")
    state = optimizer.tensors()
    assert state.keys() == whole.keys()
    for name, value in whole.items():
        assert state[name].dtype == value.dtype == (torch.float32 if name.endswith(".step") else torch.bfloat16)
        near = dict(rtol=2**-6, atol=1e-3 * float(value.abs().max()))
        torch.testing.assert_close(state[name].float(), value.float(), **near, msg=lambda text, name=name: f"{name}: {text}")


def disk_full_on_one(ranks: Parallel, recipe: Path, out: Path) -> str:
    real = checkpoint.save_file

    def save_file(*arguments: Any, **options: Any) -> None:
        if ranks.rank == 1 and out.joinpath("checkpoints/step-00000003").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    checkpoint.save_file = save_file
    with pytest.raises(DiskFullError) as caught:
        train(ranks, recipe, out, SETTINGS)
    return str(caught.value)


def test_a_full_disk_on_one_of_them_ends_all_and_harms_nothing(tmp_path, recipe):
    out = tmp_path / "run"
    told = world(2, disk_full_on_one, recipe, out)
    assert told[0] == told[1]
    assert "step-00000006: checkpoint not written, earlier checkpoints are intact: rank 1: the disk is full" in told[0]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    world(2, go_on, out, 1)
    train(Parallel(), recipe, tmp_path / "alone", SETTINGS)
    assert_same_run(tmp_path / "alone", out)


def slow_disk_on_one(ranks: Parallel, recipe: Path, out: Path) -> None:
    real, two_steps_on = checkpoint.save_file, threading.Event()

    class Watcher(Nobody):
        def record(self, record, total_steps):
            if record["step"] == 5:
                two_steps_on.set()

    def save_file(*arguments: Any, **options: Any) -> None:
        assert ranks.rank == 0 or two_steps_on.wait(60)
        real(*arguments, **options)

    checkpoint.save_file = save_file
    run = start(read_recipe(str(recipe), list(SETTINGS)), out, torch.device("cpu"), lambda line: None, ranks)
    Trainer(run, Watcher()).train()


def test_steps_go_on_while_one_of_them_writes(tmp_path, recipe):
    world(2, slow_disk_on_one, recipe, tmp_path / "run")
    train(Parallel(), recipe, tmp_path / "alone", SETTINGS)
    for name in ("run", "alone"):
        forget(tmp_path / name, 3)
        go_on(Parallel(), tmp_path / name, 1)
    assert_same_run(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize("harm", ["missing", "truncated", "another model"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, recipe, harm):
    run = tmp_path / "run"
    world(2, several, recipe, tmp_path, {"run": 1}, SETTINGS)
    forget(run, 3)
    newest = checkpoints(run)[-1]
    files = sorted(newest.glob("shard-*"))
    if harm == "missing":
        files[0].unlink()
    elif harm == "truncated":
        files[1].write_bytes(files[1].read_bytes()[:1000])
    wanted = read_recipe(str(run / "recipe.toml"), [])
    if harm == "another model":
        opened = resume(run, wanted, torch.device("cpu"), lambda line: None)
        opened.model.norm.weight = torch.nn.Parameter(torch.ones(5))
        message = r"step-00000003: its weights are not those of the model in recipe\.toml"
        with pytest.raises(UsageError, match=message):
            Trainer(opened, Nobody())
        return
    with pytest.raises(UsageError, match=r"step-00000003: damaged checkpoint \(shard-.*\); delete this folder"):
        resume(run, wanted, torch.device("cpu"), lambda line: None)
    state = newest / "state.json"
    state.write_bytes(_state_file(read_state(newest), {}))
    # Without stamps the reader finds it.
    with pytest.raises(UsageError, match=r"step-00000003: damaged checkpoint .*; delete this folder"):
        Trainer(resume(run, wanted, torch.device("cpu"), lambda line: None), Nobody())
