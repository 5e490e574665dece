"""Tokenising that is interrupted, and goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cadre.data import pace, tokenising
from cadre.data import prepare as preparing
from cadre.data.pace import Pace
from cadre.data.prepare import prepare
from cadre.data.sources import Document
from cadre.data.split import TextChangedError
from cadre.data.tokenising import unfinished
from cadre.errors import RunError, UsageError

TEXTS = [f"Document {i} says that {i * i} is the square of {i}.\n\nAnd {'so ' * i}on." for i in range(20)]
CHAT = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}]


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch) -> None:
    """Many shards, many pieces, and how far it came is written down before each document."""
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenising, "SHARD_TOKENS", 37)
    monkeypatch.setattr(tokenising, "CHUNK", 23)
    monkeypatch.setattr(tokenising, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nobody pulls the plug


def corpus(folder: Path, *, chats: bool) -> list[str]:
    lines = [{"text": text} for text in TEXTS]
    if chats:
        lines[3:3] = lines[17:17] = [{"messages": CHAT}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:12]))
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[12:]))
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Interrupts:
    """Interrupts after as many pieces as it is told, counted from where the work goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after, self.written = 10**9, 0
        encode = tokenising._Encoder.add

        def add(*given) -> None:
            encode(*given)
            self.written += 1
            if self.written >= self.after:
                raise KeyboardInterrupt

        monkeypatch.setattr(tokenising._Encoder, "add", add)


@pytest.mark.parametrize("chats", [False, True])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(2, 30), min_size=1, max_size=4))
def test_who_is_interrupted_goes_on_and_ends_the_same(tmp_path_factory, chats, places):
    folder = tmp_path_factory.mktemp("text")
    source = corpus(folder, chats=chats)
    said: list[str] = []
    choices = {"vocab_size": 270, "held_out": 0.2, "out": folder / "out", "progress": said.append}
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupts = Interrupts(monkeypatch)
        whole = content(prepare(source, vocab_size=270, held_out=0.2, out=folder / "whole").path)
        pieces = interrupts.written
        for place in places:
            interrupts.after, interrupts.written = place, 0
            with pytest.raises(KeyboardInterrupt):
                prepare(source, **choices)
            assert f"what is tokenised stays in {folder / '.out.partial'}" in said[-1]
        interrupts.after, interrupts.written = 10**9, 0
        assert content(prepare(source, **choices).path) == whole
        # The piece at which it was interrupted is made again, none before it; and no tokenizer is trained again.
        assert interrupts.written == pieces - sum(place - 1 for place in places) > 0
    assert sum("training a tokenizer" in line for line in said) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "b.jsonl", "out", "whole"]


@pytest.fixture
def interrupted(tmp_path, monkeypatch) -> tuple[list[str], Path, dict[str, bytes]]:
    """The source, what was left of its tokenising into "out", and what the whole looks like."""
    source = corpus(tmp_path, chats=True)
    whole = content(prepare(source, vocab_size=270, out=tmp_path / "whole").path)
    with monkeypatch.context() as context:
        Interrupts(context).after = 60
        with pytest.raises(KeyboardInterrupt):
            prepare(source, vocab_size=270, out=tmp_path / "out")
    return source, tmp_path / ".out.partial", whole


@pytest.mark.parametrize("lost", ["train-00000.bin", "train-00001.mask", "train.idx", "held_out.jsonl"])
@pytest.mark.parametrize("whole_file", [True, False])
def test_after_a_loss_of_power_it_begins_anew(interrupted, tmp_path, lost, whole_file):
    source, left, whole = interrupted
    if whole_file:
        (left / lost).unlink()
    else:
        (left / lost).write_bytes((left / lost).read_bytes()[:-90])
    assert content(prepare(source, vocab_size=270, out=tmp_path / "out").path) == whole


def test_what_was_begun_of_other_text_or_by_other_code_is_not_gone_on_with(interrupted, tmp_path, monkeypatch):
    source, left, whole = interrupted
    state = json.loads((left / "state.json").read_text())
    (left / "state.json").write_text(json.dumps({**state, "version": "another"}))
    (left / "train-00000.bin").write_bytes(b"\0" * 999)
    assert content(prepare(source, vocab_size=270, out=tmp_path / "out").path) == whole


