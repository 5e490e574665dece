"""Several processes within a test: forked from this one, which has everything loaded, and joined over gloo."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from cadre.train.parallel.ranks import Ranks

# The machine's other work may pause a process for a minute.
PATIENCE = 240.0


def world(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(ranks, *arguments)` in each of `size` processes; what they return, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_member, args=(theirs, rank, size, port, work, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    try:
        answers = [_answer(end) for end in ends]
    except EOFError:
        answers = [("failed", "a process ended without a word")]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    failures = [what for how, what in answers if how == "failed"]
    # The one that failed first has a cause of its own; the others lost it.
    lost = ("Connection closed", "is gone", "has not answered")
    assert not failures, min(failures, key=lambda text: any(words in text for words in lost))
    return [what for _, what in answers]


def _answer(end: Connection) -> tuple[str, Any]:
    if not end.poll(PATIENCE):
        return "failed", "no answer in time"
    return torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)


def _say(end: Connection, how: str, what: Any) -> None:
    # Tensors by value: by default they would be shared with a process that is about to end.
    buffer = io.BytesIO()
    torch.save((how, what), buffer)
    end.send_bytes(buffer.getvalue())


def _member(end: Connection, rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        ranks = Ranks(torch.device("cpu"), timeout=PATIENCE / 60)
        _say(end, "done", work(ranks, *arguments))
        ranks.close()
    except BaseException:
        _say(end, "failed", traceback.format_exc())
    end.close()
    os._exit(0)  # neither pytest's nor torch's clean-up is this process's
