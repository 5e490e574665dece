"""Step times that can be compared on a busy machine: the arms take turns, one real step each, so that whatever else runs slows
all of them alike; the median of many rounds is what a step of an arm takes."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cadre.files import replace_file
from cadre.kernels.allocator import keep_freed_memory
from cadre.train.bench.step import WARM_UP
from cadre.train.bench.worker import Team, Worker, take_turns
from cadre.train.parallel.group import Parallel
from cadre.train.parallel.launch import joined
from cadre.train.recipe import Recipe, read_recipe
from cadre.train.run import start
from cadre.train.trainer import Silent, Trainer


def step_seconds(
    recipes: dict[str, Recipe], folder: Path, rounds: int, *, models: dict[str, Path] | None = None, processes: int = 1,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:  # fmt: skip
    """Median wall seconds of an optimizer step of each arm on its real batches, by so many processes, measured in turn.
    `models`: directories of trained weights to continue with (routers share tokens out differently once trained); without,
    from initialisation. `folder` is used meanwhile and removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            teams = []
            for name, recipe in recipes.items():
                file = folder / f"{name}.toml"
                replace_file(file, recipe.to_toml().encode())
                build = partial(_build, file, folder / name, None if models is None else models.get(name))
                port, team = free_port(), []
                for rank in range(processes):
                    worker = Worker(f"arm {name}", partial(build, rank, processes, port))
                    team.append(stack.enter_context(worker))
                teams.append(Team(team))
            taken = take_turns(teams, rounds, lambda turn: note(f"step times, turn {turn} of {WARM_UP + rounds}"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: statistics.median(seconds) for name, seconds in zip(recipes, taken, strict=True)}


class Stepper:
    """An arm in training on its real batches; calling it makes one step and returns its wall seconds."""

    group: AbstractContextManager[Any]

    def __init__(self, recipe: Recipe, out: Path, weights: Path | None, parallel: Parallel, device: torch.device) -> None:
        silent = Silent()
        if weights is not None:
            recipe = recipe.model_copy(update={"model": {"from": str(weights)}})
        self.run = start(recipe, out, device, silent.note, parallel)
        self.trainer = Trainer(self.run, silent)

    def __call__(self) -> float:
        batch = next(self.run.batches)
        start = time.perf_counter()
        self.trainer.step(batch)
        return time.perf_counter() - start


def _build(recipe_file: Path, out: Path, weights: Path | None, rank: int, processes: int, port: int) -> Stepper:
    keep_freed_memory()
    recipe = read_recipe(str(recipe_file))
    if processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group = joined(recipe.parallel.timeout)
    parallel, device = group.__enter__()
    stepper = Stepper(recipe, out, weights, parallel, device)
    stepper.group = group  # left when the process ends
    return stepper


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
