"""Scaling out, at length: fifty steps in every layout, and what may befall a run's processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cadre.train.checkpoint import checkpoints
from cadre.train.metrics import read_metrics
from cadre.train.parallel.group import Parallel
from tests.parallel.test_equal import EVERYTHING, PLAIN, assert_same_run, recipe, several, train
from tests.parallel.world import world

__all__ = ["recipe"]
PATIENCE = 240


@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_fifty_steps_are_the_same_in_every_layout(tmp_path, recipe, settings):
    settings = (*settings, "train.steps=50", "eval.every=25", "checkpoint.every=100")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    twice = {"4, replicas 2": {"replicas": 2}, "4, replicas 2, expert 2": {"replicas": 2, "expert": 2}}
    layouts = {2: {"2": 1, "2, expert 2": 2, "2, replicas 2": {"replicas": 2}},
               4: {"4": 1, "4, expert 2": 2, "4, expert 4": 4, **twice}}  # fmt: skip
    for size, names in layouts.items():
        world(size, several, recipe, tmp_path, names, settings)
        for name in names:
            assert_same_run(tmp_path / "alone", tmp_path / name)


class Job:
    """`cadre train --nproc 2` on the tiny recipe, with `steps` to go."""

    def __init__(self, recipe: Path, out: Path, steps: int, *options: str) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        command = [sys.executable, "-m", "cadre", "train", str(recipe), "--out", str(out), "--nproc", "2"]
        settings = ["--steps", str(steps)]
        for setting in ("checkpoint.every=5", "train.log_every=1", "eval.every=1000"):
            settings += ["--set", setting]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *settings, *options], stdout=log, stderr=log, env=environment)

    def until(self, step: int) -> dict[int, psutil.Process]:
        """Wait for a step; the processes by rank."""
        end = time.monotonic() + PATIENCE
        while self.step() < step:
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.1)
        return {int(child.environ()["RANK"]): child for child in psutil.Process(self.process.pid).children()}

    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.out)), default=0) if self.out.exists() else 0

    def said(self) -> str:
        return self.log.read_text()

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_is_named(tmp_path, recipe, victim):
    job = Job(recipe, tmp_path / "run", 100000)
    job.until(7)[victim].kill()
    assert job.end() == 1
    assert f"cadre: rank {victim} was ended by SIGKILL; continue with: cadre train --resume" in job.said()
    assert checkpoints(job.out)


def test_a_killed_process_is_started_again_and_loses_only_the_steps_since_the_checkpoint(tmp_path, recipe):
    plain = Job(recipe, tmp_path / "plain", 20)
    assert plain.end() == 0, plain.said()
    job = Job(recipe, tmp_path / "run", 20, "--restarts", "1")
    job.until(7)[1].kill()
    assert job.end() == 0, job.said()
    assert [record["event"] for record in read_metrics(job.out) if "event" in record] == ["resumed", "finished"]
    assert_same_run(plain.out, job.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_after_the_step_and_saves(tmp_path, recipe, number):
    job = Job(recipe, tmp_path / "run", 100000)
    job.until(7)
    job.process.send_signal(number)
    assert job.end() == 0, job.said()
    stopped = read_metrics(job.out)[-1]
    assert (stopped["event"], checkpoints(job.out)[-1].name) == ("stopped", f"step-{stopped['step']:08d}")


def test_without_their_launcher_they_save_and_end(tmp_path, recipe):
    job = Job(recipe, tmp_path / "run", 100000)
    ranks = job.until(7)
    job.process.kill()
    _, alive = psutil.wait_procs(list(ranks.values()), PATIENCE)
    assert not alive and read_metrics(job.out)[-1]["event"] == "stopped"


def test_a_process_that_hangs_is_named_after_the_time_out(tmp_path, recipe):
    job = Job(recipe, tmp_path / "run", 100000, "--set", "parallel.timeout=0.2")
    ranks = job.until(7)
    ranks[1].suspend()
    assert job.end() == 1
    assert "cadre: rank 1 did not answer any more (rank 0 lost the other processes: " in job.said()


def test_bad_input_is_said_once_with_status_2(tmp_path, recipe):
    job = Job(recipe, tmp_path / "run", 10, "--set", "parallel.expert=3")
    assert job.end() == 2
    assert job.said().count("parallel.expert is 3, which does not divide the run's 2 processes") == 1


def test_torchrun_starts_it_too(tmp_path, recipe):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cadre", "train"]
    ended = subprocess.run([*command, str(recipe), "--out", str(out), "--steps", "4"], capture_output=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr.decode()
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "finished"


def test_two_machines(tmp_path, recipe):
    """Two agents that find each other, as on two machines that share a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]  # fmt: skip
    work = ["-m", "cadre", "train", str(recipe), "--out", str(out), "--steps", "4", "--set", "parallel.expert=2"]
    machines = [subprocess.Popen([*agent, *work], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    said = [machine.communicate(timeout=PATIENCE)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sorted("step 3/4" in text for text in said) == [False, True]
