"""Places, deadlines and farewells of requests that are not the engine's yet: while a text is encoded, a grammar compiled."""

import json
import threading

import pytest

from cadre.infer import constraint as module
from cadre.infer.constraint import Constraints
from tests.serve.live import CONTEXT, Live, http, parts, reply

GUIDED = {"prompt": "The", "max_tokens": 5, "guided_regex": "yes|no"}


class Gate:
    """Holds whoever calls `wait`."""

    def __init__(self):
        self.open, self.calls = threading.Event(), 0

    def wait(self, *_, **__):
        self.calls += 1
        assert self.open.wait(60)


@pytest.fixture
def compiling(monkeypatch):
    """The compiler stands still until the gate opens."""
    gate, start = Gate(), Constraints.start

    def slow(self, sampling):
        if sampling.regex is not None:
            gate.wait()
        return start(self, sampling)

    monkeypatch.setattr(Constraints, "start", slow)
    yield gate
    gate.open.set()


def guided(server, **fields):
    before = server.admission.taken
    connection = server.connect(http("/v1/completions", json.dumps(GUIDED | fields).encode()))
    server.until(lambda: server.admission.taken > before)
    return connection


def test_who_waits_for_the_compiler_has_a_place(compiling):
    with Live(max_batch=1, max_queue=2) as server:
        waiting = [guided(server) for _ in range(3)]
        for path in ("/v1/completions", "/tokenize", "/detokenize"):
            answer = server.post(path, {"tokens": [5]} if path == "/detokenize" else {"prompt": "x"})
            assert answer.status_code == 429 and answer.headers["retry-after"], path
        compiling.open.set()
        for connection in waiting:
            assert reply(connection)[0] == 200
            connection.close()
        server.until(server.idle)
        assert server.post("/tokenize", {"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_meanwhile_gives_it_back_and_is_not_worked_for(compiling, stream):
    with Live(max_batch=1, max_queue=2) as server:
        waiting = [guided(server, stream=stream) for _ in range(3)]
        server.until(lambda: compiling.calls == 1)
        for connection in waiting:
            connection.close()
        server.until(lambda: server.admission.taken == 0)
        compiling.open.set()
        assert server.complete()["choices"]
        server.until(server.idle)
    assert compiling.calls == 1  # the two behind it never began


@pytest.mark.parametrize("stream", [False, True])
def test_its_time_runs_from_its_arrival(compiling, stream):
    with Live(timeout=0.3) as server:
        answer = server.post("/v1/completions", GUIDED | {"stream": stream})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert server.admission.taken == 0
        assert server.complete()["choices"]  # a request without a grammar does not wait for one


def test_no_grammar_is_compiled_on_the_engines_thread(monkeypatch):
    """Where everybody would wait for it: not even one that is no longer kept, for all those that came since."""
    threads, compiled = [], module._compile

    def watched(*arguments):
        threads.append(threading.current_thread().name)
        return compiled(*arguments)

    monkeypatch.setattr(module, "_compile", watched)
    with Live() as server:
        server.engine.constraints.keep = 0
        answer = server.complete(["The", "people"], guided_regex="yes|no", n=2, max_tokens=5)
        assert len(answer["choices"]) == 4 and {choice["text"] for choice in answer["choices"]} <= {"yes", "no"}
    assert threads and all(name.startswith("cadre-grammar") for name in threads), threads


def test_the_end_waits_for_who_has_a_place(compiling):
    with Live() as server:
        connection = guided(server)
        server.server.handle_exit(15, None)
        server.until(lambda: server.admission.draining)
        compiling.open.set()
        assert reply(connection)[0] == 200
        connection.close()


def test_but_not_longer_than_the_grace(compiling):
    with Live(grace=0.1) as server:
        connection = guided(server)
        server.server.handle_exit(15, None)
        server.until(lambda: server.loop.ended is not None)
        compiling.open.set()
        status, body = reply(connection)
        assert status == 503 and json.loads(body)["error"]["code"] == "shutting_down"
        connection.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_text_that_cannot_fit_is_refused_before_any_work_on_it(monkeypatch, live, path):
    """The longest token would have to be repeated too often."""
    longest = max(map(len, parts()[1].get_vocab()))
    text = "x" * (CONTEXT * longest + 1)
    encoded = []
    in_thread = live.admission.in_thread

    async def watched(threads, function, *arguments):
        encoded.append(arguments)
        return await in_thread(threads, function, *arguments)

    chat = path == "/v1/chat/completions"
    if not chat:  # its text is known once the template is rendered
        monkeypatch.setattr(live.admission, "in_thread", watched)
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    error = live.post(path, body).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert f"the context is {CONTEXT} tokens of at most {longest} characters" in error["message"]
    assert not encoded
