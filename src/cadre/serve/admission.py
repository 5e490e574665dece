"""The one door for everything that costs: tokenising, compiling a grammar, generating.

Who comes in has a place in the queue and a deadline, both from its arrival on, and loses them when its client leaves.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from cadre.serve.errors import ApiError, bad_request, server_error, too_late

if TYPE_CHECKING:
    from fastapi import Request, Response

    from cadre.infer.engine import Request as Sequenced
    from cadre.serve.loop import EngineLoop, Stream

_Made = TypeVar("_Made")


class Place:
    """What one request holds: room for its sequences, and a `deadline` (of `time.monotonic`)."""

    def __init__(self, admission: Admission, sequences: int) -> None:
        self.admission, self.preparing = admission, sequences
        self.arrived = time.monotonic()
        self.deadline = self.arrived + admission.timeout
        self.stream: Stream | None = None
        self.kept = False  # by an answer that is streamed, which leaves it at its own end
        admission.preparing += sequences

    def submit(self, requests: Sequence[Sequenced]) -> Stream:
        """Have the engine run the sequences that the place is for."""
        self.stream = self.admission.loop.submit(requests, self.arrived)
        self._prepared()
        return self.stream

    def leave(self) -> None:
        """Give the place back, whatever still runs; harmless once it was."""
        self._prepared()
        if self.stream is not None:
            late = time.monotonic() >= self.deadline
            self.admission.loop.cancel(self.stream, "deadline" if late else "abort")

    def _prepared(self) -> None:
        self.admission.preparing -= self.preparing
        self.preparing = 0


class Admission:
    """Lets in at most `max_batch` + `max_queue` sequences at a time, each for `timeout` seconds. Used in one event loop."""

    def __init__(self, loop: EngineLoop, *, max_batch: int, max_queue: int, timeout: float) -> None:
        self.loop, self.timeout = loop, timeout
        self.max_batch, self.capacity = max_batch, max_batch + max_queue
        self.preparing = 0  # sequences that are not the engine's yet
        self.draining = False
        # Threads of their own, so that a text need not wait for a grammar. One for grammars: each may need 100 MB.
        self.texts = ThreadPoolExecutor(2, "cadre-text")
        self.grammars = ThreadPoolExecutor(1, "cadre-grammar")

    @property
    def taken(self) -> int:
        """Sequences that have a place."""
        return len(self.loop.live) + self.preparing

    def check(self, sequences: int) -> None:
        """Raises `ApiError` if so many sequences cannot be taken now."""
        if self.loop.ended is not None:
            raise self.loop.ended()
        if self.draining:
            raise shutting_down()
        if sequences > self.capacity:
            raise bad_request(f"{sequences} choices in one request; this server takes at most {self.capacity}", "n")
        if self.taken + sequences > self.capacity:
            wait = math.ceil(min(max(self.loop.seconds * self.taken / self.max_batch, 1), 60))
            raise ApiError(
                429, f"the server is busy: {self.taken} sequences run or wait, of at most {self.capacity}; try again later",
                kind="rate_limit_error", code="queue_full", headers={"retry-after": str(wait)},
            )  # fmt: skip

    async def serve(self, request: Request, sequences: int, work: Callable[[Place], Awaitable[Response]]) -> Response:
        """The answer that `work` makes, which is given up once its client has left or its time is over. Raises `ApiError`
        for these, and if there is no room."""
        self.check(sequences)
        place = Place(self, sequences)
        worker, gone = asyncio.ensure_future(work(place)), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((worker, gone), timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if worker.done():
                response = worker.result()
            elif gone.done():
                raise ApiError(499, "the client has left", code="client_closed_request")  # nobody reads this
            else:
                raise too_late()
        except BaseException:
            place.leave()
            raise
        finally:
            worker.cancel()
            gone.cancel()
        if not place.kept:
            place.leave()
        return response

    async def in_thread(self, threads: ThreadPoolExecutor, function: Callable[..., _Made], *arguments: Any) -> _Made:
        """What a function returns that takes long. Cancelled while it waits for its turn, it never runs."""
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)

    async def drain(self, grace: float, hurried: Callable[[], bool]) -> None:
        """Take nothing new, and wait until everything has finished, `grace` seconds have passed or `hurried` says so."""
        self.draining = True
        end = time.monotonic() + grace
        while self.taken and time.monotonic() < end and not hurried():
            await asyncio.sleep(0.05)
        self.loop.end(shutting_down)

    async def stop(self) -> None:
        """End all threads."""
        for threads in (self.texts, self.grammars):
            threads.shutdown(wait=False, cancel_futures=True)
        await self.loop.stop(shutting_down)


def shutting_down() -> ApiError:
    return server_error(503, "the server is shutting down", "shutting_down")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
