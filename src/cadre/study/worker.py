"""One run of a study, in a process of its own.

    python -m cadre.study.worker RECIPE OUT KIND PROCESSES        progress as JSON lines on standard output

Beside what every run directory holds, `result.json` appears when all is done; its `wall_seconds` and `cpu_seconds` are those of
the optimizer steps alone. Killed at any point, it goes on from its last checkpoint when it is called again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cadre.errors import DivergedError, RunError, UsageError, one_line, writing
from cadre.files import replace_file
from cadre.hub.load import load
from cadre.kernels.allocator import keep_freed_memory
from cadre.study.drafting import acceptance, drafting_rates
from cadre.train.metrics import read_metrics
from cadre.train.parallel.launch import joined, launch, started
from cadre.train.recipe import read_recipe
from cadre.train.report import write_report
from cadre.train.resume import resume
from cadre.train.run import only_writer, start
from cadre.train.trainer import Result, Silent, Trainer

RESULT = "result.json"
# Exit status of a run that a signal ended: it can go on.
STOPPED = 75
# What the study hears of a record.
_SPOKEN = ("step", "loss", "bits_per_byte", "seconds_per_step", "final")
# How long to wait for the process of an interrupted study that is still saving.
_PATIENCE = 120


class Speaker:
    """Tells the study's process how far the run is; stops the run when that process is gone."""

    def __init__(self) -> None:
        self.parent = os.getppid()

    def record(self, record: dict[str, Any], total_steps: int) -> None:
        self._say({key: record[key] for key in _SPOKEN if key in record})
        if os.getppid() != self.parent:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None:
        self._say({"note": text})

    def _say(self, values: dict[str, Any]) -> None:
        try:
            print(json.dumps(values), flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            os.kill(os.getpid(), signal.SIGTERM)


def train(recipe_file: Path, out: Path, kind: str) -> None:
    """Train the recipe in `out`, from where it stands, with all processes there are; what is left there is `RESULT`, unless a
    signal has ended it before."""
    keep_freed_memory()
    recipe = read_recipe(str(recipe_file))
    with joined(recipe.parallel.timeout) as (parallel, device):
        speaker: Speaker | Silent = Speaker() if parallel.main else Silent()
        begun = parallel.agree(parallel.main and _begun(out))
        if begun:
            run = resume(out, recipe, device, speaker.note, parallel)
        else:
            run = start(recipe, out, device, speaker.note, parallel)
        trainer = Trainer(run, speaker, compared=True, whole=kind == "run")
        try:
            ended = trainer.train()
        except DivergedError as error:
            if parallel.main:
                _write(out / RESULT, json.dumps({"diverged": str(error), "steps": trainer.progress.step}))
            return
        if not ended.stopped and parallel.main:
            _finish(trainer, ended, kind)


def _begun(out: Path) -> bool:
    """Whether there is a run to go on with; what stands in its way, or in a new one's, is cleared away."""
    if out.is_dir():
        _wait_for(out)
    if (out / "recipe.toml").is_file():
        # A report without a result: the end fell between the two.
        (out / "report.html").unlink(missing_ok=True)
        return True
    shutil.rmtree(out, ignore_errors=True)
    return False


def _finish(trainer: Trainer, ended: Result, kind: str) -> None:
    run, out = trainer.run, trainer.run.path
    times = {"wall_seconds": trainer.progress.wall_seconds, "cpu_seconds": trainer.progress.cpu_seconds}
    result = {**asdict(ended), **times, "diverged": None, "acceptance": [], "drafting": None}
    if kind == "run":
        if len(run.model.mtp):
            held_out, length = run.data.held_out, run.recipe.data.seq_len
            # Of several processes none has the model whole, but what they have saved is.
            whole = run.model if run.parallel.size == 1 else load(out / "model")[0]
            result["acceptance"] = acceptance(whole, held_out, length)
            result["drafting"] = drafting_rates(out / "model", held_out, length)
        write_report(out, {"name": run.recipe.name, "config": run.config.to_hf(), "result": asdict(ended)})
    _write(out / RESULT, json.dumps(result))


def read_curve(run_dir: Path) -> list[tuple[int, float]]:
    """Step and held-out bits per byte of the evaluations during the run, all of the same part of the text."""
    found = {r["step"]: r["bits_per_byte"] for r in read_metrics(run_dir) if "bits_per_byte" in r and not r.get("final")}
    return sorted((step, value) for step, value in found.items() if value is not None)


def _wait_for(out: Path) -> None:
    """Until no other process trains in `out`: an interrupted study's may be saving still."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            with only_writer(out):
                return
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _write(path: Path, text: str) -> None:
    with writing(path):
        replace_file(path, text.encode())


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 75 stopped by a signal, 1 and 2 as `cadre`."""
    recipe, out, kind, processes = Path(arguments[0]), Path(arguments[1]), arguments[2], int(arguments[3])
    try:
        if started():
            train(recipe, out, kind)
            return 0
        if not (out / RESULT).is_file():
            if processes > 1:
                launch(processes, arguments, module="cadre.study.worker")
            else:
                train(recipe, out, kind)
        return 0 if (out / RESULT).is_file() else STOPPED
    except (UsageError, RunError) as error:
        print(one_line(error), file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
