"""The event loop is everybody's: no request may hold it, and one that does harms nobody else's."""

import asyncio
import json
import time
from contextlib import contextmanager

import pytest

from cadre.serve.schema import MAX_BODY_BYTES
from tests.serve.live import Live
from tests.serve.test_completions import alone, encode
from tests.serve.test_server import LONG, start

JSON = {"content-type": "application/json"}


class Turns:
    """The event loop's turns while something goes on. busy, held: the most processor time between two of them, of its thread
    and of the process; unlike the clock's, neither depends on what else the machine does."""

    def __init__(self):
        self.busy = self.held = 0.0


@contextmanager
def turns(server):
    seen, going = Turns(), True

    async def tick():
        last = time.thread_time(), time.process_time()
        while going:
            await asyncio.sleep(0.001)
            now = time.thread_time(), time.process_time()
            seen.busy, seen.held = max(seen.busy, now[0] - last[0]), max(seen.held, now[1] - last[1])
            last = now

    future = asyncio.run_coroutine_threadsafe(tick(), server.loop.asyncio)
    try:
        yield seen
    finally:
        going = False
        future.result(20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_answer_is_written_in_pieces(live, stream):
    body = {"prompt": [[60 + n] * 500 for n in range(9)], "max_tokens": 0, "echo": True, "logprobs": 20, "stream": stream}
    with turns(live) as seen:
        answer = live.post("/v1/completions", body)
    assert answer.status_code == 200 and len(answer.content) > 1_000_000
    assert seen.busy < 0.06, seen.busy


def test_a_large_body_is_read_quickly(live):
    """Whatever becomes of it."""
    many = [7] * (MAX_BODY_BYTES // 4)
    for path, body, status in (
        ("/detokenize", {"tokens": many}, 200),
        ("/detokenize", {"tokens": [*many, 999]}, 400),
        ("/v1/completions", {"prompt": many, "echo": True, "logprobs": 1, "max_tokens": 0}, 400),
        ("/v1/completions", {"prompt": "x" * (MAX_BODY_BYTES - 1000)}, 400),
    ):
        with turns(live) as seen:
            assert live.post(path, None, content=json.dumps(body, separators=(",", ":")), headers=JSON).status_code == status
        assert seen.busy < 0.25, (path, seen.busy)


def test_others_go_on_while_a_long_text_is_encoded():
    """The tokenizer lets go of the interpreter."""
    text, ids = "The people " * 30_000, list(range(60, 290)) * 600
    with Live() as server:
        for path, body in (("/tokenize", {"prompt": text}), ("/detokenize", {"tokens": ids})):
            begin = time.process_time()
            with turns(server) as seen:
                assert server.post(path, body).status_code == 200
            assert seen.held < 0.5 * (time.process_time() - begin), path


def test_a_stall_cuts_no_stream_off(live):
    """All of a stream's outputs have piled up when its turn comes."""
    with start(live, LONG | {"stream": True}) as connection:
        finished = live.engine.stats.finished
        # Not before the engine has finished, which is the worst that a stall can do.
        live.loop.asyncio.call_soon_threadsafe(live.until, lambda: live.engine.stats.finished > finished)
        received = b""
        while b"data: [DONE]" not in received:
            piece = connection.recv(65536)
            assert piece, received[-500:]
            received += piece
    chunks = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone(encode("The"), 480, temperature=0)[0]
