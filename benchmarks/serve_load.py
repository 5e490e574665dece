"""Many clients at once against `cadre serve`, for minutes: is anything lost, mixed or leaked, and how fast is it?

    python benchmarks/serve_load.py MODEL [--streams 64] [--nuisances 4] [--seconds 300] [--json]

Starts the server as a process of its own. First every request of the mix runs alone; then `--streams` clients send them
over and over, streamed, and hold each text against the one it gave alone. Beside them `--nuisances` clients vanish, stand
still, send halves, garbage and requests that are dear to read. The cache holds an eighth of what the streams could fill, so
that sequences have to make way for each other.

A text may leave its lone run where two tokens are so close that rounding decides (sums in float32 depend on what else is
computed): it is counted as diverged, and as mixed if it goes on as another request's does. Memory is the server's resident
set: the median of the second tenth of the time (when buffers have found their size) against that of the last.

Exit status 1 if anything was lost or mixed, no sequence had to make way, memory grew by more than 5%, or more texts diverged
than rounding explains: one, and one for every 100,000 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import psutil

WORDS = ("people", "of", "a", "nation", "and", "its", "house", "were", "here", "to", "see", "what", "old", "law", "had", "made")


# Tokens for each text that may leave its lone run.
ROUNDING = 100_000


@dataclass
class Result:
    """What the clients saw. seconds: of the load; first: seconds to each request's first token; gaps: between chunks."""

    seconds: float = 0.0
    finished: int = 0
    tokens: int = 0
    lost: int = 0
    diverged: int = 0
    mixed: int = 0
    disturbed: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def memory_at(self, start: float, stop: float) -> float:
        """Median of the resident bytes in a span of the load, given as shares of it."""
        count = len(self.memory)
        return statistics.median(self.memory[int(start * count) : int(stop * count)])


