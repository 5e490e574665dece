"""Timing models in turn, each in a process of its own that makes a step when told: so they do not disturb each other's memory,
and each one's peak can be told."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from cadre.errors import RunError, UsageError, one_line
from cadre.kernels.allocator import keep_freed_memory
from cadre.kernels.limits import default_device, peak_memory_bytes
from cadre.model.config import ModelConfig
from cadre.train.bench.step import WARM_UP, TrainingStep, speed

# Makes what is timed: something that makes one step and returns its seconds. It travels to the process, so it is a
# function of a module, or a `partial` of one.
Build = Callable[[], Callable[[], float]]


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker: its peak, and what it held before it built anything (the libraries)."""

    before: int
    peak: int


class Worker:
    """One such process, from `with` to its end.

    `step` and `memory` raise `UsageError` or `RunError` as the work did; any other failure of it, and its death (memory,
    mostly), is a `RunError` that begins with `name`.
    """

    def __init__(self, name: str, build: Build) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()  # readable when there is something to receive
        arguments = (theirs, name, build, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._theirs = theirs

    def __enter__(self) -> Worker:
        self._process.start()
        self._theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()

    def step(self, within: float = math.inf) -> float:
        """Make one step; its seconds. The first call also builds. Raises `RunError` when that takes more than `within` seconds
        altogether; the worker is of no use then."""
        self.send("step")
        if within < math.inf:
            with self._alive():
                if not self.connection.poll(within):
                    raise RunError(f"{self.name}: not done with a step within {within:,.1f} s")
        return self.receive()

    def memory(self) -> Memory:
        self.send("memory")
        return self.receive()

    def send(self, what: str) -> None:
        with self._alive():
            self.connection.send(what)

    def receive(self) -> Any:
        with self._alive():
            answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self._process.join(5)
            raise RunError(
                f"{self.name}: its process died (exit status {self._process.exitcode}), most likely for want of memory: "
                "use a smaller model, batch or sequence"
            ) from None


class Team:
    """Workers that make every step together: processes of one run."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers

    def step(self) -> float:
        """Make one step; the seconds of the slowest. Raises what the first of them to fail raises, without waiting for those
        that it leaves hanging."""
        for worker in self.workers:
            worker.send("step")
        left, seconds = list(self.workers), []
        while left:
            ready = multiprocessing.connection.wait([worker.connection for worker in left])
            seconds += [worker.receive() for worker in left if worker.connection in ready]
            left = [worker for worker in left if worker.connection not in ready]
        return max(seconds)


def take_turns(workers: Sequence[Worker | Team], steps: int, note: Callable[[int], None] | None = None) -> list[list[float]]:
    """The seconds of `steps` steps of each worker, one of each in turn, after two of each that warm up. `note` is told how
    many rounds are done."""
    seconds: list[list[float]] = [[] for _ in workers]
    for turn in range(WARM_UP + steps):
        for worker, taken in zip(workers, seconds, strict=True):
            taken.append(worker.step())
        if note is not None:
            note(turn + 1)
    return [taken[WARM_UP:] for taken in seconds]


@dataclass(frozen=True)
class Taken:
    """What a worker's timed steps took: the seconds of each, and its memory after them."""

    seconds: list[float]
    memory: Memory


def race(builds: dict[str, Build], steps: int, note: Callable[[int], None] | None = None) -> list[Taken]:
    """What `steps` steps of each build took, each made by a worker of its name. They `take_turns`, of which `note` is told."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, build)) for name, build in builds.items()]
        seconds = take_turns(workers, steps, note)
        return [Taken(spent, worker.memory()) for spent, worker in zip(seconds, workers, strict=True)]


def ours(config: ModelConfig, *, batch: int, seq_len: int, dtype: torch.dtype, fp8_experts: bool = False) -> Build:
    """Cadre's own step, with memory kept as `cadre train` keeps it."""
    return partial(_ours, config, batch, seq_len, dtype, fp8_experts)


def _ours(config: ModelConfig, batch: int, seq_len: int, dtype: torch.dtype, fp8_experts: bool) -> TrainingStep:
    keep_freed_memory()
    shape: dict[str, Any] = {"batch": batch, "seq_len": seq_len}
    return TrainingStep(config, **shape, dtype=dtype, device=default_device(), fp8_experts=fp8_experts)


def result(config: ModelConfig, *, batch: int, seq_len: int, taken: Taken) -> dict[str, Any]:
    """`speed` of a worker's steps, and its peak memory."""
    return {**speed(config, batch=batch, seq_len=seq_len, seconds=taken.seconds), "peak_memory_bytes": taken.memory.peak}


def _serve(connection: Connection, name: str, build: Build, threads: int) -> None:
    """The process: answers until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked ends this process
    torch.set_num_threads(threads)
    before = peak_memory_bytes(torch.device("cpu"))
    step: Callable[[], float] | None = None
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        answer: Any
        try:
            if what == "memory":
                device = default_device()
                answer = Memory(before if device.type == "cpu" else 0, peak_memory_bytes(device))
            else:
                step = step or build()
                answer = step()
        except (UsageError, RunError) as error:
            answer = error
        except Exception as error:
            answer = RunError(f"{name}: " + one_line(f"{type(error).__name__}: {error}")[:300])
        connection.send(answer)


class TimeLeft:
    """How long the rest of some work takes, from how long its beginning took. Work is in any unit that grows with time,
    such as FLOPs."""

    def __init__(self, work: float) -> None:
        self.work, self.done, self.began = work, 0.0, time.perf_counter()

    def add(self, work: float) -> None:
        self.done += work

    def __str__(self) -> str:
        if not self.done:
            return "?"
        minutes, seconds = divmod(round((time.perf_counter() - self.began) * (self.work / self.done - 1)), 60)
        return f"{minutes}:{seconds:02}"
