"""How long training stands still for a checkpoint: seconds of each save, beside those of a step.

python benchmarks/checkpoint_stall.py [RECIPE] [--every N] [--steps N] [--set section.key=value]...
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cadre.train.recipe import read_recipe
from cadre.train.run import start
from cadre.train.trainer import Silent, Trainer


class Timed(Trainer):
    """Without evaluations; keeps the seconds of steps and saves."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[float] = []
        self.stalls: list[float] = []

    def _step(self, batch: Any) -> dict[str, Any]:
        begin = time.perf_counter()
        record = super()._step(batch)
        self.steps.append(time.perf_counter() - begin)
        return record

    def save(self) -> bool:
        begin = time.perf_counter()
        saved = super().save()
        self.stalls.append(time.perf_counter() - begin)
        return saved

    def _evaluate(self, final: bool) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="laptop")
    parser.add_argument("--every", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    overrides = ["data.source=sotu", *options.overrides, f"checkpoint.every={options.every}", f"train.steps={options.steps}"]
    with tempfile.TemporaryDirectory() as folder:
        run = start(read_recipe(options.recipe, overrides), Path(folder) / "run", torch.device("cpu"), lambda line: None)
        trainer = Timed(run, Silent())
        trainer.train()
    step = statistics.median(trainer.steps)
    stalls = ", ".join(f"{stall * 1e3:.1f} ms ({stall / step:.1%})" for stall in trainer.stalls)
    print(f"a step takes {step * 1e3:.0f} ms (median of {len(trainer.steps)}), a save holds it up for {stalls}")


if __name__ == "__main__":
    main()
