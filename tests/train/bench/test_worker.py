import os
import signal
import time

import psutil
import pytest
import torch

from cadre.errors import RunError, UsageError
from cadre.train.bench import worker as module
from cadre.train.bench.worker import Memory, Taken, TimeLeft, Worker, ours, race, result, take_turns
from tests.shapes import small
from tests.workers import Here, Scripted


class Trouble:
    """Something else goes wrong at every step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        if self.calls == 1:
            raise UsageError("the sequence is too long")
        if self.calls == 2:
            raise ValueError("no such\nkernel")
        if self.calls == 3:
            return float(torch.get_num_threads())
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0


def test_a_worker_steps_in_a_process_of_its_own_whose_memory_is_its_own():
    held = torch.ones(200 * 2**20)  # what this process holds is none of the worker's
    with Worker("cadre", ours(small("deepseek_v3"), batch=2, seq_len=8, dtype=torch.float32)) as worker:
        (process,) = [p for p in psutil.Process().children() if p.pid == worker._process.pid]
        assert 0 < worker.step() < 60
        memory = worker.memory()
        assert 50 * 2**20 < memory.before <= memory.peak < held.nbytes
        assert process.memory_info().rss <= memory.peak * 1.02
    assert not process.is_running()


def test_what_goes_wrong_in_a_worker_is_one_line_here():
    with Worker("the peer", Trouble) as worker:
        with pytest.raises(UsageError, match="the sequence is too long"):
            worker.step()
        with pytest.raises(RunError, match=r"^the peer: ValueError: no such kernel$"):
            worker.step()
        assert worker.step() == torch.get_num_threads()  # as many threads as this process computes with
        with pytest.raises(RunError, match=r"^the peer: its process died \(exit status -9\), most likely for want of memory"):
            worker.step()


class Slow:
    def __call__(self) -> float:
        time.sleep(600)
        return 600.0


def test_a_step_that_takes_too_long_is_not_waited_for():
    with Worker("the peer", Slow) as worker:
        with pytest.raises(RunError, match=r"^the peer: not done with a step within 0\.5 s$"):
            worker.step(within=0.5)
        process = psutil.Process(worker._process.pid)
    assert not process.is_running()


def test_workers_take_turns_and_warm_up(monkeypatch):
    monkeypatch.setattr(Scripted, "seconds", staticmethod(lambda build: build()))
    monkeypatch.setattr(Here, "turns", [])
    rounds = []
    workers = [Scripted("a", lambda: [9.0, 8.0, 1.0, 2.0, 3.0]), Scripted("b", lambda: [7.0, 6.0, 4.0, 5.0, 6.0])]
    assert take_turns(workers, 3, rounds.append) == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert Here.turns == ["a", "b"] * 5 and rounds == [1, 2, 3, 4, 5]


def test_a_race_is_run_by_workers_in_turn_and_gives_what_each_took(monkeypatch):
    monkeypatch.setattr(module, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "seconds", staticmethod(lambda build: build()))
    monkeypatch.setattr(Here, "turns", [])
    rounds = []
    found = race({"a": lambda: [9.0, 8.0, 1.0], "b": lambda: [7.0, 6.0, 4.0]}, 1, rounds.append)
    assert found == [Taken([1.0], Memory(1000, 3000)), Taken([4.0], Memory(1000, 3000))]
    assert Here.turns == ["a", "b"] * 3 and rounds == [1, 2, 3]


def test_result_is_the_median_with_the_peak():
    config = small("llama")
    found = result(config, batch=3, seq_len=4, taken=Taken([2.0, 1.0, 9.0], Memory(5, 77)))
    assert (found["step_seconds_median"], found["tokens_per_second"], found["peak_memory_bytes"]) == (2.0, 6.0, 77)


def test_time_left_follows_from_the_work_done(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    left = TimeLeft(10)
    assert str(left) == "?"
    left.add(1)
    clock.now += 7.0
    assert str(left) == "1:03"  # nine tenths at seven seconds a tenth
    left.add(9)
    assert str(left) == "0:00"
