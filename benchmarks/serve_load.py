"""Many clients at once against `cadre serve`, for minutes: is anything lost, mixed or leaked, and how fast is it?

    python benchmarks/serve_load.py MODEL [--streams 64] [--seconds 300] [--json]

Starts the server as a process of its own. First every request of the mix runs alone; then `--streams` clients send them
over and over, streamed, and hold each text against the one it gave alone.

A text may leave its lone run where two tokens are so close that rounding decides (sums in float32 depend on the batch): it is
counted as diverged, and as mixed if it goes on as another request's does. Memory is the server's resident set: the median
of the second tenth of the time (when buffers have found their size) against that of the last.

Exit status 1 if anything was lost or mixed, more than one token in 2,000 began to diverge, or memory grew by more than 5%.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import psutil

WORDS = ("people", "of", "a", "nation", "and", "its", "house", "were", "here", "to", "see", "what", "old", "law", "had", "made")


@dataclass
class Result:
    """What the clients saw. seconds: of the load; first: seconds to each request's first token; gaps: between chunks."""

    seconds: float = 0.0
    finished: int = 0
    tokens: int = 0
    lost: int = 0
    diverged: int = 0
    mixed: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def memory_at(self, start: float, stop: float) -> float:
        """Median of the resident bytes in a span of the load, given as shares of it."""
        return statistics.median(size for at, size in self.memory if start <= at / self.seconds <= stop)


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


async def ask(port: int, body: dict[str, Any], result: Result | None = None) -> str | None:
    """The text of one streamed completion; None if it was cut off or refused. By hand, since the client shares the cores."""
    content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    head = "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""])
    last = time.perf_counter()
    events: list[bytes] = []
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(head.encode() + content)
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


async def load(
    port: int, pid: int, bodies: list[dict[str, Any]], wanted: list[str], *, streams: int, seconds: float
) -> Result:
    """Keep `streams` requests going for a time; every one that was begun is waited for."""
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
            result.memory.append((time.perf_counter() - begin, process.memory_info().rss))
            await asyncio.sleep(seconds / 200)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client() for _ in range(streams)))
    watcher.cancel()
    result.seconds = time.perf_counter() - begin
    return result


def is_mixed(text: str, number: int, wanted: list[str]) -> bool:
    """Whether a text that left its lone run goes on with the words of another request's."""
    shared = next((i for i, pair in enumerate(zip(text, wanted[number], strict=False)) if pair[0] != pair[1]), 0)
    tail = text[shared : shared + 24]
    return len(tail) > 8 and any(tail in other for place, other in enumerate(wanted) if place != number)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(result: Result, streams: int) -> dict[str, Any]:
    early, late = result.memory_at(0.1, 0.2), result.memory_at(0.9, 1.0)
    return {
        "streams": streams,
        "seconds": round(result.seconds, 1),
        "requests": result.finished,
        "lost": result.lost,
        "mixed": result.mixed,
        "diverged": result.diverged,
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
    return not told["lost"] and not told["mixed"] and told["diverged"] * 2_000 <= told["tokens"] and told["growth"] <= 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "cadre.cli.main", "serve", options.model, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"http://[\d.]+:(\d+)", line)
        if not found:
            raise SystemExit(line + server.stderr.read())
        port = int(found[1])
        result = asyncio.run(run(port, server.pid, options))
    finally:
        server.terminate()
        server.wait(60)
    told = report(result, options.streams)
    if options.json:
        print(json.dumps(told))
    else:
        for name, value in told.items():
            print(f"{name:26} {value:,}")
    sys.exit(not is_sound(told))


async def run(port: int, pid: int, options: argparse.Namespace) -> Result:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        context = json.load(answer)["data"][0]["max_model_len"]
    bodies = mix(48, context)
    wanted = await alone(port, bodies)
    return await load(port, pid, bodies, wanted, streams=options.streams, seconds=options.seconds)


if __name__ == "__main__":
    main()
