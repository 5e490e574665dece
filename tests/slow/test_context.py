"""Sequences cut over ranks, at length: fifty steps beside data and expert parallelism, and a checkpoint that others read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cadre.train.parallel.group import Parallel
from cadre.train.recipe import read_recipe
from cadre.train.resume import resume
from cadre.train.trainer import Trainer
from tests.train.parallel.test_checkpoint import SETTINGS, forget
from tests.train.parallel.test_equal import EVERYTHING, PLAIN, Nobody, assert_same_run, recipe, several, train
from tests.train.parallel.world import world

__all__ = ["recipe"]
GROUPED = """[model]
model_type = "llama"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 48
"""
FIFTY = ("train.steps=50", "eval.every=25", "checkpoint.every=100")


# One sequence trains the module, so that a group has none where two groups share the batch.
MORE = (*EVERYTHING, "train.micro_batch=4", "train.mtp_share=0.125")


@pytest.mark.parametrize("settings", [PLAIN, MORE], ids=["plain", "everything"])
def test_fifty_steps_are_the_same_however_sequences_are_cut(tmp_path, recipe, settings):
    settings = (*settings, *FIFTY)
    train(Parallel(), recipe, tmp_path / "alone", settings)
    for size, context, expert in ((2, 2, 1), (4, 4, 1), (4, 2, 1), (4, 2, 2), (4, 2, 4)):
        name = f"{size} processes, context {context}, expert {expert}"
        world(size, several, recipe, tmp_path, {name: {"context": context, "expert": expert}}, settings)
        assert_same_run(tmp_path / "alone", tmp_path / name)


def test_fifty_steps_of_grouped_queries(tmp_path, recipe):
    text = recipe.read_text()
    recipe.write_text(GROUPED + text[text.index("[data]") :])
    settings = (*PLAIN, *FIFTY, "data.separate_documents=true")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    world(4, several, recipe, tmp_path, {"cut": {"context": 2, "replicas": 2}}, settings)
    assert_same_run(tmp_path / "alone", tmp_path / "cut")


def go_on(parallel: Parallel, path: Path, context: int) -> None:
    wanted = read_recipe(str(path / "recipe.toml"), [f"parallel.context={context}"])
    Trainer(resume(path, wanted, torch.device("cpu"), lambda line: None, parallel), Nobody()).train()


def test_a_run_goes_on_with_sequences_whole_and_with_them_cut(tmp_path, recipe):
    train(Parallel(), recipe, tmp_path / "alone", SETTINGS)
    world(4, several, recipe, tmp_path, {"run": {"context": 2}}, SETTINGS)
    forget(tmp_path / "run", 3)
    go_on(Parallel(), tmp_path / "run", 1)
    assert_same_run(tmp_path / "alone", tmp_path / "run")
    forget(tmp_path / "run", 6)
    world(2, go_on, tmp_path / "run", 2)
    assert_same_run(tmp_path / "alone", tmp_path / "run")
