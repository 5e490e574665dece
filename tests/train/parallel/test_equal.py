"""Any layout is one training: the same batches, losses, loads, biases and weights as on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from cadre.train import trainer
from cadre.train.metrics import read_metrics
from cadre.train.parallel import shard
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import read_recipe
from cadre.train.run import start
from cadre.train.trainer import Trainer
from tests.runs import write_chats, write_recipe
from tests.train.parallel.world import world

# Every part that might tell processes apart: Muon's whole matrices, fewer sequences for the module than processes,
# micro-batches, losses over the batch, documents, conversations; routing limited to the experts of one process, where there
# are two.
EVERYTHING = (
    "optimizer.name=muon", "optimizer.lr=0.01", "train.batch=8", "train.micro_batch=1", "train.mtp_share=0.25",
    "balance.global_weight=0.01", "balance.z_weight=0.001", "data.separate_documents=true", "train.log_every=1",
    "optimizer.qk_clip=0.02", "model.n_group=2", "model.topk_group=1",
)  # fmt: skip
PLAIN = ("train.batch=4", "train.log_every=1")
LAYOUTS_OF_2: dict[str, Any] = {"data": 1, "expert": 2, "replicas": {"replicas": 2}}
LAYOUTS_OF_4: dict[str, Any] = {"both": 2, "replicas": {"replicas": 2, "expert": 2}}
CLOCK = {"seconds", "tokens_per_second", "mfu", "seconds_per_step", "eval_seconds"}


class Nobody:
    def record(self, record, total_steps): ...

    def note(self, text): ...


def train(parallel: Parallel, recipe: Path, out: Path, settings: tuple[str, ...]) -> None:
    run = start(read_recipe(str(recipe), list(settings)), out, torch.device("cpu"), lambda line: None, parallel)
    Trainer(run, Nobody()).train()


def several(ranks: Parallel, recipe: Path, folder: Path, layouts: dict[str, Any], settings: tuple[str, ...]) -> None:
    """A run for each layout: the degree of `expert`, or keys of `[parallel]`."""
    for name, layout in layouts.items():
        keys = {"expert": layout} if isinstance(layout, int) else layout
        train(ranks, recipe, folder / name, (*settings, *(f"parallel.{key}={value}" for key, value in keys.items())))


def sums(ranks: Parallel, recipe: Path, out: Path, micro_batch: int) -> int:
    """How often the processes add something up in a step."""
    settings = ["train.batch=8", f"train.micro_batch={micro_batch}", "parallel.replicas=2"]
    run = start(read_recipe(str(recipe), settings), out, torch.device("cpu"), lambda line: None, ranks)
    trainer, calls, real = Trainer(run, Nobody()), [], dist.all_reduce
    dist.all_reduce = lambda *given, **options: calls.append(0) or real(*given, **options)
    trainer.step(next(run.batches))
    return len(calls)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer, "gemm_flops_per_second", lambda *_: 1e11)
    return write_recipe(tmp_path)


def assert_same_run(run: Path, other: Path) -> None:
    """Metrics within 1e-4 relative, counts exactly; weights and biases within 1e-4."""
    records, others = ([record for record in read_metrics(path) if "event" not in record] for path in (run, other))
    assert len(records) == len(others)
    for record, its in zip(records, others, strict=True):
        assert record.keys() == its.keys()
        for key in record.keys() - CLOCK:
            if key in ("load", "load_layers", "dead_experts", "bias_range", "tokens", "step"):
                assert its[key] == record[key], (key, record["step"])
            else:
                assert its[key] == pytest.approx(record[key], rel=1e-4), (key, record["step"])
    weights, theirs = (load_file(path / "model" / "model.safetensors") for path in (run, other))
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "settings, size, layouts",
    [(PLAIN, 2, LAYOUTS_OF_2), (EVERYTHING, 2, LAYOUTS_OF_2), (EVERYTHING, 4, LAYOUTS_OF_4)],
    ids=["plain on 2", "everything on 2", "everything on 4"],
)
def test_a_layout_changes_no_number(tmp_path, recipe, monkeypatch, settings, size, layouts):
    if size == 4:  # as a large model is cut
        monkeypatch.setattr(shard, "GATHERED_AT_ONCE", 0)
    if settings == EVERYTHING:
        write_chats(tmp_path / "corpus" / "chats.jsonl")
    settings = (*settings, "train.steps=8", "eval.every=4", "checkpoint.every=100")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    world(size, several, recipe, tmp_path, layouts, settings)
    for name in layouts:
        assert_same_run(tmp_path / "alone", tmp_path / name)
        assert json.loads((tmp_path / name / "model" / "config.json").read_text())["n_routed_experts"] == 4


@pytest.mark.parametrize("most", [0, shard.GATHERED_AT_ONCE], ids=["block by block", "at once"])
def test_modules_without_a_weight_are_as_on_one_process(tmp_path, recipe, monkeypatch, most):
    """They are trained by nothing, balance losses included, whichever process has sequences for them."""
    monkeypatch.setattr(shard, "GATHERED_AT_ONCE", most)
    settings = (*PLAIN, "train.mtp_weight=0.0", "train.mtp_share=0.25", "balance.sequence_weight=0.01", "train.steps=4")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    world(2, several, recipe, tmp_path, {"2": 1}, settings)
    assert_same_run(tmp_path / "alone", tmp_path / "2")
    seed = start(read_recipe(str(recipe)), tmp_path / "new", torch.device("cpu"), lambda line: None).model.mtp[0]
    weights = load_file(tmp_path / "2" / "model" / "model.safetensors")
    torch.testing.assert_close(weights["model.layers.2.mlp.gate.weight"], seed.block.mlp.gate.weight.detach())


def test_replicas_add_up_once_a_step_however_many_micro_batches(tmp_path, recipe):
    one, four = (world(2, sums, recipe, tmp_path / str(micro), micro) for micro in (4, 1))
    assert one == four
