"""Connections that misbehave, and the end of a server."""

import json
import resource
import socket
import time

import pytest

from cadre.errors import UsageError
from cadre.serve import server as server_module
from cadre.serve.server import allow_files, listen
from tests.serve.live import Live, http, reply

# About a second of work, more than a thousand bytes a token.
LONG = {"prompt": "The", "max_tokens": 480, "ignore_eos": True, "temperature": 0}
WORDY = LONG | {"logprobs": 20, "stream": True}


def wire(body, *headers):
    return http("/v1/completions", json.dumps(body).encode(), *headers)


def start(server, body=LONG, **connection):
    """A request on a connection of its own, running."""
    before = len(server.loop.live)
    opened = server.connect(wire(body), **connection)
    server.until(lambda: len(server.loop.live) > before)
    return opened


@pytest.mark.parametrize("body", [LONG, LONG | {"stream": True}, LONG | {"n": 5}])
@pytest.mark.parametrize("rude", [False, True])
def test_a_client_that_leaves_costs_nothing_more(live, body, rude):
    connection = start(live, body)
    live.until(lambda: live.engine.stats.running > 0)
    generated = live.engine.stats.generated_tokens
    if rude:  # a reset instead of a farewell
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    live.until(live.idle, 5)
    assert live.engine.stats.generated_tokens - generated < 480 * body.get("n", 1) - 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("close", [False, True])
def test_a_client_that_sends_more_and_leaves(live, stream, close):
    """What it has sent ahead must not keep the server from seeing it go."""
    with live.held():
        with live.connect(wire(LONG | {"stream": stream}, *["Connection: close"] * close)) as connection:
            live.until(lambda: len(live.loop.live) == 1)
            connection.sendall(b"G")
            time.sleep(0.05)
        live.until(lambda: not live.admission.taken, 5)
    live.until(live.idle)


def test_nobody_may_send_much_ahead():
    with Live() as server, server.held():
        connection = start(server)
        before = len(server.loop.live)
        with pytest.raises(OSError):
            for _ in range(50):
                connection.sendall(b"x" * server_module.MOST_AHEAD)
                time.sleep(0.01)
        server.until(lambda: len(server.loop.live) < before)
        connection.close()


def test_half_a_request_behind_another_is_dropped_too(monkeypatch):
    monkeypatch.setattr(server_module, "STILL_SECONDS", 0.3)
    whole = wire({"prompt": "The", "max_tokens": 2})
    with Live() as server, server.connect(whole + whole[:-1]) as connection:
        assert reply(connection)[0] == 200
        assert connection.recv(100) == b""


def test_a_client_that_leaves_the_queue():
    with Live(max_batch=1) as server, server.held():
        first, second = start(server), start(server)
        second.close()
        server.until(lambda: len(server.loop.live) == 1)
        first.close()
        server.until(lambda: not server.loop.live)


def test_half_a_request_hurts_nobody_and_is_dropped(monkeypatch):
    monkeypatch.setattr(server_module, "STILL_SECONDS", 0.5)
    with Live() as server:
        whole = wire(LONG)
        halves = [server.connect(whole[:cut]) for cut in (0, 1, 30, whole.index(b"\r\n\r\n") + 4, len(whole) - 1)]
        assert server.complete()["choices"]
        for half in halves:
            assert half.recv(100) == b""


def test_a_slow_but_steady_request_is_served(monkeypatch):
    monkeypatch.setattr(server_module, "STILL_SECONDS", 5)
    with Live() as server, server.connect() as connection:
        request = wire({"prompt": "The", "max_tokens": 2})
        for cut in range(0, len(request), 20):
            connection.sendall(request[cut : cut + 20])
            time.sleep(0.02)
        assert reply(connection)[0] == 200


def test_the_second_request_of_a_connection_has_its_time_too(monkeypatch):
    monkeypatch.setattr(server_module, "STILL_SECONDS", 0.3)
    with Live() as server, server.connect(wire({"prompt": "The", "max_tokens": 2})) as connection:
        assert reply(connection)[0] == 200
        connection.sendall(b"POST /v1/comp")
        assert connection.recv(100) == b""


def test_an_answer_may_take_longer_than_a_request(monkeypatch):
    monkeypatch.setattr(server_module, "STILL_SECONDS", 0.05)
    with Live() as server:
        assert server.post("/v1/completions", LONG).json()["usage"]["completion_tokens"] == 480


@pytest.mark.parametrize("noise", [
    b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"GET / HTTX/1.1\r\n\r\n", b"\0" * 100_000,
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 9999,
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
])  # fmt: skip
def test_garbage_is_answered_in_the_usual_shape_or_not_at_all(live, noise):
    with live.connect() as connection:
        try:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        except OSError:
            answer = b""
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"
    assert live.complete()["choices"]


def test_pipelined_requests_are_answered_in_order(live):
    requests = [wire({"prompt": "The", "max_tokens": 1 + n, "ignore_eos": True}) for n in range(3)]
    requests[-1] = wire({"prompt": "The", "max_tokens": 3, "ignore_eos": True}, "Connection: close")
    with live.connect(b"".join(requests)) as connection:
        answers = connection.makefile("rb").read().split(b"HTTP/1.1 200 OK")[1:]
    counts = [json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] for answer in answers]
    assert counts == [1, 2, 3]


def narrow():
    """A server whose connections hold little on their way."""
    server = Live()
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return server


