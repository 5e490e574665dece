"""Stand-ins for benchmark processes: the same interface within the test's own process."""

from __future__ import annotations

import math
from typing import Any

from cadre.errors import RunError
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

    def step(self, within: float = math.inf) -> float:
        self.run = self.run or self.build()
        Here.turns.append(self.name)
        return self.run()

    def memory(self) -> Memory:
        return Memory(before=1000, peak=3000)


class Scripted(Here):
    """Steps for nothing and takes the seconds that `Scripted.seconds` gives for its build: a number, a list of them to be
    taken in turn, or an error to raise. A step of more seconds than it may take raises, too."""

    seconds: Any = None

    def step(self, within: float = math.inf) -> float:
        Here.turns.append(self.name)
        if self.run is None:
            given = type(self).seconds(self.build)
            self.run = iter(given if isinstance(given, list) else [given] * 1000)
        value = next(self.run)
        if isinstance(value, Exception):
            raise value
        if value > within:
            raise RunError(f"{self.name}: not done within {within}")
        return value
