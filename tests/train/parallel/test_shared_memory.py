"""Collectives through shared memory give what messages would give."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cadre.train.parallel import shared_memory
from cadre.train.parallel.shared_memory import SharedMemory
from tests.train.parallel.world import world

CPU = torch.device("cpu")
WAIT = timedelta(minutes=1)


def sizes(turn: int, sender: int, ranks: int) -> list[int]:
    """Rows from a rank to each: none to some, and now and then more than a block has had room for."""
    generator = torch.Generator().manual_seed(97 * turn + sender)
    rows = torch.randint(0, 5, (ranks,), generator=generator) * (1 if turn % 3 else 20_000)
    return rows.tolist()


def sent(turn: int, sender: int, ranks: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(turn + 1000 * sender)
    return torch.randint(0, 99, (sum(sizes(turn, sender, ranks)), 3), generator=generator).to(dtype)


def exchanged(ranks, dtype: torch.dtype) -> bool:
    shared = SharedMemory.open(dist.group.WORLD, CPU, WAIT)
    assert shared is not None
    for turn in range(8):
        here = [sizes(turn, sender, ranks.size)[ranks.rank] for sender in range(ranks.size)]
        out = torch.full((sum(here), 3), 7).to(dtype)
        shared.all_to_all(out, sent(turn, ranks.rank, ranks.size, dtype), sizes(turn, ranks.rank, ranks.size))
        parts = [
            sent(turn, sender, ranks.size, dtype).split(sizes(turn, sender, ranks.size))[ranks.rank]
            for sender in range(ranks.size)
        ]
        assert torch.equal(out, torch.cat(parts)), turn
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_rows_go_to_the_ranks_that_they_are_for(dtype):
    assert world(3, exchanged, dtype) == [True] * 3


def received(ranks) -> bool:
    """Rows of several types at once, none now and then."""
    shared = SharedMemory.open(dist.group.WORLD, CPU, WAIT)
    assert shared is not None
    row_types = [(5, torch.float32), (3, torch.uint8), (2, torch.int64), (1, torch.bfloat16)]

    def rows(turn: int, sender: int, which: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(turn + 100 * sender)
        (width, dtype), count = row_types[which], sum(sizes(turn, sender, ranks.size))
        return torch.randint(0, 99, (count, width), generator=generator).to(dtype)

    for turn in range(6):
        for which, place in enumerate(shared.send_buffers(sizes(turn, ranks.rank, ranks.size), row_types)):
            place.copy_(rows(turn, ranks.rank, which))
        for sender, found in enumerate(shared.receive(row_types)):
            for which, part in enumerate(found):
                whole = rows(turn, sender, which).split(sizes(turn, sender, ranks.size))
                assert torch.equal(part, whole[ranks.rank]), (turn, sender, which)
    return True


def test_rows_of_several_types():
    assert world(3, received) == [True] * 3


def hurried(ranks) -> bool:
    """One rank reads late, while the others go on to what comes next: gathers, sums and rows in turn, of sizes that vary, in
    and out of inference mode, as training and evaluations have them."""
    shared = SharedMemory.open(dist.group.WORLD, CPU, WAIT)
    assert shared is not None
    barrier, size = shared.barrier, ranks.size

    def late():
        blocks = barrier()
        if ranks.rank == shared.turn % size:
            time.sleep(0.02)
        return blocks

    shared.barrier = late
    for turn in range(24):
        count = 1000 * (turn % 5 + 1) * (40 if turn in (7, 15) else 1)
        with torch.inference_mode(turn % 3 == 0):
            mine = torch.full((count,), float(ranks.rank + turn))
            gathered = torch.empty(size * count)
            shared.all_gather(gathered, mine)
            assert torch.equal(gathered.view(size, -1).mean(dim=1), torch.arange(size) + float(turn))
            parts = shared.buffer(4 * size * count).view(torch.float32) if turn % 2 else torch.empty(size * count)
            parts.copy_(torch.arange(size).repeat_interleave(count) * 10 + ranks.rank)
            added = torch.empty(count)
            shared.reduce_scatter(added, parts)
            assert torch.equal(added, torch.full((count,), float(size * 10 * ranks.rank + sum(range(size)))))
            arrived = torch.empty(size * turn)
            shared.all_to_all(arrived, mine[: size * turn], [turn] * size)
            assert torch.equal(arrived, (torch.arange(size) + float(turn)).repeat_interleave(turn))
    return True


def test_nobody_writes_over_what_is_still_read():
    assert world(3, hurried) == [True] * 3


def opened(ranks, broken: str, where: int) -> bool:
    if ranks.rank == where:
        if broken == "elsewhere":  # another machine's processes have other files under these numbers, or none
            found = shared_memory._open_blocks
            shared_memory._open_blocks = lambda process, files, key: found(os.getpid(), files[::-1], b"x" * len(key))
        elif broken == "no such files":
            del os.memfd_create
        elif broken == "not allowed":
            shared_memory.os = type("Closed", (), {**vars(os), "open": staticmethod(lambda *_: os.open("/nowhere", 0))})
    return SharedMemory.open(dist.group.WORLD, CPU, WAIT) is None


@pytest.mark.parametrize("broken", ["elsewhere", "no such files", "not allowed"])
def test_where_one_cannot_read_anothers_memory_nobody_does(broken):
    assert world(2, opened, broken, 1) == [True, True]


def alone(ranks) -> bool:
    return SharedMemory.open(dist.group.WORLD, CPU, WAIT) is None


def test_one_process_shares_with_nobody():
    assert world(1, alone) == [True]


def grown(ranks) -> int:
    """Open files after the memory of many turns of ever more bytes has been mapped."""
    shared = SharedMemory.open(dist.group.WORLD, CPU, WAIT)
    assert shared is not None
    before = len(list(Path("/proc/self/fd").iterdir()))
    for turn in range(40):
        mine = torch.full((50_000 * turn + 1,), float(ranks.rank))
        out = mine.new_empty(2 * len(mine))
        shared.all_gather(out, mine)
        assert torch.equal(out.view(2, -1)[:, -1], torch.tensor([0.0, 1.0]))
    return len(list(Path("/proc/self/fd").iterdir())) - before


def test_growing_keeps_no_more_files_open():
    assert max(world(2, grown)) <= 8


def left_alone(ranks, gone: bool) -> str:
    """What one is told that the other leaves waiting."""
    shared = SharedMemory.open(dist.group.WORLD, CPU, WAIT if gone else timedelta(seconds=0.5))
    assert shared is not None
    if ranks.rank == 1:
        time.sleep(2)
        return ""
    if gone:  # in its place one that has ended, which nobody has asked after yet
        shared.processes[1] = os.fork()
        if not shared.processes[1]:
            os._exit(0)
    with pytest.raises(dist.DistError) as told:
        shared.barrier()
    return str(told.value)


def test_one_that_does_not_come_is_named():
    assert world(2, left_alone, False)[0] == "rank 1 has not answered for 0:00:00.500000"
    assert world(2, left_alone, True)[0] == "the process of rank 1 is gone"
