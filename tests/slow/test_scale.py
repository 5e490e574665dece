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
from tests.train.parallel.test_equal import EVERYTHING, PLAIN, assert_same_run, recipe, several, train
from tests.train.parallel.world import world

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


def test_rows_in_8_bits_change_the_loss_by_little(tmp_path, recipe):
    """Over fifty steps less than DeepSeek-V3 allows for all of its training in 8 bits, 0.25% (its report, section 3.3)."""
    settings = (*PLAIN, "train.batch=16", "train.steps=50", "eval.every=100", "checkpoint.every=100")
    rows = {name: {"expert": 2, "rows": name} for name in ("compute", "fp8")}
    world(2, several, recipe, tmp_path, rows, settings)
    exact, narrow = ([record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record] for name in rows)
    difference = [abs(a - b) / a for a, b in zip(exact, narrow, strict=True)]
    mean = sum(difference) / len(exact)
    print(f"fp8 rows over {len(exact)} steps: the loss differs by {mean:.4%} on average, by {max(difference):.4%} at most")
    assert 0 < max(difference) < 0.0025


TWIN = (
    "model.vocab_size=300", "model.hidden_size=32", "model.num_hidden_layers=3", "model.num_attention_heads=2",
    "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8",
    "model.intermediate_size=48", "model.n_routed_experts=8", "model.num_experts_per_tok=3", "model.moe_intermediate_size=16",
    "data.seq_len=16", "train.steps=6", "train.batch=16", "train.micro_batch=2", "train.dtype=float32", "train.log_every=1",
    "schedule.warmup_steps=2", "eval.every=100", "eval.prompts=[]",
)  # fmt: skip


@pytest.mark.parametrize("name", ["node", "v2-lite"])
def test_the_recipes_for_many_cards_step_on_four_processes(tmp_path, recipe, name):
    """Their twins, scaled down to a machine without a card."""
    settings = (*TWIN, f"data.source={json.dumps(str(recipe.parent / 'corpus'))}")
    train(Parallel(), Path(name), tmp_path / "alone", settings)
    layouts = {"auto": {}, "4, replicas 2, expert 2": {"replicas": 2, "expert": 2}}
    world(4, several, Path(name), tmp_path, layouts, settings)
    for layout in layouts:
        assert_same_run(tmp_path / "alone", tmp_path / layout)


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
        """Wait for a step and, from the fifth on, for a checkpoint, which is written beside the training; the processes by
        rank."""
        end = time.monotonic() + PATIENCE
        while self.step() < step or (step >= 5 and not checkpoints(self.out)):
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
    assert "started again: rank 1 ended without a word" in job.said()
    assert [record["event"] for record in read_metrics(job.out) if "event" in record] == ["resumed", "finished"]
    assert_same_run(plain.out, job.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_after_the_step_and_saves(tmp_path, recipe, number):
    job = Job(recipe, tmp_path / "run", 100000)
    job.until(7)
    job.process.send_signal(number)
    assert job.end() == 128 + number, job.said()
    assert "death signal" not in job.said()  # as torch's agent calls it
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


class Machines:
    """Two torchrun agents that find each other, as on two machines that share a folder."""

    def __init__(self, folder: Path, recipe: Path, steps: int, *settings: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.out = folder, folder / "run"
        self.agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts",
                      "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr",
                      "127.0.0.1"]  # fmt: skip
        self.work = ["-m", "cadre", "train", str(recipe), "--out", str(self.out), "--steps", str(steps), *settings]
        for setting in ("train.log_every=1", "checkpoint.every=5", "parallel.timeout=0.5"):
            self.work += ["--set", setting]
        self.agents = [self.start(number) for number in range(2)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with self.log(number).open("a") as log:
            # Which of them has the store: both are at the address, and one would otherwise be it by chance.
            agent = [*self.agent, "--rdzv-conf", f"is_host={number == 0}"]
            return subprocess.Popen([*agent, *self.work], stdout=log, stderr=log, env=environment)

    def log(self, number: int) -> Path:
        return self.folder / f"machine{number}.log"

    def worker(self, number: int) -> psutil.Process:
        (worker,) = psutil.Process(self.agents[number].pid).children()
        return worker

    def until(self, step: int) -> None:
        end = time.monotonic() + PATIENCE
        while not any(r.get("step", 0) >= step for r in read_metrics(self.out) if "event" not in r):
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def said(self) -> list[str]:
        return [self.log(number).read_text() for number in range(2)]

    def end(self) -> list[int]:
        return [agent.wait(PATIENCE) for agent in self.agents]


def test_two_machines(tmp_path, recipe):
    machines = Machines(tmp_path, recipe, 4, "--set", "parallel.expert=2")
    assert machines.end() == [0, 0], machines.said()
    assert sorted("step 3/4" in text for text in machines.said()) == [False, True]


@pytest.mark.parametrize("victim", [0, 1])
def test_two_machines_start_again_when_a_process_of_one_is_killed(tmp_path, recipe, victim):
    machines = Machines(tmp_path, recipe, 300)
    machines.until(12)
    machines.worker(victim).kill()
    assert machines.end() == [0, 0], machines.said()
    events = [record["event"] for record in read_metrics(machines.out) if "event" in record]
    assert [event for event in events if event != "risen"] == ["resumed", "finished"]  # so small a text is soon known by heart


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "evicted"])
def test_a_machine_that_is_replaced_goes_on(tmp_path, recipe, number):
    """The agent of the second machine ends, and its worker with it; the same line is started there again."""
    machines = Machines(tmp_path, recipe, 400)
    machines.until(12)
    second = machines.worker(1)
    machines.agents[1].send_signal(number)
    machines.agents[1].wait(PATIENCE)
    second.wait(PATIENCE)
    assert machines.agents[0].poll() is None, machines.said()
    machines.agents[1] = machines.start(1)
    assert machines.end() == [0, 0], machines.said()
    assert read_metrics(machines.out)[-1]["event"] == "finished"
