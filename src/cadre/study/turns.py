"""Step times that can be compared on a busy machine: the arms take turns, one real step each, so that whatever else runs slows
all of them alike; the median of many rounds is what a step of an arm takes."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cadre.files import replace_file
from cadre.train.bench_worker import Worker, take_turns
from cadre.train.recipe import Recipe


def step_seconds(
    recipes: dict[str, Recipe], folder: Path, rounds: int, *, models: dict[str, Path] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:  # fmt: skip
    """Median wall seconds of an optimizer step of each arm on its real batches, measured in turn. `models`: directories of
    trained weights to continue with (routers share tokens out differently once trained); without, from initialisation.
    `folder` is used meanwhile and removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            workers = []
            for name, recipe in recipes.items():
                file = folder / f"{name}.toml"
                replace_file(file, recipe.to_toml().encode())
                build = partial(_build, file, folder / name, None if models is None else models.get(name))
                workers.append(stack.enter_context(Worker(f"arm {name}", build)))
            taken = take_turns(workers, rounds, lambda turn: note(f"step times, turn {turn} of {rounds + 2}"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: statistics.median(seconds) for name, seconds in zip(recipes, taken, strict=True)}


class _Silent:
    def record(self, record: dict[str, Any], total_steps: int) -> None: ...

    def note(self, text: str) -> None: ...

    def write(self, record: dict[str, Any]) -> None: ...


class Stepper:
    """An arm in training on its real batches; calling it makes one step and returns its wall seconds."""

    def __init__(self, recipe: Recipe, out: Path, weights: Path | None) -> None:
        from cadre.kernels.limits import default_device
        from cadre.train.run import start
        from cadre.train.trainer import Trainer

        silent: Any = _Silent()
        self.run = start(recipe, out, default_device(), silent.note)
        if weights is not None:
            import torch

            from cadre.hub.load import load

            self.run.model.load_state_dict(load(weights, dtype=torch.float32)[0].state_dict())
        self.trainer = Trainer(self.run, silent)
        self.trainer.metrics, self.trainer.began = silent, time.perf_counter()

    def __call__(self) -> float:
        batch = next(self.run.batches)
        start = time.perf_counter()
        self.trainer._step(batch)
        return time.perf_counter() - start


def _build(recipe_file: Path, out: Path, weights: Path | None) -> Stepper:
    from cadre.kernels.allocator import keep_freed_memory
    from cadre.train.recipe import read_recipe

    keep_freed_memory()
    return Stepper(read_recipe(str(recipe_file)), out, weights)
