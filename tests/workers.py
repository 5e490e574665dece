"""Stand-ins for benchmark processes: the same interface within the test's own process."""

from __future__ import annotations

from typing import Any

from cadre.train.bench.worker import Build, Memory


class Here:
    """Builds and steps for real, in this process. Keeps who stepped, in order, in `Here.turns`."""

    turns: list[str] = []  # noqa: RUF012 - one list for all, emptied by the fixture that puts this in place

    def __init__(self, name: str, build: Build) -> None:
        self.name, self.build, self.run = name, build, None

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self.run = None

    def step(self) -> float:
        self.run = self.run or self.build()
        Here.turns.append(self.name)
        return self.run()

    def memory(self) -> Memory:
        return Memory(before=1000, peak=3000)


class Scripted(Here):
    """Steps for nothing and takes the seconds that `Scripted.seconds` gives for its build: a number, a list of them to be
    taken in turn, or an error to raise."""

    seconds: Any = None

    def step(self) -> float:
        Here.turns.append(self.name)
        if self.run is None:
            given = type(self).seconds(self.build)
            self.run = iter(given if isinstance(given, list) else [given] * 1000)
        value = next(self.run)
        if isinstance(value, Exception):
            raise value
        return value
