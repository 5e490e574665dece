"""Checkpoints are written while the training goes on, from a true copy, one at a time, and no failure is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from cadre.errors import RunError
from cadre.train import checkpoint, saving
from cadre.train.checkpoint import Tensors, checkpoints
from cadre.train.saving import Saver
from cadre.train.trainer import Trainer
from tests.train.conftest import Watcher

PATIENCE = 60


def tensors(megabytes: int = 8) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1 << 18, generator=generator) for _ in range(megabytes)]
    return Tensors({f"w{i}": row for i, row in enumerate(rows[1::2])}, {f"m{i}": row for i, row in enumerate(rows[::2])})


def nobody(text: str) -> None:
    raise AssertionError(text)


def test_what_is_written_is_what_was_saved_whatever_the_training_does_meanwhile():
    held, go, written = tensors(), threading.Event(), []
    before = {name: tensor.clone() for name, tensor in held.weights.items()}
    saver = Saver(nobody)

    def write(copies: Tensors) -> None:
        assert go.wait(PATIENCE)
        written.append({name: tensor.clone() for name, tensor in copies.weights.items()})

    saver.save(held, write)
    for tensor in held.weights.values():
        tensor.add_(1.0)
    go.set()
    saver.wait()
    saver.save(held, write)
    saver.wait()
    for name, tensor in before.items():
        assert torch.equal(written[0][name], tensor) and torch.equal(written[1][name], tensor + 1.0)


def test_copies_that_are_prepared_are_those_that_are_written():
    held, saver, written = tensors(), Saver(nobody), []
    saver.prepare(held)
    places = {name: copy.data_ptr() for name, copy in saver._copies.items()}
    for tensor in held.moments.values():
        tensor.add_(1.0)
    saver.save(held, written.append)
    saver.wait()
    assert {name: copy.data_ptr() for name, copy in {**written[0].weights, **written[0].moments}.items()} == places
    assert all(torch.equal(written[0].moments[name], tensor) for name, tensor in held.moments.items())


def test_what_is_being_written_is_not_prepared_over():
    """A run that keeps its best model writes the one it began with during its first step."""
    held, written = tensors(), []
    saver, before = Saver(nobody), held.weights["w0"].clone()

    def write(copies: Tensors) -> None:
        time.sleep(0.3)
        written.append(copies.weights["w0"].clone())

    saver.save(Tensors(held.weights, {}), write)
    held.weights["w0"].add_(1.0)
    saver.prepare(held)
    saver.wait()
    assert torch.equal(written[0], before)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_prepares_after_its_first_step(lab, monkeypatch, resumed):
    run = lab.start("run")
    if resumed:
        lab.train(run, {6: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        run = lab.resume("run")
    seen: list[str] = []
    prepare, step = Saver.prepare, Trainer.step

    def prepared(saver, tensors):
        assert tensors.moments
        seen.append("prepare")
        prepare(saver, tensors)

    monkeypatch.setattr(Saver, "prepare", prepared)
    monkeypatch.setattr(Trainer, "step", lambda trainer, batch: (seen.append("step"), step(trainer, batch))[1])
    lab.train(run)
    assert seen[:3] == ["step", "prepare", "step"] and seen.count("prepare") == 1


def test_one_save_at_a_time():
    saver, at_work = Saver(nobody), []

    def write(copies: Tensors) -> None:
        at_work.append("begins")
        time.sleep(0.1)
        at_work.append("ends")

    for _ in range(3):
        saver.save(tensors(2), write)
    saver.wait()
    assert at_work == ["begins", "ends"] * 3


@pytest.mark.parametrize("end", ["wait", "save"])
def test_a_failure_is_raised_once_by_what_comes_next(end):
    saver = Saver(nobody)

    def fail(copies: Tensors) -> None:
        raise RunError("rank 1: the disk is full")

    saver.save(tensors(2), fail)
    with pytest.raises(RunError, match="rank 1: the disk is full"):
        saver.wait() if end == "wait" else saver.save(tensors(2), fail)
    saver.wait()


def test_without_room_for_a_copy_the_training_waits_and_says_so(monkeypatch):
    monkeypatch.setattr(saving, "free_bytes", lambda device: 2**21)
    notes, threads = [], []
    saver = Saver(notes.append)
    for megabytes in (2, 3):
        saver.save(tensors(megabytes), lambda copies: threads.append(threading.current_thread().name))
        saver.wait()
    # The first copy is kept: only the rest of the second counts.
    assert threads == ["saver", "saver"] and notes == []
    saver = Saver(notes.append)
    saver.save(tensors(3), lambda copies: threads.append(threading.current_thread().name))
    assert threads[2] == "MainThread" and notes == [
        "no room for a copy of 0.0 GiB: the training waits while a checkpoint is written"
    ]


def test_a_run_without_room_for_copies_says_so_once(lab, monkeypatch):
    monkeypatch.setattr(saving, "free_bytes", lambda device: 0)
    run = lab.start("run", "checkpoint.every=2")
    _, watcher = lab.train(run)
    assert len(checkpoints(run.path)) > 1
    assert len([note for note in watcher.notes if note.startswith("no room for a copy")]) == 1


class Disk:
    """Writes of one run: the second checkpoint's wait until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.waiting, self.calls, real = threading.Event(), threading.Event(), 0, checkpoint.save_file

        def save_file(*arguments, **options):
            self.calls += 1
            if self.calls == 3:  # weights and moments each
                self.waiting.set()
                assert self.go.wait(PATIENCE)
            real(*arguments, **options)

        monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_steps_go_on_while_a_checkpoint_is_written(lab, monkeypatch):
    """The disk waits for two more steps: a run that waited for the disk would never end."""
    whole = lab.start("whole")
    lab.train(whole)
    disk = Disk(monkeypatch)
    run = lab.start("run", "train.log_every=1")
    lab.train(run, {10: disk.go.set})
    assert disk.waiting.is_set()
    for name in ("weights", "optimizer"):
        files = [load_file(checkpoints(path)[0] / f"{name}.safetensors") for path in (whole.path, run.path)]
        assert checkpoints(run.path)[0].name == "step-00000008" and files[0].keys() == files[1].keys()
        assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_what_is_being_written(lab, monkeypatch, number):
    disk = Disk(monkeypatch)

    def stop() -> None:
        os.kill(os.getpid(), number)
        threading.Timer(0.3, disk.go.set).start()

    run = lab.start("run", "train.log_every=1")
    result, _ = lab.train(run, {9: stop})
    assert result.stopped == number.name
    assert [path.name for path in checkpoints(run.path)] == ["step-00000008", "step-00000009"]


