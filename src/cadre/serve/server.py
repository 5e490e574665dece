"""Running the application on uvicorn: its socket, its connections' time limits, and its end."""

from __future__ import annotations

import asyncio
import errno
import json
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

RECEIVE_SECONDS = 60.0  # for a request to arrive whole
STALL_SECONDS = 30.0  # for a client to read something when its answer has piled up


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `UsageError` for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: no such host or address ({error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"--port {port}: another program listens on it; choose another port") from None
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror}") from None


def run(app: FastAPI, listener: socket.socket, *, grace: float) -> None:
    """Serve until a signal to end (SIGTERM, SIGINT), then refuse new requests, let running ones finish for `grace` seconds,
    and return. A second signal cuts that short. Raises `RunError` if the engine breaks down."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every connection is a file
    Server(app, grace).run(sockets=[listener])
    failure = app.state.loop.failure
    if failure is not None:
        raise RunError(f"the engine failed: {type(failure).__name__}: {failure}") from failure


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
        await self.app.state.loop.drain(self.grace, lambda: self.force_exit)
        self.force_exit = False  # all is given up now: what is left to do takes no time, and should be done

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn's, this does not raise the signal again at the end: to be told to stop and to stop is success.
        self.force_exit = self.should_exit
        self.should_exit = True


class Connection(H11Protocol):
    """uvicorn's HTTP connection, closed when its client sends too slowly or does not read."""

    receiving: asyncio.TimerHandle | None = None
    stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._await_request()
        else:
            self._forget()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled is not None:
            self.stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        if self.stalled is not None:
            self.stalled.cancel()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        if self.receiving is None:
            self.receiving = self.loop.call_later(RECEIVE_SECONDS, self.transport.abort)

    def _forget(self) -> None:
        if self.receiving is not None:
            self.receiving.cancel()
            self.receiving = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in the shape of every other error."""
        body = json.dumps(bad_request("this is not a valid HTTP request", code="invalid_http").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events: list[Any] = [h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
