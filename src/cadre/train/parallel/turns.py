"""Waiting for one process that is at work: for hours if it lives, but not for one that gives no sign of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from cadre.errors import RunError

# Seconds between two signs of life.
BEAT = 5.0
_FAILED, _DONE = "failed", "done "


class Turns:
    """Word of what processes do in turn, through the store that they have met by. A piece of work has a name that all know,
    and no other has. `timeout`: how long to wait without a sign of life."""

    def __init__(self, store: dist.Store, timeout: timedelta) -> None:
        self.store, self.timeout = store, timeout.total_seconds()

    @contextmanager
    def working(self, name: str) -> Iterator[Callable[[str], None]]:
        """Work that others wait for; what is given to the function that this yields, they hear when it is done."""
        said, ended = [""], threading.Event()

        def live() -> None:
            while not ended.wait(BEAT):
                self.store.add(f"{name} lives", 1)

        alive = threading.Thread(target=live, daemon=True)
        alive.start()
        word = _FAILED
        try:
            yield lambda text: said.__setitem__(0, text)
            word = _DONE + said[0]
        finally:
            ended.set()
            alive.join()
            self.store.set(name, word)

    def wait(self, name: str, rank: int) -> str:
        """What the process of that rank, at work on this, has to say in the end. Raises `RunError` if it fails, or gives no
        sign of life for the time-out."""
        beats, since = -1, time.monotonic()
        while True:
            try:
                self.store.wait([name], timedelta(seconds=BEAT))
                break
            except dist.DistStoreError:
                now = self.store.add(f"{name} lives", 0)
                if now != beats:
                    beats, since = now, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    minutes = f"{self.timeout / 60:g} minutes"
                    raise RunError(f"rank {rank} gave no sign of life for {minutes} while it prepared the run") from None
        word = self.store.get(name).decode()
        if word == _FAILED:
            raise RunError(f"rank {rank} could not prepare the run")
        return word.removeprefix(_DONE)
