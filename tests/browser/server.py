"""A server for the page alone: the real files with their real headers, and answers that a test writes."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cadre.serve import page

TEXT = (
    " of the Senate and of the House of Representatives: the year that closes has been one of labor and of plenty. "
    "Our relations with every nation remain those of peace, and the revenue has met the public charge."
)
MODEL = {
    "id": "pocket",
    "object": "model",
    "cadre": {
        "chat_template": False,
        "context": 256,
        "cache_bytes_per_token": 1024,
        "cache_bytes_per_token_mha": 4096,
        "experts": 16,
        "top_k": 2,
        "sparse_layers": [1, 2, 3],
    },
}


def words(text: str) -> list[str]:
    """The tokens of this server: words with the white space before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def routes(number: int) -> list[list[int]]:
    """Two of 16 experts in each of three layers, the same for the same token number."""
    return [[(number * step + shift) % 16, (number * step + shift + 5) % 16] for step, shift in ((3, 0), (5, 2), (7, 11))]


def token(number: int, text: str) -> dict[str, Any]:
    return {"id": number, "text": text, "experts": routes(number)}


class Refuse:
    """An answer that is no stream."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": "error", "param": None, "code": code}}


class Reply:
    """A stream of `text`, token by token, each after `pause` seconds. `pieces` says instead, chunk by chunk, what comes:
    (text, tokens). `lose`: the connection breaks where the end should be."""

    def __init__(
        self,
        text: str = TEXT,
        *,
        pause: float = 0.0,
        finish: str = "length",
        pieces: list[tuple[str, list[dict[str, Any]]]] | None = None,
        lose: bool = False,
        error: str | None = None,
    ) -> None:
        self.pieces = pieces or [(word, [token(number, word)]) for number, word in enumerate(words(text))]
        self.pause, self.finish, self.lose, self.error = pause, finish, lose, error

    def chunks(self, chat: bool, prompt_tokens: int) -> Iterator[dict[str, Any]]:
        if chat:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        positions = prompt_tokens
        for text, tokens in self.pieces:
            time.sleep(self.pause)
            positions += len(tokens)
            own = {"delta": {"content": text}} if chat else {"text": text}
            yield {"choices": [{"index": 0, **own, "finish_reason": None}], "cadre": {"tokens": tokens, "positions": positions}}
        if self.error:
            yield {"error": {"message": self.error, "type": "server_error", "code": None}}
        own = {"delta": {}} if chat else {"text": ""}
        yield {"choices": [{"index": 0, **own, "finish_reason": self.finish}]}
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(self.pieces)}
        yield {"choices": [], "usage": usage}


class PageServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model: dict[str, Any] = json.loads(json.dumps(MODEL))
        self.script: list[Refuse | Reply] = []  # used up from the front; then every reply is Reply()
        self.requests: list[tuple[str, dict[str, Any]]] = []  # completions asked for: path, body
        self.aborted = threading.Event()  # a client left in the middle of a stream
        self.key: str | None = None
        self.refused = 0  # requests without it
        self.words: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def ids(self, text: str) -> list[int]:
        for word in words(text):
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in words(text)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        if name in page.FILES:
            self._send(200, page.read(name), {"Content-Type": page.FILES[name], **page.HEADERS})
        elif self.path == "/v1/models" and self._admitted():
            self._json({"object": "list", "data": [self.server.model]})
        elif self.path != "/v1/models":
            self._json({"error": {"message": "no such page"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            return
        if self.path == "/tokenize":
            text = body["prompt"] if "prompt" in body else " ".join(message["content"] for message in body["messages"])
            self._json({"tokens": self.server.ids(text)})
        elif self.path == "/detokenize":
            self._json({"prompt": "".join(self.server.words[number] for number in body["tokens"])})
        else:
            self.server.requests.append((self.path, body))
            answer = self.server.script.pop(0) if self.server.script else Reply()
            if isinstance(answer, Refuse):
                self._json(answer.body, answer.status, answer.headers)
            else:
                self._stream(answer, body)

    def _admitted(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self.server.refused += 1
        self._json({"error": {"message": "this server needs an API key", "code": "invalid_api_key"}}, 401)
        return False

    def _stream(self, answer: Reply, body: dict[str, Any]) -> None:
        prompt = body["prompt"] if "prompt" in body else " ".join(message["content"] for message in body["messages"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number, chunk in enumerate(answer.chunks("messages" in body, len(words(prompt)))):
                if answer.lose and chunk.get("choices", [{}])[0].get("finish_reason"):
                    return
                comment = ": ping\r\n\r\n" if number % 3 == 0 else ""
                data = f"{comment}data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n".encode()
                # Cut anywhere, also inside a character or between CR and LF.
                for start in range(0, len(data), 97):
                    self.wfile.write(data[start : start + 97])
                    self.wfile.flush()
            self.wfile.write(b"data: [DONE]\r\n\r\n")
        except OSError:
            self.server.aborted.set()
        finally:
            self.close_connection = True

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
