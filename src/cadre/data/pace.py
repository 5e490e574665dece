"""Saying how far reading and tokenising have come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from cadre.data.sources import Document
from cadre.units import clock, compact

# Between two lines: so many seconds at least, and this share of the time that has gone by.
_LEAST = 10.0
_SHARE = 0.1


class Pace:
    """Says how far work has come: every ten seconds, and less often the longer it takes, so that hours take dozens of lines.
    `total` and `done`: its characters, if they are known, and those done before."""

    def __init__(self, say: Callable[[str], None], work: str, total: int | None = None, done: int = 0) -> None:
        self._say, self._work, self._total = say, work, total
        self._done = self._before = done
        self._began = time.monotonic()
        self._next = _LEAST

    def add(self, characters: int) -> None:
        self._done += characters
        elapsed = time.monotonic() - self._began
        if elapsed < self._next:
            return
        self._next = elapsed + max(_LEAST, _SHARE * elapsed)
        rate = (self._done - self._before) / elapsed
        said = f"{self._work}: {compact(self._done)} characters, {compact(rate)}/s"
        if self._total:
            said += f", {self._done / self._total:.0%}, left {clock((self._total - self._done) / max(rate, 1e-9))}"
        self._say(said)

    def of(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, as they are read."""
        for document in documents:
            yield document
            self.add(len(document.text))
