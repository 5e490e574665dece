"""Running the application on uvicorn: its socket, its connections' time limits, and its end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import socket
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cadre.errors import RunError, UsageError
from cadre.serve.errors import bad_request

if TYPE_CHECKING:
    from fastapi import FastAPI

# For a request to arrive whole, and for some of an answer that has piled up to be read: who stands still longer is given up.
STILL_SECONDS = 60.0
# Bytes that a client may send ahead, while its request is at work.
MOST_AHEAD = 64 << 10
# Bytes of a long answer that a client reads meanwhile, or is given up.
LEAST_READ = 64 << 10


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `UsageError` for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: no such host or address ({error.strerror})") from None
    except UnicodeError:
        raise UsageError(f"--host {host}: is no name of a host") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"--port {port}: another program listens on it; choose another port") from None
        why = os.strerror(error.errno or 0)  # the error's own words repeat the address
        raise UsageError(f"cannot listen on {host}, port {port}: {why}") from None


def run(app: FastAPI, listener: socket.socket, *, grace: float) -> None:
    """Serve until a signal to end (SIGTERM, SIGINT), then refuse new requests, let running ones finish for `grace` seconds,
    and return. A second signal cuts that short. Raises `RunError` if the engine breaks down."""
    allow_files()
    Server(app, grace).run(sockets=[listener])
    failure = app.state.loop.failure
    if failure is not None:
        raise RunError(f"the engine failed: {type(failure).__name__}: {failure}") from failure


def allow_files() -> None:
    """Let the process open as many files as it may: every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS promises more than it gives: there the second is the most that it takes (OPEN_MAX).
    for wanted in (hard, 10_240):
        if soft == resource.RLIM_INFINITY or 0 <= wanted <= soft:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return
        except (ValueError, OSError):
            continue


class Server(uvicorn.Server):
    """Drains before it closes its socket, so that clients hear why they are refused."""

    def __init__(self, app: FastAPI, grace: float) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self.app, self.grace = app, grace

    async def main_loop(self) -> None:
        self.app.state.loop.on_failure = self.stop
        await super().main_loop()
        await self.app.state.admission.drain(self.grace, lambda: self.force_exit)
        self.force_exit = False  # all is given up now: what is left to do takes no time, and should be done

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn's, this does not raise the signal again at the end: to be told to stop and to stop is success.
        self.force_exit = self.should_exit
        self.should_exit = True


class Connection(H11Protocol):
    """uvicorn's HTTP connection, closed when its client stands still: when it does not go on with its request, or does not
    read its answer."""

    patience: asyncio.TimerHandle | None = None
    unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is not h11.MUST_CLOSE:  # what follows a last request is nothing
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.DONE:
            # The next request waits in h11's buffer for its turn. uvicorn would read no more, and not see the client leave.
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > MOST_AHEAD:
                self.transport.abort()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.patience is not None:
            self.patience.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock when the next move is the client's, stop it when it is not."""
        waits = self.flow.write_paused or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if waits and self.patience is None:
            self.unread = self.transport.get_write_buffer_size()
            self.patience = self.loop.call_later(STILL_SECONDS, self._lost_patience)
        elif not waits and self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def _lost_patience(self) -> None:
        """Who has read a kilobyte a second of a long answer does not stand still."""
        self.patience = None
        if self.flow.write_paused and self.transport.get_write_buffer_size() <= self.unread - LEAST_READ:
            self._watch()
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in the shape of every other error."""
        body = json.dumps(bad_request("this is not a valid HTTP request", code="invalid_http").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events: list[Any] = [h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