def test_a_reader_that_stands_still_is_given_up(monkeypatch):
    """By its connection: what the engine makes for it is bounded as it is, and no reason to cut it off."""
    monkeypatch.setattr(server_module, "STILL_SECONDS", 1.0)
    with narrow() as server:
        stalled = start(server, WORDY, receive_buffer=4096)
        stream = next(iter(server.loop.live.values()))
        server.until(server.idle, 60)
        assert stream.failure is None
        assert server.complete()["choices"]  # in the meantime
        server.until(lambda: not server.server.server_state.tasks, 10)
        stalled.close()


def test_a_slow_reader_gets_everything(live):
    whole = live.post("/v1/completions", WORDY).text
    with start(live, WORDY, receive_buffer=4096) as connection:
        got = b""
        while b"[DONE]" not in got:
            time.sleep(0.005)
            got += connection.recv(8192)
    texts = [
        [json.loads(line[6:])["choices"][0]["text"] for line in raw.splitlines() if line.startswith("data: {")]
        for raw in (whole, got.decode())
    ]
    assert texts[0] == texts[1]


def test_a_slow_reader_of_a_long_answer_gets_everything(monkeypatch):
    """It lies in one piece in the server, which has nothing more to write, for longer than a client may stand still."""
    monkeypatch.setattr(server_module, "STILL_SECONDS", 0.4)
    monkeypatch.setattr(server_module, "LEAST_READ", 4 << 10)
    with narrow() as server:
        body = LONG | {"logprobs": 20}  # half a MB in one piece
        whole = server.post("/v1/completions", body).content
        with start(server, body, receive_buffer=4096) as connection:
            server.until(server.idle, 60)
            got, began = b"", time.monotonic()
            while len(got) < len(whole):
                time.sleep(0.02)
                piece = connection.recv(6 << 10)
                assert piece, f"given up after {len(got):,} bytes"
                got += piece
            assert time.monotonic() - began > 3 * server_module.STILL_SECONDS


def test_a_stalled_connection_is_closed_once_its_answer_has_piled_up(monkeypatch):
    monkeypatch.setattr(server_module, "STILL_SECONDS", 0.3)
    with narrow() as server:
        body = LONG | {"logprobs": 20}  # half a MB in one piece
        connection = start(server, body, receive_buffer=4096)
        server.until(server.idle, 60)
        server.until(lambda: not server.server.server_state.connections, 10)
        connection.close()


# ----------------------------------------------------------------------------------------------------- the end


def drained(server):
    """Tell a server to end, as SIGTERM does."""
    server.server.handle_exit(15, None)
    server.until(lambda: server.admission.draining)


def test_what_runs_is_finished_and_new_requests_are_refused():
    with Live() as server:
        with server.held():
            whole, stream = start(server), start(server, LONG | {"stream": True})
            drained(server)
            for request in (wire(LONG), b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"):
                with server.connect(request) as late:
                    status, body = reply(late)
                    assert status == 503 and json.loads(body)["error"]["code"] == "shutting_down"
        assert json.loads(reply(whole)[1])["usage"]["completion_tokens"] == 480
        received = stream.makefile("rb").read()
        assert b"[DONE]" in received and b'"finish_reason":"length"' in received
        server.thread.join(20)
        assert not server.thread.is_alive()
        with pytest.raises(OSError):
            server.connect()


@pytest.mark.parametrize("twice", [False, True])
def test_what_takes_longer_than_the_grace_is_given_up(twice):
    with Live(grace=30 if twice else 0.1, max_batch=1) as server:
        with server.held():
            stream, waiting = start(server, LONG | {"stream": True}), start(server)
            drained(server)
            if twice:  # a second signal: at once
                server.server.handle_exit(15, None)
            assert b"shutting_down" in stream.makefile("rb").read()
            assert reply(waiting)[0] == 503
        server.thread.join(10)
        assert not server.thread.is_alive() and not server.loop.thread.is_alive()


def test_an_idle_server_ends_at_once():
    with Live(grace=60) as server:
        server.complete()
        server.server.handle_exit(2, None)
        server.thread.join(5)
        assert not server.thread.is_alive()


# ----------------------------------------------------------------------------------------------------- the socket


@pytest.mark.parametrize("limits, takes, set_to", [
    ((256, 4096), 4096, 4096), ((4096, 4096), 4096, None), ((256, resource.RLIM_INFINITY), 10_240, 10_240),
    ((20_000, resource.RLIM_INFINITY), 10_240, None), ((256, 512), 100, None),
])  # fmt: skip
def test_as_many_files_as_the_system_lets(monkeypatch, limits, takes, set_to):
    """macOS names no limit, and then refuses all above its own."""
    done = []

    def setrlimit(_, wanted):
        if not 0 <= wanted[0] <= takes:
            raise ValueError("not allowed to raise maximum limit")
        done.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    allow_files()
    assert done == ([] if set_to is None else [(set_to, limits[1])])


def test_a_port_that_is_taken_or_an_address_that_is_not_ours():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: another program listens"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", port):
        pass
    with pytest.raises(UsageError, match=r"^cannot listen on 192\.0\.2\.1, port [0-9]+: [A-Z][a-z ]+$"):
        listen("192.0.2.1", 0)
    with pytest.raises(UsageError, match="--host no such host: no such host or address"):
        listen("no such host", 0)
