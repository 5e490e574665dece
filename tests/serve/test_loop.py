"""The queue, deadlines, and who gets what, over HTTP; breakdowns of the engine are in test_app.py."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.live import Live, reply
from tests.serve.test_completions import alone, encode
from tests.serve.test_server import LONG, start


def test_beyond_the_queue_is_refused_with_a_time_to_wait():
    with Live(max_batch=1, max_queue=2) as server:
        with server.held():
            waiting = [start(server, LONG | {"max_tokens": 5}) for _ in range(3)]
            answer = server.post("/v1/completions", LONG)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            streamed = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True})
            assert streamed.status_code == 429
        for connection in waiting:
            assert reply(connection)[0] == 200
            connection.close()
        server.until(server.idle)
        assert server.complete()["choices"]


def test_several_choices_need_several_places():
    with Live(max_batch=1, max_queue=2) as server:
        with server.held():
            waiting = start(server, LONG | {"n": 2, "max_tokens": 5})
            assert server.post("/v1/completions", LONG | {"n": 2}).status_code == 429
            assert len(server.loop.live) == 2
        waiting.close()
        server.until(server.idle)
        never = server.post("/v1/completions", LONG | {"n": 4})
        assert never.status_code == 400 and "at most 3" in never.json()["error"]["message"]


def test_a_refusal_of_the_engine_takes_no_place():
    with Live() as server:
        for _ in range(3):
            answer = server.post("/v1/completions", {"prompt": ["The", "yes"], "logit_bias": {"999": 1}})
            assert answer.status_code == 400
        server.until(server.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream):
    with Live(timeout=0.3, max_batch=1) as server:
        with server.held():
            running = start(server, LONG)
            answer = server.post("/v1/completions", LONG | {"stream": stream})
        if stream:
            assert answer.status_code == 200
            error = json.loads(answer.text.rstrip().splitlines()[-1].removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false"
            error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("deadline_exceeded", "server_error")
        assert reply(running)[0] == 504
        running.close()
        server.until(server.idle)


def test_damaged_weights_are_told(monkeypatch):
    with Live() as server:
        runner = server.engine.runner
        logits = runner.logits
        monkeypatch.setattr(runner, "logits", lambda hidden: logits(hidden) * float("nan"))
        answer = server.post("/v1/completions", {"prompt": "The"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "model_failed"
        monkeypatch.undo()
        assert server.complete()["choices"]


def test_many_at_once_get_what_each_gets_alone(live):
    """More than run at a time, of all lengths, streamed or not: nothing mixed."""
    jobs = [(f"The {word}" * (n % 5 + 1), 5 + 7 * (n % 6), n) for n, word in enumerate(["café", "people", "yes", "guests"] * 8)]

    def ask(job):
        prompt, most, seed = job
        return server_text(live, {"prompt": prompt, "max_tokens": most, "seed": seed, "stream": seed % 2 == 0})

    with ThreadPoolExecutor(len(jobs)) as pool:
        texts = list(pool.map(ask, jobs))
    for (prompt, most, seed), text in zip(jobs, texts, strict=True):
        assert text == alone(encode(prompt), most, seed=seed)[0]


def server_text(server, body):
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()["choices"][0]["text"]
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_the_waiting_web_server_never_waits_for_the_engine(live):
    with live.held():
        connection = start(live)
        for path in ("/health", "/v1/models", "/metrics"):
            assert live.get(path).status_code == 200
        connection.close()
    live.until(live.idle)


def test_a_quiet_stream_is_kept_open(monkeypatch):
    monkeypatch.setattr("cadre.serve.answer._SILENCE", 0.05)
    with Live() as server:
        with server.held():
            connection = start(server, LONG | {"stream": True, "max_tokens": 3})
            received = connection.recv(4096)
            while b": waiting\n\n" not in received:
                received += connection.recv(4096)
        while b"[DONE]" not in received:
            received += connection.recv(4096)
        connection.close()


def test_prompts_are_shared(live):
    prompt = list(range(20, 100))
    live.complete(prompt)
    again = live.complete(prompt, n=2)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 64  # whole pages of 16, and one token is left to read
    assert again["usage"]["prompt_tokens"] == 80


def test_threads_end_with_the_server():
    before = threading.active_count()
    with Live() as server:
        server.complete()
    assert not server.loop.thread.is_alive()
    assert threading.active_count() <= before + 8  # asyncio's pool for tokenising may linger
    assert asyncio._get_running_loop() is None
