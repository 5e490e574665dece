"""What a study's directory holds, so that it goes on where it was.

study.json       the study as resolved when it began: arms with their solved widths, counts and step times, all runs
sweep/, runs/    a run directory for each training run
turns.json, decode.json      step times and decode rates, measured with the arms in turn after their runs
report.html, results.json, *.png
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cadre import files
from cadre.errors import UsageError, writing
from cadre.study.jobs import Job
from cadre.study.match import Matched, counted
from cadre.study.spec import Study
from cadre.study.worker import RESULT, read_curve
from cadre.train.recipe import parse_recipe

FILE = "study.json"
_FORMAT = 3
# Fields of a `State` that are JSON as they are.
_PLAIN = ("text_hash", "quick", "minutes", "step_seconds", "amount", "rent", "rent_source", "dtype", "held_out_tokens",
          "train_tokens", "machine")  # fmt: skip

# Short runs whose final losses differ by less than half a percent are level.
_LEVEL = 1.005


@dataclass(frozen=True)
class State:
    """A study in its directory. `step_seconds`: by arm, at the start. `minutes`: what the whole was fitted into, if it was."""

    path: Path
    study: Study
    text_hash: str
    quick: bool
    minutes: float | None
    arms: dict[str, Matched]
    jobs: list[Job]
    step_seconds: dict[str, float]
    amount: float
    rent: float
    rent_source: str
    dtype: str
    held_out_tokens: int
    train_tokens: int
    machine: dict[str, Any]

    @property
    def processes(self) -> int:
        """How many train every run."""
        return self.machine.get("processes", 1)

    def result(self, job: Job) -> dict[str, Any] | None:
        """What the run's process left when it was done; None before."""
        return read_json(self.path / job.folder / RESULT)

    def sweep(self, arm: str) -> dict[float, float | None]:
        """Of an arm's finished sweep runs, by factor, the last held-out bits per byte; None where training diverged."""
        found: dict[float, float | None] = {}
        for job in self.jobs:
            if job.kind == "sweep" and job.arm == arm and job.factor is not None:
                result = self.result(job)
                if result is not None:
                    curve = read_curve(self.path / job.folder)
                    found[job.factor] = None if result["diverged"] or not curve else curve[-1][1]
        return found

    def factor(self, job: Job) -> float:
        """What the job's learning rates are multiplied by: its own factor, else the best of the arm's sweep. Of those that are
        level there the lowest: the best rate falls with the length of a run (docs/log.md), and a sweep's are short."""
        if job.factor is not None:
            return job.factor
        scores = {factor: score for factor, score in self.sweep(job.arm).items() if score is not None}
        if not scores:
            return min(self.sweep(job.arm), default=1.0)
        return min(factor for factor, score in scores.items() if score <= _LEVEL * min(scores.values()))

    def save(self) -> None:
        """Raises `RunError` if the disk refuses."""
        arms = {
            name: {"recipe": arm.recipe.to_toml(), "solved": arm.solved, "vocab_size": arm.config.vocab_size}
            for name, arm in self.arms.items()
        }
        write_json(self.path / FILE, {
            "format": _FORMAT, "study": self.study.model_dump(exclude_none=True), "arms": arms,
            "jobs": [asdict(job) for job in self.jobs], **{name: getattr(self, name) for name in _PLAIN},
        })  # fmt: skip


def open_state(path: Path) -> State | None:
    """The study in this directory, None if it holds none. Raises `UsageError` for one that cannot be read."""
    values = read_json(path / FILE)
    if values is None:
        return None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise UsageError(f"{path / FILE}: was written by another version of Cadre: choose another --out")
    try:
        study = Study(**values["study"])
        arms = {name: _arm(path, name, arm) for name, arm in values["arms"].items()}
        jobs = [Job(**job) for job in values["jobs"]]
        return State(path=path, study=study, arms=arms, jobs=jobs, **{name: values[name] for name in _PLAIN})
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path / FILE}: is damaged ({type(error).__name__}: {error}): choose another --out") from None


def read_json(path: Path) -> Any:
    """The file's content, None if there is no such file. Raises `UsageError` if it is damaged."""
    if not path.exists():
        return None
    try:
        return files.read_json(path)
    except UsageError as error:
        raise UsageError(f"{error}: choose another --out") from None


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all. Raises `RunError` if the disk refuses."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(path, (json.dumps(values, indent=1) + "\n").encode())


def _arm(path: Path, name: str, values: dict[str, Any]) -> Matched:
    recipe = parse_recipe(values["recipe"], f"{path / FILE}, arm {name}", name=name)
    return counted(f"{path / FILE}, arm {name}", name, recipe, values["vocab_size"], values["solved"])
