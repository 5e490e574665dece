"""Conducting a study: prepare, calibrate, sweep, run, measure, report; each part once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from cadre import units
from cadre.errors import RunError, UsageError, writing
from cadre.files import replace_file
from cadre.kernels.limits import default_device, dtype_name, training_dtype
from cadre.plan.hardware import hardware
from cadre.study import decoding, turns
from cadre.study.jobs import AFTER_SECONDS, Job, amount_for, evaluating, plan_jobs, recipe_of, seconds_of
from cadre.study.match import Matched, match
from cadre.study.report import write_report
from cadre.study.spec import Study
from cadre.study.state import State, open_state, write_json
from cadre.study.worker import STOPPED
from cadre.train.checkpoint import checkpoints, step_of
from cadre.train.parallel.group import Parallel
from cadre.train.parallel.layout import compose
from cadre.train.run import prepare_data

Note = Callable[[str], None]

# Rounds in which the arms' steps are timed in turn: before, to plan by, and after all runs, to compare by.
_ROUNDS_BEFORE, _ROUNDS_AFTER = 6, 16
# How long a run's process gets to save when the study is interrupted.
_SAVING = 300


class Watch(Protocol):
    """Whoever watches a study: `note` for what happened, `moving` for where it is just now."""

    def note(self, text: str) -> None: ...

    def moving(self, text: str) -> None: ...


def begin(
    study: Study, text_hash: str, path: Path, *, quick: bool, minutes: float | None, rent: float | None, cpu: str, watch: Watch,
    source: list[str] | None = None, processes: int = 1,
) -> State:  # fmt: skip
    """Resolve a study in an empty directory: matched arms, step times, runs. `cpu`: the processor's name, for the
    record. `source`: text in place of the study's. `processes`: how many train every run. Raises `UsageError` for arms that
    cannot be matched, a budget too small, and a directory that holds anything else."""
    _refuse_used(path)
    base = study.base_recipe()
    if source:
        base = base.model_copy(update={"data": base.data.model_copy(update={"source": source, "weights": None})})
    # Arms that cannot be matched are refused before any text is read; the vocabulary that was asked for is what is there,
    # unless the text is too small for it.
    for arm in match(study, base, base.model.get("vocab_size") or base.data.vocab_size or 4096):
        _check_layout(arm, processes)
    data = prepare_data(base.data, base.model.get("vocab_size"), watch.note, Parallel())
    held_out_tokens = int(data.manifest["held_out"]["tokens"])
    if not held_out_tokens:
        share = base.data.held_out
        raise UsageError(f"study {study.name}: data.held_out is {share} and leaves nothing to compare by: raise it")
    arms = match(study, base, data.vocab_size)
    dtype: str = base.train.dtype
    if dtype == "auto":  # once for all: each run would measure anew, and might choose differently
        dtype = dtype_name(training_dtype(default_device()))
    hourly, hourly_source = rent_of(study, rent)
    path.mkdir(parents=True, exist_ok=True)
    probe = {a.name: recipe_of(Job("run", a.name, study.seeds[0], 1000, 1.0), a.recipe, 1.0, 10, dtype) for a in arms}
    watch.note(f"timing a step of each of {len(arms)} arms, in turn")
    seconds = turns.step_seconds(probe, path / ".turns", _ROUNDS_BEFORE, processes=processes, note=watch.moving)
    amount = study.budget.amount
    if minutes is not None:
        amount = amount_for(study, arms, seconds, hourly, minutes * 60, held_out_tokens)
    jobs = plan_jobs(study, arms, seconds, hourly, amount)
    state = State(
        path, study, text_hash, quick, minutes, {arm.name: arm for arm in arms}, jobs, seconds, amount, hourly, hourly_source,
        dtype, held_out_tokens, len(data.train), {**machine(cpu), "processes": processes},
    )  # fmt: skip
    state.save()
    return state


def conduct(state: State, watch: Watch) -> None:
    """Everything that is left to do, then the report. Raises `KeyboardInterrupt` once the run at work has saved, `RunError`
    if a run fails."""
    clock = Clock(state)
    runs = [job for job in state.jobs if job.kind == "run"]
    for number, job in enumerate(state.jobs, start=1):
        if state.result(job) is None:
            _train(state, job, f"{number}/{len(state.jobs)}", clock, watch)
            # After each round of all arms there is something to see.
            if job.kind == "run" and job.arm == runs[-1].arm and job is not runs[-1]:
                watch.note(f"so far: {write_report(state)}")
        clock.done(job)
    if not (state.path / "turns.json").exists():
        watch.note("timing steps of the trained arms, in turn")
        write_json(state.path / "turns.json", _turns(state, watch))
    if not (state.path / "decode.json").exists():
        watch.note("timing decoding, in turn")
        configs, dtype = {n: a.config for n, a in state.arms.items()}, getattr(torch, state.dtype)  # as the runs' models lie
        rates = decoding.decode_rates(configs, state.study.decode, dtype, watch.moving)
        write_json(state.path / "decode.json", rates)
    watch.note(f"report: {write_report(state)}")


def _refuse_used(path: Path) -> None:
    """Raise `UsageError` for a folder that holds anything but what timing has left there."""
    try:
        if path.exists() and (not path.is_dir() or any(p.name != ".turns" for p in path.iterdir())):
            raise UsageError(f"--out {path}: holds other files: choose an empty folder, or one of a study to continue it")
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be used ({error.strerror}): choose another folder") from None


def _check_layout(arm: Matched, processes: int) -> None:
    """Refuse an arm that so many processes cannot train together. Raises `UsageError`."""
    if processes > 1:
        try:
            compose(arm.recipe, arm.config, processes)
        except UsageError as error:
            raise UsageError(f"--nproc {processes}, arm {arm.name}: {error}") from None


class Clock:
    """Time left over the whole study, from what steps have taken so far."""

    def __init__(self, state: State) -> None:
        self.state, self.left = state, {job.folder: job for job in state.jobs}
        # What runs that were interrupted go on from.
        self.behind = {folder: _saved_step(state.path / folder) for folder in self.left}
        self.measured = dict(state.step_seconds)
        runs = {name: sum(job.arm == name for job in state.jobs) for name in state.arms}
        self.evaluation = {
            name: evaluating(state.study, arm, state.step_seconds[name], state.held_out_tokens) / max(1, runs[name])
            for name, arm in state.arms.items()
        }

    def done(self, job: Job) -> None:
        self.left.pop(job.folder, None)

    def heard(self, arm: str, seconds_per_step: float) -> None:
        """What a step of the arm takes now: the machine may have become slower, for every arm alike."""
        slower = seconds_per_step / self.state.step_seconds[arm]
        self.measured = {name: seconds * slower for name, seconds in self.state.step_seconds.items()}

    def seconds(self, job: Job | None = None, step: int = 0) -> float:
        """From now on, with `job` at `step`."""
        total = sum(seconds_of(j, self.measured[j.arm], self.evaluation[j.arm]) for j in self.left.values())
        behind = {**self.behind, **({job.folder: step} if job else {})}
        total -= sum(behind[folder] * self.measured[j.arm] for folder, j in self.left.items())
        if not (self.state.path / "decode.json").exists():
            total += AFTER_SECONDS * len(self.state.arms)
        return max(0.0, total)


def _saved_step(run: Path) -> int:
    """The step of the newest checkpoint of a run, 0 without one."""
    return max((step_of(checkpoint) for checkpoint in checkpoints(run)), default=0)


def rent_of(study: Study, rent: float | None) -> tuple[float, str]:
    """US dollars an hour of this machine, and where the figure comes from."""
    if rent is not None:
        return rent, "--rent"
    if study.rent is not None:
        return study.rent, "the study's rent"
    name = "h100" if default_device().type == "cuda" else "cpu-2core"
    return hardware(name).rent, f"cadre plan's figure for {name}; --rent for yours"


def machine(cpu: str) -> dict[str, Any]:
    """What the study runs on."""
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _train(state: State, job: Job, number: str, clock: Clock, watch: Watch) -> None:
    """One run in a process of its own, from where it stands to its end."""
    arm, factor = state.arms[job.arm], state.factor(job)
    recipe = recipe_of(job, arm.recipe, factor, state.study.evaluations, state.dtype)
    out = state.path / job.folder
    file = out.with_name(f"{out.name}.toml")
    with writing(file):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, recipe.to_toml().encode())
    what = f"{job.arm}, rates x {factor:g}" + ("" if job.kind == "sweep" else f", seed {job.seed}")
    watch.note(f"[{number}] {'sweep: ' if job.kind == 'sweep' else ''}{what}, {job.steps} steps; "
               f"{units.clock(clock.seconds())} left in all")  # fmt: skip
    command = [sys.executable, "-m", "cadre.study.worker", str(file), str(out), job.kind, str(state.processes)]
    with (out.parent / f"{out.name}.log").open("a+b") as log:
        before = log.tell()  # what earlier tries have said
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        with _ending(process, watch):
            _listen(process, job, number, what, clock, watch)
            status = process.wait()
        log.seek(before)
        said = log.read().decode(errors="replace").strip().splitlines()
    if status == STOPPED:
        raise KeyboardInterrupt
    if status or state.result(job) is None:
        reason = said[-1] if said and status > 0 else "its process died, most likely for want of memory"
        raise RunError(f"run {job.folder}: {reason} (exit status {status}; log: {out}.log)")


def _listen(process: subprocess.Popen[str], job: Job, number: str, what: str, clock: Clock, watch: Watch) -> None:
    assert process.stdout is not None
    recent: list[float] = []
    for line in process.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if not isinstance(said, dict):  # a library's print
            continue
        if "seconds_per_step" in said:
            recent = [*recent[-4:], said["seconds_per_step"]]
            clock.heard(job.arm, statistics.median(recent))
        if "bits_per_byte" in said:
            watch.moving(f"[{number}] {what}: step {said['step']}/{job.steps}  {said['bits_per_byte']:.4f} bits per byte")
            if said["step"] >= job.steps:
                watch.note(f"[{number}] {what}: {said['bits_per_byte']:.4f} bits per byte"
                           + (", all held-out text" if said.get("final") else ""))  # fmt: skip
        elif "step" in said:
            loss = f"  loss {said['loss']:.3f}" if said.get("loss") is not None else ""
            watch.moving(f"[{number}] {what}: step {said['step']}/{job.steps}{loss}  "
                         f"left in all {units.clock(clock.seconds(job, said['step']))}")  # fmt: skip


@contextmanager
def _ending(process: subprocess.Popen[str], watch: Watch) -> Iterator[None]:
    """Whatever ends the study, be it a terminal that is gone, ends the run's process: it would train on and keep the run's
    folder from whoever continues the study. It saves first."""
    try:
        yield
    except BaseException:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.send_signal(signal.SIGTERM)  # which it may have had already, from the terminal
            with suppress(OSError):
                watch.note("stopping: the run at work saves")
            if process.stdout is not None:
                process.stdout.close()
            process.wait(_SAVING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            signal.signal(signal.SIGINT, previous)
        raise


def _turns(state: State, watch: Watch) -> dict[str, Any]:
    """Step times of the trained arms, by arm. An arm whose runs all diverged has no weights to go on from and starts anew."""
    recipes, models = {}, {}
    for job in state.jobs:
        if job.kind == "run" and job.seed == state.study.seeds[0]:
            arm = state.arms[job.arm]
            recipes[job.arm] = recipe_of(job, arm.recipe, state.factor(job), state.study.evaluations, state.dtype)
            model = state.path / job.folder / "model"
            if model.is_dir():
                models[job.arm] = model
    began = time.strftime("%Y-%m-%d %H:%M")
    seconds = turns.step_seconds(
        recipes, state.path / ".turns", _ROUNDS_AFTER, models=models, processes=state.processes, note=watch.moving
    )
    return {"step_seconds": seconds, "rounds": _ROUNDS_AFTER, "measured": began}


def find(path: Path, study: Study | None, text_hash: str | None, quick: bool | None) -> State | None:
    """The study that `path` holds, None if it holds none. Raises `UsageError` if it is not the one that is asked for; `study`
    is None for whichever it is."""
    state = open_state(path)
    if state is None:
        return None
    if study is not None and state.text_hash != text_hash:
        raise UsageError(f"--out {path}: holds study {state.study.name}, and its text was another: choose another folder, or "
                         f"leave the study's name out to continue the one that is there")  # fmt: skip
    if quick and not state.quick:
        raise UsageError(f"--out {path}: the study there began without --quick: choose another folder, or leave --quick out "
                         "to continue it")  # fmt: skip
    if study is not None and quick is False and state.quick:
        raise UsageError(f"--out {path}: the study there began with --quick: choose another folder, or leave the study's name "
                         "out to continue it")  # fmt: skip
    return state
