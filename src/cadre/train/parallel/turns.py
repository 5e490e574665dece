"""Waiting for the work of one process: for hours as long as its heartbeat goes on, but not for a process that has stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from cadre.errors import RunError

# Seconds between two heartbeats.
BEAT = 5.0
# Seconds between two looks at whether work is done: so short that whoever waits hears of a failure before the store is gone
# with the process that failed, and so long that hundreds of processes do not keep the store busy.
_PAUSE = 0.2
_FAILED, _DONE = "failed", "done "


class Turns:
    """Processes that work in turn tell each other when they are done, through the store of their rendezvous. Each piece of work
    has a name of its own that all processes know. `timeout`: how long to wait without a heartbeat."""

    def __init__(self, store: dist.Store, timeout: timedelta) -> None:
        self.store, self.timeout = store, timeout.total_seconds()

    @contextmanager
    def working(self, name: str) -> Iterator[Callable[[str], None]]:
        """Do the work `name` in this `with` block. Yields a function that sets the text that `wait` is to return in the
        others."""
        said, ended = [""], threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                self.store.add(f"{name} lives", 1)

        heartbeat = threading.Thread(target=beat, daemon=True)
        heartbeat.start()
        word = _FAILED
        try:
            yield lambda text: said.__setitem__(0, text)
            word = _DONE + said[0]
        finally:
            ended.set()
            heartbeat.join()
            self.store.set(name, word)

    def wait(self, name: str, rank: int) -> str:
        """Wait until the process of this rank has done the work `name`, and return its text. Raises `RunError` if it fails, or
        has no heartbeat for the time-out."""
        beats = -1
        since = asked = time.monotonic()
        # Asked for again and again: the store's own waiting writes two lines to standard error whenever its time is up.
        while not self.store.check([name]):
            time.sleep(_PAUSE)
            if time.monotonic() - asked < BEAT:
                continue
            asked = time.monotonic()
            if (now := self.store.add(f"{name} lives", 0)) != beats:
                beats, since = now, asked
            elif asked - since > self.timeout:
                minutes = f"{self.timeout / 60:g} minutes"
                raise RunError(f"rank {rank} gave no sign of life for {minutes} while it prepared the run")
        word = self.store.get(name).decode()
        if word == _FAILED:
            raise RunError(f"rank {rank} could not prepare the run")
        return word.removeprefix(_DONE)
