"""Ten seconds of many clients, some of whom misbehave. Five minutes of it: benchmarks/serve_load.py."""

import asyncio
import importlib
import os
from pathlib import Path

import pytest

from tests.serve.live import Live


@pytest.fixture
def serve_load(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("serve_load")


def test_nothing_is_lost_mixed_or_leaked(serve_load):
    async def run(server):
        bodies = serve_load.mix(24, 256)
        wanted = await serve_load.alone(server.port, bodies)
        assert len(set(wanted)) == len(wanted)  # else a mixed-up text might go unseen
        return await serve_load.load(server.port, os.getpid(), bodies, wanted, streams=32, seconds=10, nuisances=2)

    with Live(max_batch=16, max_queue=64) as server:
        result = asyncio.run(run(server))
        server.until(server.idle)
        assert serve_load.preemptions(server.port) == 0
    told = serve_load.report(result, 32)
    assert told["requests"] >= 64 and told["disturbed"] >= 10 and serve_load.is_sound(told), told


def test_so_small_a_cache_that_sequences_make_way_for_each_other(serve_load):
    async def run(server):
        bodies = serve_load.mix(12, 256)
        wanted = await serve_load.alone(server.port, bodies)
        return await serve_load.load(server.port, os.getpid(), bodies, wanted, streams=12, seconds=2)

    with Live(max_batch=12, engine={"cache_bytes": 64 << 10}) as server:
        assert server.engine.max_length == 512 and server.engine.pool.tokens < 12 * 256
        result = asyncio.run(run(server))
        assert serve_load.preemptions(server.port) > 0
        server.until(server.idle)
    told = serve_load.report(result, 12)
    assert told["requests"] >= 12 and told["lost"] == told["mixed"] == told["diverged"] == 0, told


def test_a_text_of_another_request_is_told_from_rounding(serve_load):
    wanted = ["the house of the people", "what old law had made for them", "peace"]
    assert not serve_load.is_mixed("the house of what they were", 0, wanted)
    assert serve_load.is_mixed("what old law had made for them", 0, wanted)
    assert serve_load.is_mixed("the house old law had made for them", 0, wanted)
