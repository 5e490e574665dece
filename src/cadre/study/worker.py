"""One run of a study, in a process of its own: an ordinary training run that also keeps the time of its steps alone.

    python -m cadre.study.worker RECIPE OUT KIND PROCESSES        progress as JSON lines on standard output

Beside what every run directory holds, `steps.jsonl` has wall and process CPU seconds of every optimizer step (evaluations,
checkpoints and the start left out), and `result.json` appears when all is done. Killed at any point, it goes on from its last
checkpoint when it is called again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cadre.errors import DivergedError, RunError, UsageError, write_error
from cadre.files import replace_file
from cadre.hub.load import load
from cadre.study.drafting import acceptance, drafting_rates
from cadre.train.metrics import read_metrics
from cadre.train.trainer import Result, Silent, Trainer

RESULT, STEPS = "result.json", "steps.jsonl"
# Exit status of a run that a signal ended: it can go on.
STOPPED = 75
# What the study hears of a record.
_SPOKEN = ("step", "loss", "bits_per_byte", "seconds_per_step", "final")
# How long to wait for the process of an interrupted study that is still saving.
_PATIENCE = 120


class TimedTrainer(Trainer):
    """A trainer that times its steps, and whose evaluation at the end is preceded by one like those along the way, so that
    a curve ends where its run does. A short run of a sweep has only that."""

    def __init__(self, run: Any, observer: Any, *, short: bool) -> None:
        super().__init__(run, observer)
        self.short = short
        self.pending: list[dict[str, float]] = []
        self.times_file = run.path / STEPS
        if run.parallel.main:
            kept = [line for line in read_steps(run.path) if line["step"] <= self.progress.step]
            _write(self.times_file, "".join(json.dumps(line) + "\n" for line in kept))

    def step(self, batch: Any) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        record = super().step(batch)
        taken = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        self.parallel.add(taken)
        self.pending.append({"step": self.progress.step, "wall": time.perf_counter() - wall, "cpu": float(taken)})
        return record

    def ends_as_it_began(self) -> bool:
        return True

    def evaluate(self, final: bool) -> None:
        if not (final and self.short):
            super().evaluate(final)

    def save(self) -> bool:
        # Before the checkpoint: whoever resumes from it finds the times of all its steps.
        if self.parallel.main:
            try:
                with self.times_file.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in self.pending)
            except OSError as error:
                raise write_error(f"{self.times_file}: cannot be written", error) from None
        self.pending = []
        saved = super().save()
        self.saver.wait()  # what it writes must not be in the seconds of the steps
        return saved


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
    from cadre.kernels.allocator import keep_freed_memory
    from cadre.train.parallel.launch import joined
    from cadre.train.recipe import read_recipe
    from cadre.train.resume import resume
    from cadre.train.run import start

    keep_freed_memory()
    recipe = read_recipe(str(recipe_file))
    with joined(recipe.parallel.timeout) as (parallel, device):
        speaker: Speaker | Silent = Speaker() if parallel.main else Silent()
        begun = parallel.agree(parallel.main and _begun(out))
        if begun:
            run = resume(out, recipe, device, speaker.note, parallel)
        else:
            run = start(recipe, out, device, speaker.note, parallel)
        trainer = TimedTrainer(run, speaker, short=kind == "sweep")
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


def _finish(trainer: TimedTrainer, ended: Result, kind: str) -> None:
    run, out = trainer.run, trainer.run.path
    result = {**asdict(ended), **step_times(out), "flops_per_token": trainer.flops_per_token, "diverged": None}
    result["acceptance"], result["drafting"] = [], None
    if kind == "run":
        if len(run.model.mtp):
            held_out, length = run.data.held_out, run.recipe.data.seq_len
            # Of several processes none has the model whole, but what they have saved is.
            whole = run.model if run.parallel.size == 1 else load(out / "model")[0]
            result["acceptance"] = acceptance(whole, held_out, length)
            result["drafting"] = drafting_rates(out / "model", held_out, length)
        from cadre.train.report import write_report

        write_report(out, {"name": run.recipe.name, "config": run.config.to_hf(), "result": asdict(ended)})
    _write(out / RESULT, json.dumps(result))


def read_steps(run_dir: Path) -> list[dict[str, float]]:
    """The timed steps; a torn last line is left out."""
    file = run_dir / STEPS
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return lines


def step_times(run_dir: Path) -> dict[str, Any]:
    """Wall and CPU seconds of all optimizer steps, and their medians; evaluations are not in them."""
    steps = read_steps(run_dir)
    times: dict[str, Any] = {}
    for kind in ("wall", "cpu"):
        seconds = [line[kind] for line in steps]
        times[f"{kind}_seconds"] = sum(seconds)
        times[f"{kind}_step_median"] = statistics.median(seconds) if seconds else 0.0
    times["timed_steps"] = len(steps)
    return times


def read_curve(run_dir: Path) -> list[tuple[int, float]]:
    """Step and held-out bits per byte of the evaluations during the run, all of the same part of the text."""
    found = {r["step"]: r["bits_per_byte"] for r in read_metrics(run_dir) if "bits_per_byte" in r and not r.get("final")}
    return sorted((step, value) for step, value in found.items() if value is not None)


def _wait_for(out: Path) -> None:
    """Until no other process trains in `out`: an interrupted study's may be saving still."""
    from cadre.train.run import only_writer

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
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise write_error(f"{path}: cannot be written", error) from None


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 75 stopped by a signal, 1 and 2 as `cadre`."""
    from cadre.train.parallel.launch import launch, started

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
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