def mix(count: int, context: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of all lengths that fit the context: greedy and seeded, beginning alike and not."""
    rng = random.Random(seed)
    bodies = []
    for number in range(count):
        share = rng.choice((0.02, 0.1, 0.3, 0.5))
        prompt = " ".join(["Fellow citizens,", *rng.choices(WORDS, k=max(1, int(share * context / 3)))])
        most = max(4, int(rng.choice((0.02, 0.1, 0.2, 0.4)) * context))
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": most, "ignore_eos": True}
        body |= {"temperature": 0} if number % 3 == 0 else {"temperature": 0.9, "seed": number}
        bodies.append(body)
    return bodies


def wire(content: bytes) -> bytes:
    """A request for a completion as it is sent."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


async def ask(port: int, body: dict[str, Any], result: Result | None = None) -> str | None:
    """The text of one streamed completion; None if it was cut off or refused. By hand, since the client shares the cores."""
    content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    last = time.perf_counter()
    events: list[bytes] = []
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(wire(content))
        while line := await reader.readline():
            if line.startswith(b"data: "):
                events.append(line[6:])
                now = time.perf_counter()
                if result is not None:
                    (result.first if len(events) == 1 else result.gaps).append(now - last)
                last = now
        writer.close()
    except OSError:
        return None
    if not events or events[-1] != b"[DONE]\n":
        return None
    chunks = [json.loads(line) for line in events[:-1]]
    if result is not None:
        result.tokens += chunks[-1]["usage"]["completion_tokens"]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def alone(port: int, bodies: list[dict[str, Any]]) -> list[str]:
    texts = [await ask(port, body) for body in bodies]
    if None in texts:
        raise SystemExit(f"request {texts.index(None)} got no answer when it ran alone")
    return [text or "" for text in texts]


async def disturb(port: int, number: int, result: Result) -> None:
    """A client that vanishes, stands still, stops in the middle of a request, sends garbage, sends ahead, or asks for what is
    dear to read and to write, again and again."""
    rng = random.Random(number)
    endless: dict[str, Any] = {"prompt": "Fellow citizens", "max_tokens": 200, "ignore_eos": True, "stream": True}
    whole = wire(json.dumps(endless).encode())
    wordy = wire(json.dumps(endless | {"logprobs": 20, "echo": True}).encode())
    grammar = wire(json.dumps(endless | {"guided_regex": f"[a-z]{{{number + 2},400}}x"}).encode())
    scored = wire(json.dumps({"prompt": [[300] * 200] * 8, "max_tokens": 0, "echo": True, "logprobs": 20}).encode())
    long = wire(json.dumps({"prompt": "people " * 100_000}).encode())
    noise = (whole, whole[: len(whole) // 2], b"\0" * 1000, whole + whole, wordy, grammar, scored, long)
    while True:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
            await asyncio.get_running_loop().sock_sendall(raw, rng.choice(noise))
            await asyncio.sleep(rng.choice((0.0, 0.02, 0.2, 2.0)))  # without reading
        except OSError:
            pass
        finally:
            raw.close()
        result.disturbed += 1


async def load(
    port: int,
    pid: int,
    bodies: list[dict[str, Any]],
    wanted: list[str],
    *,
    streams: int,
    seconds: float,
    nuisances: int = 0,
) -> Result:
    """Keep `streams` requests going for a time, beside so many clients that misbehave; every request that was begun is waited
    for."""
    result, begin = Result(), time.perf_counter()
    rng = random.Random(1)

    async def client() -> None:
        while time.perf_counter() - begin < seconds:
            number = rng.randrange(len(bodies))
            text = await ask(port, bodies[number], result)
            result.finished += 1
            if text is None:
                result.lost += 1
            elif text != wanted[number]:
                result.diverged += 1
                result.mixed += is_mixed(text, number, wanted)

    async def watch() -> None:
        process = psutil.Process(pid)
        while True:
            result.memory.append(process.memory_info().rss)
            await asyncio.sleep(seconds / 200)

    others = [watch(), *(disturb(port, number, result) for number in range(nuisances))]
    tasks = [asyncio.create_task(other) for other in others]
    await asyncio.gather(*(client() for _ in range(streams)))
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()  # why it ended before its time
    result.seconds = time.perf_counter() - begin
    return result


def is_mixed(text: str, number: int, wanted: list[str]) -> bool:
    """Whether a text that left its lone run goes on with the words of another request's."""
    shared = next((i for i, pair in enumerate(zip(text, wanted[number], strict=False)) if pair[0] != pair[1]), 0)
    tail = text[shared : shared + 24]
    return len(tail) > 8 and any(tail in other for place, other in enumerate(wanted) if place != number)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def preemptions(port: int) -> int:
    """How often a sequence of this server had to make way for others."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("cadre_preemptions_total ")).split()[1]))


def report(result: Result, streams: int) -> dict[str, Any]:
    early, late = result.memory_at(0.1, 0.2), result.memory_at(0.9, 1.0)
    return {
        "streams": streams,
        "seconds": round(result.seconds, 1),
        "requests": result.finished,
        "lost": result.lost,
        "mixed": result.mixed,
        "diverged": result.diverged,
        "disturbed": result.disturbed,
        "tokens": result.tokens,
        "tokens_per_second": round(result.tokens / result.seconds, 1),
        "time_to_first_token_p50": round(percentile(result.first, 0.5), 4),
        "time_to_first_token_p99": round(percentile(result.first, 0.99), 4),
        "between_tokens_p50": round(percentile(result.gaps, 0.5), 4),
        "between_tokens_p99": round(percentile(result.gaps, 0.99), 4),
        "resident_bytes_early": int(early),
        "resident_bytes_late": int(late),
        "growth": round(late / early - 1, 4),
    }


def is_sound(told: dict[str, Any]) -> bool:
    rounding = told["diverged"] <= 1 + told["tokens"] / ROUNDING
    return not told["lost"] and not told["mixed"] and rounding and told["growth"] <= 0.05


def cache_size(model: str, streams: int) -> int:
    """Bytes that hold an eighth of so many full contexts."""
    from cadre.hub.directory import load_config, model_directory
    from cadre.plan.count import count

    config = load_config(model_directory(model))
    return max(1, streams // 8) * config.max_position_embeddings * count(config, cache_bytes=4).kv_cache_bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--nuisances", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "cadre.cli.main", "serve", options.model, "--port", "0"]
    command += ["--cache", str(cache_size(options.model, options.streams))]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        told: list[str] = []  # kernels may have to be compiled first, and it says so
        while not (found := re.search(r"http://[\d.]+:(\d+)", told[-1] if told else "")):
            told.append(server.stderr.readline())
            if not told[-1]:
                raise SystemExit("".join(told))
        port = int(found[1])
        result = asyncio.run(run(port, server.pid, options))
        made_way = preemptions(port)
    finally:
        server.terminate()
        server.wait(60)
    figures = report(result, options.streams) | {"preemptions": made_way}
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:26} {value:,}")
    sys.exit(not (is_sound(figures) and made_way))


async def run(port: int, pid: int, options: argparse.Namespace) -> Result:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        context = json.load(answer)["data"][0]["max_model_len"]
    bodies = mix(48, context)
    wanted = await alone(port, bodies)
    counts = {"streams": options.streams, "nuisances": options.nuisances}
    return await load(port, pid, bodies, wanted, seconds=options.seconds, **counts)


if __name__ == "__main__":
    main()
