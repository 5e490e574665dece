"""What a request must pass before it reaches an endpoint: host, origin, API key and size."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Collection
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cadre.serve.errors import ApiError, ErrorResponse
from cadre.serve.schema import MAX_BODY_BYTES

if TYPE_CHECKING:
    from cadre.serve.metrics import Metrics

_TOO_LARGE = f"the request is larger than the {MAX_BODY_BYTES:,} bytes that this server reads"

_MODEL = "/v1/models/{name:path}"


def is_loopback(name: str) -> bool:
    """Whether this names the machine itself, and can name no other."""
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


class Gate:
    """Wraps the application, and refuses what must not reach it.

    A browser says which site's page sends a request (Origin) and by which name it calls the server (Host). A page of another
    site may not use the server of whoever visits that site. And a page may have pointed a name of its own at this address (DNS
    rebinding): so, unless a key is asked for, requests from pages must call the server by an address, by the machine's name or
    by one of `hosts`, the names that proxies give it. `local`: the server listens on a loopback address alone; then every
    request must call it by such an address, by `localhost` or by one of `hosts`. `open_paths` need no key; `known_paths` are
    counted by name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        api_key: str | None,
        hosts: Collection[str],
        local: bool,
        open_paths: Collection[str],
        known_paths: Collection[str],
    ) -> None:
        self.app, self.metrics = app, metrics
        self.key = None if api_key is None else api_key.encode()
        self.hosts = {host.lower() if _is_address(host) else _name(host) for host in hosts} - {""}
        self.local = local
        machine = socket.gethostname().lower()
        self.machine = (machine, f"{machine}.local")
        self.open_paths, self.known_paths = frozenset(open_paths), frozenset(known_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Other paths are the client's invention: a label for each would never end.
                path = _MODEL if scope["path"].startswith("/v1/models/") else scope["path"]
                self.metrics.requests.labels(path if path in self.known_paths else "other", message["status"]).inc()
            await send(message)

        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)  # what FastAPI lets through while it reads a body
            return message

        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn keeps the body back
        error = self.refusal(scope["path"], Headers(scope=scope))
        await (self.app if error is None else ErrorResponse(error))(scope, bounded, counted)

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        own = _name(host) in self.hosts or is_loopback(_name(host))
        stranger = f"this server does not go by the name {(_name(host) or host)[:80]!r}; --allow-host gives it one"
        if self.local and not own:
            return ApiError(403, stranger, code="unknown_host")
        if origin is not None and not self._same(origin, host):
            return ApiError(403, "pages of other sites may not use this server", code="foreign_origin")
        # A page of another site has no key. A name that was pointed here is no address, and not the machine's own. Behind a
        # proxy only the origin may be the name that the browser used.
        named = origin is None or self.key is not None or own or urlsplit(origin).hostname in self.hosts
        if not (named or _is_address(_name(host)) or _name(host) in self.machine):
            return ApiError(403, stranger, code="unknown_host")
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > MAX_BODY_BYTES):
            return ApiError(413, _TOO_LARGE, code="request_too_large")
        return None if self.key is None or path in self.open_paths else self._without_key(headers)

    def _without_key(self, headers: Headers) -> ApiError | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            message = "this server needs an API key: send Authorization: Bearer KEY"
        elif hmac.compare_digest(given.strip().encode("latin-1"), self.key or b""):
            return None
        else:
            message = "the API key is wrong"
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _same(self, origin: str, host: str) -> bool:
        """Whether a page of this origin is the server's own."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        # A proxy need not pass on the host that the browser asked for.
        return bool(parts.netloc) and (parts.netloc.lower() == host.lower() or parts.hostname in self.hosts)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
        return True
    except ValueError:
        return False


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
