"""Between the web server and the engine: the engine runs in a thread of its own, which alone touches it; the web server
submits requests, cancels them and reads what comes, without ever waiting for a step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cadre.errors import UsageError
from cadre.serve.errors import ApiError, bad_request, server_error

if TYPE_CHECKING:
    from cadre.infer.engine import Engine, Output, Request
    from cadre.serve.metrics import Metrics


class Stream:
    """What the engine makes of one client's sequences, in order, until all have finished.

    What a slow client has not read yet is kept: never more than its whole answer, which one that is not streamed takes anyway.
    A client that stops reading is given up by its connection (`cadre.serve.server.Connection`), which alone can tell.
    """

    def __init__(self, requests: Sequence[Request], arrived: float) -> None:
        self.running = {request.id for request in requests}
        self.pending: deque[Output] = deque()
        self.failure: ApiError | None = None
        self.news = asyncio.Event()
        self.arrived = arrived
        self.last: dict[str, float] = {}

    async def next(self) -> list[Output]:
        """All outputs that have come since the last call, waiting for one; empty once everything has finished. Raises
        the `ApiError` that ended the stream before its time."""
        while not self.pending and self.running and self.failure is None:
            self.news.clear()
            await self.news.wait()
        if self.failure is not None:
            raise self.failure
        outputs = list(self.pending)
        self.pending.clear()
        return outputs

    def push(self, output: Output) -> None:
        self.pending.append(output)
        if output.finish is not None:
            self.running.discard(output.id)
        self.news.set()

    def fail(self, failure: ApiError) -> None:
        self.failure = failure
        self.pending.clear()
        self.running.clear()
        self.news.set()


class EngineLoop:
    """Runs an engine, for as many sequences as it is given.

    Made and used in one event loop, except for `_work`. `on_failure` is called when the engine has broken down; from then on
    everything is refused.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.live: dict[str, Stream] = {}
        self.ended: Callable[[], ApiError] | None = None  # why nothing is taken any more
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] | None = None
        self.seconds = 1.0  # for which a sequence has its place, smoothed
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # for the thread; None ends it
        self._running: set[str] = set()  # the engine's sequences: the thread's own

    # ------------------------------------------------------------------------------------------------- for the web server

    def start(self) -> None:
        self.asyncio = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self._work, name="cadre-engine", daemon=True)
        self.thread.start()

    def end(self, reason: Callable[[], ApiError]) -> None:
        """Take nothing more; whatever still runs is given up."""
        self.ended = self.ended or reason
        self._fail_all(reason())

    async def stop(self, reason: Callable[[], ApiError]) -> None:
        """End the thread, after the step it is in."""
        self.end(reason)
        self.commands.put(None)
        await asyncio.to_thread(self.thread.join)

    def submit(self, requests: Sequence[Request], arrived: float) -> Stream:
        """Have the engine run these requests, all or none, of a client that came at this time (`time.monotonic`). Raises
        `ApiError` once nothing is taken any more. Should the engine refuse one, the stream ends with that error."""
        if self.ended is not None:
            raise self.ended()
        stream = Stream(requests, arrived)
        self.live |= dict.fromkeys(stream.running, stream)
        self.commands.put(partial(self._add, tuple(requests), stream))
        return stream

    def cancel(self, stream: Stream, reason: str, only: str | None = None) -> None:
        """Stop working on a stream's sequences, or on one of them; harmless once they have finished. `reason`: as an output's
        `finish`, for the metrics."""
        ids = stream.running & ({only} if only is not None else stream.running)
        ids = {i for i in ids if self.live.pop(i, None) is not None}
        for _ in ids:
            self._finished(stream, reason)
        stream.running -= ids
        stream.news.set()
        if ids:
            self.commands.put(partial(self._abort, ids))

    def _refuse(self, stream: Stream, error: ApiError) -> None:
        self.cancel(stream, "abort")
        stream.fail(error)

    def _fail_all(self, failure: ApiError) -> None:
        for stream in set(self.live.values()):
            self._refuse(stream, failure)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        now = time.monotonic()
        batch = sum(bool(output.tokens) for output in outputs)
        if batch:
            self.metrics.batch.observe(batch)
        for output in outputs:
            stream = self.live.get(output.id)
            if stream is None:  # cancelled meanwhile
                continue
            self._observe(stream, output, now)
            stream.push(output)
            if output.finish is not None:
                del self.live[output.id]
                self._finished(stream, output.finish)

    def _observe(self, stream: Stream, output: Output, now: float) -> None:
        if output.tokens:
            if output.id in stream.last:
                self.metrics.between_tokens.observe((now - stream.last[output.id]) / len(output.tokens))
            else:
                self.metrics.first_token.observe(now - stream.arrived)
            stream.last[output.id] = now

    def _finished(self, stream: Stream, reason: str) -> None:
        """One of its sequences needs its place no longer."""
        self.metrics.finished.labels(reason).inc()
        self.seconds += 0.1 * (time.monotonic() - stream.arrived - self.seconds)

    def _break_down(self, error: BaseException) -> None:
        self.failure = error
        logging.getLogger("cadre.serve").error("the engine failed", exc_info=error)
        self.ended = partial(_failed, 503)
        self._fail_all(_failed(500))
        if self.on_failure is not None:
            self.on_failure()

    # ------------------------------------------------------------------------------------------------- the engine's thread

    def _work(self) -> None:
        try:
            while True:
                for command in self._take():
                    if command is None:
                        return
                    command()
                if self.engine.busy:
                    outputs = self.engine.step()
                    self._running -= {output.id for output in outputs if output.finish is not None}
                    self.asyncio.call_soon_threadsafe(self._deliver, outputs)
        except BaseException as error:
            self.asyncio.call_soon_threadsafe(self._break_down, error)

    def _take(self) -> Iterable[Callable[[], None] | None]:
        """The commands there are; waits for one if there is nothing else to do."""
        if not self.engine.busy:
            yield self.commands.get()
        while not self.commands.empty():
            yield self.commands.get()

    def _abort(self, ids: set[str]) -> None:
        for sequence in ids & self._running:
            self.engine.abort(sequence)
        self._running -= ids

    def _add(self, requests: Sequence[Request], stream: Stream) -> None:
        added = []
        try:
            for request in requests:
                self.engine.add(request)
                added.append(request.id)
        except UsageError as error:
            for sequence in added:
                self.engine.abort(sequence)
            self.asyncio.call_soon_threadsafe(self._refuse, stream, bad_request(str(error)))
        else:
            self._running.update(added)


def _failed(status: int) -> ApiError:
    return server_error(status, "the engine has failed; the server's log says why", "engine_failed", retry=False)
