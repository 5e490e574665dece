from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from cadre.data.tokenizer import train_tokenizer
from cadre.hub.tokenizer import save_tokenizer
from cadre.train import trainer
from cadre.train.recipe import read_recipe
from cadre.train.resume import resume
from cadre.train.run import Run, start
from cadre.train.trainer import Result, Trainer
from tests.runs import write_recipe


class Watcher:
    """An observer that keeps what it is told, and calls `at[step]` when that step is logged."""

    def __init__(self, at: dict[int, Any] | None = None) -> None:
        self.at, self.records, self.notes, self.totals = at or {}, [], [], []

    def record(self, record: dict[str, Any], total_steps: int) -> None:
        self.records.append(record)
        self.totals.append(total_steps)
        if "loss" in record and record["step"] in self.at:
            self.at[record["step"]]()

    def note(self, text: str) -> None:
        self.notes.append(text)


class Lab:
    """Starts, trains and resumes runs of the tiny recipe within one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = write_recipe(folder)

    def start(self, name: str, *overrides: str) -> Run:
        recipe = read_recipe(str(self.recipe), list(overrides))
        return start(recipe, self.folder / name, torch.device("cpu"), lambda line: None)

    def resume(self, name: str, *overrides: str) -> Run:
        path = self.folder / name
        wanted = read_recipe(str(path / "recipe.toml"), list(overrides))
        return resume(path, wanted, torch.device("cpu"), lambda line: None)

    def train(self, run: Run, at: dict[int, Any] | None = None) -> tuple[Result, Watcher]:
        watcher = Watcher(at)
        return Trainer(run, watcher).train(), watcher


def given_tokenizer(folder: Path, size: int) -> Tokenizer:
    tokenizer = train_tokenizer(["the people of the nation and their house"] * 9, size)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def without_vocab_size(lab: Lab) -> None:
    text = lab.recipe.read_text(encoding="utf-8")
    lab.recipe.write_text(text.replace("vocab_size = 300\n", ""), encoding="utf-8")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer, "gemm_flops_per_second", lambda *_: 1e11)  # measuring it takes most of a second
    return Lab(tmp_path)


def interrupt(number: int = signal.SIGTERM):
    """What `Watcher.at` calls to stop a run."""
    return lambda: os.kill(os.getpid(), number)