@pytest.mark.parametrize("error, kept", [
    (UsageError("no"), True), (OSError(errno.EIO, "I/O error"), True), (OSError(errno.ENOSPC, "No space"), False),
    (TextChangedError("no"), False),
])  # fmt: skip
def test_what_is_written_down_outlives_all_but_a_full_disk_and_other_text(interrupted, tmp_path, monkeypatch, error, kept):
    source, left, whole = interrupted

    def fail(*_) -> None:
        raise error

    with monkeypatch.context() as context:
        context.setattr(tokenising._Encoder, "add", fail)
        with pytest.raises((UsageError, RunError)):
            prepare(source, vocab_size=270, out=tmp_path / "out")
    assert (left.exists(), (tmp_path / "out").exists()) == (kept, False)
    assert content(prepare(source, vocab_size=270, out=tmp_path / "out").path) == whole


def test_killed_as_it_is_written_down_or_just_before_it_is_done_nothing_is_lost(interrupted, tmp_path, monkeypatch):
    source, left, whole = interrupted
    (left / ".state.json.123.partial").write_text("{")
    interrupts = Interrupts(monkeypatch)
    with monkeypatch.context() as context:
        context.setattr(preparing, "_publish", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            prepare(source, vocab_size=270, out=tmp_path / "out")
    interrupts.written = 0
    assert content(prepare(source, vocab_size=270, out=tmp_path / "out").path) == whole
    assert interrupts.written == 0


def test_a_file_system_without_locks_is_used_without_them(tmp_path, monkeypatch):
    source = corpus(tmp_path, chats=False)

    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tokenising.fcntl, "flock", flock)
    assert prepare(source, vocab_size=270, out=tmp_path / "out").path == tmp_path / "out"
    Interrupts(monkeypatch).after = 9
    with pytest.raises(KeyboardInterrupt):
        prepare(source, vocab_size=280, out=tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["a.jsonl", "b.jsonl", "out"]
    assert not list(tmp_path.glob(".*.*/*"))


def test_one_at_a_time_and_who_waited_finds_what_the_other_made(tmp_path):
    source = corpus(tmp_path, chats=False)
    said: list[str] = []
    paths: list[Path] = []

    def second() -> None:
        paths.append(prepare(source, vocab_size=270, out=tmp_path / "out", progress=said.append).path)

    with unfinished(tmp_path / "out", said.append) as held:
        other = threading.Thread(target=second)
        other.start()
        while "another process is preparing this text: waiting for it" not in said:
            assert other.is_alive()
        prepare(source, vocab_size=270, out=tmp_path / "made").path.rename(tmp_path / "out")
        assert held.is_dir()
    other.join(60)
    assert paths == [tmp_path / "out"] and not any("tokenising" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]


def test_long_work_says_how_far_it_is(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    said: list[str] = []
    work = Pace(said.append, "tokenising", total=4_000_000, done=1_000_000)
    for _ in range(300):
        now[0] += 1.0
        work.add(10_000)
    assert said[0] == "tokenising: 1.1M characters, 10k/s, 28%, left 4:50"
    assert said[-1] == "tokenising: 3.91M characters, 10k/s, 98%, left 0:09"
    assert len(said) == 21  # every ten seconds, then a tenth of the time apart
    reading, said[:] = Pace(said.append, "reading"), []
    for _ in reading.of([Document("a", "x" * 500)] * 3):
        now[0] += 6.0
    assert said == ["reading: 1k characters, 83.3/s"]


def test_starts_and_masks_of_many_shards_are_those_of_one(interrupted, monkeypatch, tmp_path):
    source, _, _ = interrupted
    monkeypatch.setattr(tokenising, "SHARD_TOKENS", 10**6)
    one, many = (prepare(source, vocab_size=270, out=tmp_path / name) for name in ("one", "whole"))
    np.testing.assert_array_equal(one.train.document_starts, many.train.document_starts)
    np.testing.assert_array_equal(one.train.mask(0, len(one.train)), many.train.mask(0, len(many.train)))
