"""Waiting for one process that prepares what all need."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cadre.data.prepare import prepare
from cadre.errors import RunError, UsageError
from cadre.train.parallel import turns
from cadre.train.parallel.ranks import Ranks
from cadre.train.parallel.turns import Turns
from tests.runs import write_corpus
from tests.train.parallel.world import world


@pytest.fixture
def stores(monkeypatch) -> Iterator[tuple[dist.Store, dist.Store]]:
    """The same store for two who use it at once."""
    monkeypatch.setattr(turns, "BEAT", 0.1)
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield first, dist.TCPStore("127.0.0.1", first.port, is_master=False, wait_for_workers=False)


def work(store: dist.Store, seconds: float, fails: bool = False) -> None:
    try:
        with Turns(store, timedelta(seconds=1)).working("text") as say:
            time.sleep(seconds)
            if fails:
                raise UsageError("no such text")
            say("it is here")
    except UsageError:
        pass


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_work_may_take_longer_than_the_time_out(stores, seconds, capfd):
    worker = threading.Thread(target=work, args=(stores[0], seconds))
    worker.start()
    assert Turns(stores[1], timedelta(seconds=1)).wait("text", 0) == "it is here"
    worker.join()
    assert capfd.readouterr().err == ""  # which hundreds of processes would write to the same terminal


def test_work_that_fails_is_waited_for_no_longer(stores):
    work(stores[0], 0.0, fails=True)
    with pytest.raises(RunError, match="rank 3 could not prepare the run"):
        Turns(stores[1], timedelta(hours=1)).wait("text", 3)


def test_one_that_gives_no_sign_of_life_is_named(stores):
    stores[0].add("text lives", 7)  # it was there once
    with pytest.raises(RunError, match=r"rank 3 gave no sign of life for 0\.005 minutes"):
        Turns(stores[1], timedelta(seconds=0.3)).wait("text", 3)


def prepared(ranks: Ranks, corpora: list[Path], machines: int) -> Any:
    if machines > 1:
        os.environ["LOCAL_RANK"] = "0"  # each is the first of its machine
    made = []

    def make() -> Any:
        made.append(ranks.rank)
        return prepare(str(corpora[ranks.rank]), vocab_size=270)

    said: Any
    try:
        with ranks.in_turn():
            said = len(ranks.prepared(make).train)
    except (RunError, UsageError) as error:
        said = str(error)
    ranks.anyone(False)
    return said, made


def test_the_text_is_made_once_a_machine_and_the_same_on_all(tmp_path, monkeypatch):
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    one, other = write_corpus(tmp_path / "one"), write_corpus(tmp_path / "other", seed=1)
    first, second = world(2, prepared, [one, tmp_path / "not even there"], 1)
    assert first == (second[0], [0]) and second[1] == []
    assert world(2, prepared, [one, one], 2) == [(first[0], [0]), (first[0], [1])]
    first, second = world(2, prepared, [one, other], 2)
    assert first == ("rank 1 could not prepare the run", [0])
    assert "rank 1 reads another text, or with another tokenizer, than rank 0" in second[0]