def test_a_full_disk_ends_the_run_before_the_next_checkpoint(lab, monkeypatch):
    real = checkpoint.save_file

    def full(held, path, **options):
        if "step-00000004" in {saved.name for saved in checkpoints(path.parents[2])}:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(held, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = lab.start("run", "train.log_every=1", "train.steps=100", "checkpoint.every=4")
    steps: list[int] = []

    def log(step):
        steps.append(step)
        end = time.monotonic() + 30
        while step == 9 and not trainer.saver.failed and time.monotonic() < end:
            time.sleep(0.01)

    trainer = Trainer(run, Watcher({step: partial(log, step) for step in range(100)}))
    with pytest.raises(RunError, match=r"step-00000008: checkpoint not written, .*: the disk is full"):
        trainer.train()
    assert 8 <= steps[-1] < 12 and [path.name for path in checkpoints(run.path)] == ["step-00000004"]


def test_killed_while_writing_it_has_the_checkpoint_before(lab, monkeypatch):
    lab.train(lab.start("whole"))
    disk = Disk(monkeypatch)
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        threading.Thread(target=lambda: theirs.send(disk.waiting.wait(PATIENCE)), daemon=True).start()
        lab.train(lab.start("run", "train.log_every=1"), {10: lambda: time.sleep(PATIENCE)})

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    assert ours.poll(PATIENCE) and ours.recv()
    process.kill()
    process.join()
    run = lab.folder / "run"
    assert [path.name for path in checkpoints(run)] == ["step-00000004"] and list((run / "checkpoints").glob(".partial-*"))
    disk.calls = 10
    lab.train(lab.resume("run"))
    assert not list((run / "checkpoints").glob(".partial-*"))
    files = [load_file(checkpoints(path)[-1] / "weights.safetensors") for path in (run, lab.folder / "whole")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
