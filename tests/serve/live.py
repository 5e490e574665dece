"""A real server on a real socket, in a thread of the test's process, around a model of a few thousand parameters."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx

from cadre.data.tokenizer import train_tokenizer
from cadre.hub.template import ChatTemplate
from cadre.infer.engine import Engine
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.serve.app import create_app
from cadre.serve.server import Server, listen
from cadre.serve.service import Card
from tests.shapes import small

TEXT = "The naïve café served 你好 and 😀🎉 to 3 guests.\nThen the people of the union answered: yes, we do.\n"
CONTEXT = 512
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@cache
def parts(**changes: Any):
    """A model whose weights are large enough that prompts matter, and its tokenizer."""
    values = dict(vocab_size=300, initializer_range=0.3, bos_token_id=0, eos_token_id=1, max_position_embeddings=CONTEXT)
    config = small("deepseek_v3", **(values | changes))
    return Transformer(config).initialize(0).eval(), train_tokenizer([TEXT * 20], 300)


class Live:
    """Use as a context manager. `engine`: options of `Engine`; others are `create_app`'s."""

    def __init__(self, *, engine: dict[str, Any] | None = None, grace: float = 5.0, chat: bool = True, **options: Any) -> None:
        model, self.tokenizer = parts()
        options = {"max_batch": 8, "max_queue": 64} | options
        sizes = {"cache_bytes": 32 << 20, "max_batch": options["max_batch"]}
        self.engine = Engine(model, self.tokenizer, **(sizes | (engine or {})))
        counted = count(model.config, cache_bytes=4)
        card = Card("tiny", model.config, counted.kv_cache_bytes_per_token, counted.kv_cache_bytes_per_token_mha)
        render = ChatTemplate(CHAT, {}).render if chat else None
        self.app = create_app(self.engine, self.tokenizer, card, render=render, **options)
        self.loop, self.admission = self.app.state.loop, self.app.state.admission
        self.server = Server(self.app, grace)
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # Made once: each would read the system's certificates anew.
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self) -> Live:
        self.thread.start()
        self.until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def complete(self, prompt: Any = "The", **fields: Any) -> dict[str, Any]:
        """A completion, which must succeed."""
        answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def connect(self, request: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
        """A bare connection on which `request` has been sent."""
        raw = socket.socket()
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(20)
        raw.connect(("127.0.0.1", self.port))
        raw.sendall(request)
        return raw

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile the engine stands still: whatever is asked of the server stays waiting."""
        released, step = threading.Event(), self.engine.step
        self.engine.step = lambda: step() if released.wait(60) else []  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.engine.step
            released.set()

    def idle(self) -> bool:
        """Nothing runs, waits or holds cache pages, for the web server and for the engine."""
        return not self.admission.taken and not self.engine.busy and self.engine.stats.pages_used == 0

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = (line.rsplit(" ", 1) for line in self.get("/metrics").text.splitlines() if not line.startswith("#"))
        return sum(float(value) for key, value in lines if key.partition("{")[0] == name)

    @staticmethod
    def until(holds: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until something holds. Counted in naps: a machine that stood still meanwhile has not waited."""
        for _ in range(int(seconds / 0.005)):
            if holds():
                return
            time.sleep(0.005)
        assert holds(), "waited in vain"


def http(path: str, body: bytes, *headers: str) -> bytes:
    """A POST request as it is on the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def reply(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer that tells its length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), body
