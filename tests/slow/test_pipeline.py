"""Pipelines, at length: fifty steps in every schedule and beside every other layout, checkpoints that others read, a process
that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cadre.train.checkpoint import checkpoints
from cadre.train.parallel import shard
from cadre.train.parallel.group import Parallel
from cadre.train.parallel.layout import v_schedules
from cadre.train.recipe import read_recipe
from cadre.train.resume import resume
from cadre.train.trainer import Trainer
from tests.slow.test_scale import Job
from tests.train.parallel.test_checkpoint import forget
from tests.train.parallel.test_equal import EVERYTHING, PLAIN, Nobody, assert_same_run, recipe, several, train
from tests.train.parallel.world import world

__all__ = ["recipe"]
pytestmark = pytest.mark.skipif(not v_schedules(), reason="half of the schedules need torch 2.13")
FOUR_BLOCKS = ("model.num_hidden_layers=4", "train.micro_batch=1")
FIFTY = (*FOUR_BLOCKS, "train.batch=8", "train.steps=50", "eval.every=25", "checkpoint.every=100")
LAYOUTS_OF_2: dict[str, Any] = {
    schedule: {"pipeline": 2, "schedule": schedule} for schedule in ("1f1b", "interleaved", "zbv", "dualpipev")
}
LAYOUTS_OF_4: list[dict[str, Any]] = [
    {"4 stages": {"pipeline": 4}, "2 x 2": {"pipeline": 2}, "2 x 2, replicas 2": {"pipeline": 2, "replicas": 2}},
    {
        "2 x 2, expert 2": {"pipeline": 2, "expert": 2},
        "2 x 2, expert 2, interleaved": {"pipeline": 2, "expert": 2, "schedule": "interleaved"},
        "2 x 2, expert 2, back": {"pipeline": 2, "expert": 2, "schedule": "dualpipev"},
    },
]


@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("size, layouts", [(2, LAYOUTS_OF_2), *((4, layouts) for layouts in LAYOUTS_OF_4)])
def test_fifty_steps_are_the_same_in_every_pipeline(tmp_path, recipe, monkeypatch, settings, size, layouts):
    if size == 4:  # as a large model is cut
        monkeypatch.setattr(shard, "GATHERED_AT_ONCE", 0)
    settings = (*settings, *FIFTY)
    train(Parallel(), recipe, tmp_path / "alone", settings)
    world(size, several, recipe, tmp_path, layouts, settings)
    for name in layouts:
        assert_same_run(tmp_path / "alone", tmp_path / name)


@pytest.mark.parametrize("model", [
    ("model.tie_word_embeddings=true",), ("model.num_nextn_predict_layers=0",),
    ("model.tie_word_embeddings=true", "model.num_nextn_predict_layers=0"), ("model.num_nextn_predict_layers=2",),
])  # fmt: skip
def test_an_embedding_that_both_ends_use_is_one(tmp_path, recipe, model):
    settings = (*EVERYTHING, *FIFTY, *model, "train.steps=12", "eval.every=6")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    layouts = {"turn": {"pipeline": 2}, "back": {"pipeline": 2, "schedule": "zbv"}}
    world(4, several, recipe, tmp_path, layouts, settings)
    for name in layouts:
        assert_same_run(tmp_path / "alone", tmp_path / name)


def go_on(parallel: Parallel, path: Path, pipeline: int, schedule: str, expert: int) -> None:
    keys = [f"parallel.pipeline={pipeline}", f"parallel.schedule={schedule}", f"parallel.expert={expert}"]
    run = resume(path, read_recipe(str(path / "recipe.toml"), keys), torch.device("cpu"), lambda line: None, parallel)
    Trainer(run, Nobody()).train()


def test_a_run_goes_on_in_other_stages_and_in_none(tmp_path, recipe):
    settings = (*EVERYTHING, *FOUR_BLOCKS, "train.steps=12", "eval.every=100", "checkpoint.every=3", "checkpoint.keep=9")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    run = tmp_path / "run"
    world(4, several, recipe, tmp_path, {"run": {"pipeline": 2, "expert": 2}}, settings)
    forget(run, 3)
    world(2, go_on, run, 2, "zbv", 1)
    forget(run, 6)
    go_on(Parallel(), run, 1, "1f1b", 1)
    forget(run, 9)
    world(4, go_on, run, 4, "1f1b", 1)
    assert_same_run(tmp_path / "alone", run)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_stage_ends_the_run_and_is_named(tmp_path, recipe, victim):
    job = Job(recipe, tmp_path / "run", 100000, "--set", "parallel.pipeline=2", "--set", "train.micro_batch=1")
    job.until(7)[victim].kill()
    assert job.end() == 1
    assert f"cadre: rank {victim} was ended by SIGKILL; continue with: cadre train --resume" in job.said()
    assert checkpoints(job.out)


def test_a_stage_that_hangs_is_named_after_the_time_out(tmp_path, recipe):
    options = ("parallel.pipeline=2", "train.micro_batch=1", "parallel.timeout=0.2")
    job = Job(recipe, tmp_path / "run", 100000, *(word for option in options for word in ("--set", option)))
    ranks = job.until(7)
    ranks[1].suspend()
    assert job.end() == 1
    assert "cadre: rank 1 did not answer any more (rank 0 lost the other processes: " in job.said()


def test_a_pipeline_is_trained_scored_and_sampled_from_the_command_line(tmp_path, recipe):
    job = Job(recipe, tmp_path / "run", 6, "--set", "parallel.pipeline=2", "--set", "train.micro_batch=1")
    assert job.end() == 0, job.said()
    assert "held-out score" in job.said() and "> The" in job.said()


def test_too_many_stages_are_refused_once_with_status_2(tmp_path, recipe):
    job = Job(recipe, tmp_path / "run", 6, "--set", "parallel.pipeline=2", "--set", "parallel.schedule=zbv")
    assert job.end() == 2
    assert job.said().count('with schedule "zbv" 4 stages, but the model has only 2 blocks: choose fewer') == 1
