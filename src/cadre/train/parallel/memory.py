"""Tensors between processes of one machine, through memory that they share: gloo carries them through the loopback, which takes
several times as long as copying them, and wakes three threads for a message (docs/log.md).

Every process has two blocks of memory that the others read, and writes into them in turn:

    write      its own block of this turn
    meet       count the turn, and wait until all have: kernels/native/meet.cpp
    read       the others' blocks of this turn

With two blocks, one meeting a turn is enough:

    turn n      write block 0, meet, read the others' block 0
    turn n + 1  write block 1 (others may still read block 0), meet: now all have read block 0
    turn n + 2  write block 0

The files have no name and are gone with the last process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.errors import RunError
from cadre.kernels.native.library import library

# Bytes at the head of a block: where the rows for each rank begin, and the end; in the last of them the turns counted, in the
# first block of a process for both.
_HEAD, _COUNTER = 4096, 4096 - 64
_WORD = 8
# Parts of a block begin at multiples of it.
_LINE = 64
# How long to wait before looking whether who is waited for is still there.
_LOOK_SECONDS = 0.2
# How long to look for the others without a pause: mostly they come within microseconds.
_EAGER_SECONDS = 1e-3

# Rows: elements of each, and their dtype.
Kind = tuple[int, torch.dtype]
_NAME = "cadre"
# Blocks grow by a share of what they are, and at least by so much: to map one again costs time.
_GROWTH, _LEAST = 1.25, 1 << 20


class _Block:
    """A file in memory, which it owns. `tensor`: its bytes, uint8; `ends`: what its head says of where rows begin and end.
    Raises `OSError` where that cannot be had."""

    def __init__(self, file: int) -> None:
        self.file = file
        if not os.fstat(file).st_size:
            os.ftruncate(file, _LEAST)
        self.map()

    def __del__(self) -> None:
        os.close(self.file)

    @torch.inference_mode(False)  # an evaluation may be what makes it grow, and training goes on writing there
    def map(self) -> None:
        memory = mmap.mmap(self.file, os.fstat(self.file).st_size)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.ends = memoryview(memory)[:_COUNTER].cast("q")

    def grow(self, size: int) -> None:
        if size > len(self.tensor):
            try:
                os.ftruncate(self.file, -(-max(size, int(_GROWTH * len(self.tensor))) // mmap.PAGESIZE) * mmap.PAGESIZE)
                self.map()
            except OSError as error:
                raise RunError(f"no memory to share {size:,} bytes between processes: {error.strerror}") from None

    def upto(self, size: int) -> Tensor:
        """Its first bytes, if need be those that its owner has added."""
        if size > len(self.tensor):
            self.map()
        return self.tensor[:size]

    def parts(self, rows: int, kinds: Sequence[Kind], mine: slice = slice(None)) -> list[Tensor]:
        """Of `rows` rows of each kind that lie in it those of `mine`."""
        *places, end = _places(rows, kinds)
        whole, (start, stop, _) = self.upto(_HEAD + end), mine.indices(rows)
        parts = []
        for place, (width, dtype) in zip(places, kinds, strict=True):
            row = width * dtype.itemsize
            part = whole[_HEAD + place + start * row : _HEAD + place + stop * row]
            parts.append(part.view(dtype).view(stop - start, width))
        return parts


class Shared:
    """The blocks of all processes of a group. All must call the same methods in the same order, one call ending before the
    next begins. `wait`: how long for the others. Raises `RunError` where its own memory cannot grow, `DistError` where another
    process is gone or does not come."""

    def __init__(
        self, group: dist.ProcessGroup, blocks: list[list[_Block]], processes: list[int], wait: timedelta, native: ctypes.CDLL
    ) -> None:
        self.group, self.rank, self.blocks, self.processes = group, group.rank(), blocks, processes
        self.mine = blocks[self.rank]
        self.others = [rank for rank in range(group.size()) if rank != self.rank]
        self.wait, self.native = wait, native
        # Where processes outnumber processors, who waits takes time from whom it waits for.
        self.eager = _EAGER_SECONDS if group.size() <= len(os.sched_getaffinity(0)) else 0.0
        self.counters = [of_rank[0].tensor[_COUNTER : _COUNTER + _WORD].view(torch.int64) for of_rank in blocks]
        self.others_counters = (ctypes.c_void_p * len(self.others))(*(self.counters[rank].data_ptr() for rank in self.others))
        self.turn = 0
        self.uncollected = False

    @classmethod
    def open(cls, group: dist.ProcessGroup, device: torch.device, wait: timedelta) -> Shared | None:
        """None unless there are several and every one can read every other's memory: of processors (accelerators have ways of
        their own), on one machine and its network, on Linux, for one user, with the C++ kernels. All must call it."""
        if device.type != "cpu" or group.size() == 1 or dist.get_backend(group) != "gloo":
            return None
        native = library()
        mine = [] if native is None else _made(group.size())
        key = secrets.token_bytes(16)
        for block in mine:
            block.tensor[: len(key)] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, (_network(), os.getpid(), [block.file for block in mine], key), group=group)
        near = len({network for network, *_ in told}) == 1
        blocks = [mine if rank == group.rank() else _found(*one) if near else [] for rank, (_, *one) in enumerate(told)]
        opened: list[Any] = [None] * group.size()
        dist.all_gather_object(opened, all(blocks), group=group)
        if native is None or not all(opened):
            return None
        return cls(group, blocks, [process for _, process, _, _ in told], wait, native)

    def room(self, size: int) -> Tensor:
        """Where this process writes so many bytes, uint8; they stay until the second `meet` from now."""
        if self.uncollected:
            raise RuntimeError("what is laid out has not been collected: this would overwrite it")
        block = self.mine[self.turn % 2]
        block.grow(_HEAD + size)
        return block.tensor[_HEAD : _HEAD + size]

    def meet(self) -> list[_Block]:
        """Wait until all have written. Returns the blocks of this turn, to be read before anything else is called."""
        self.turn += 1
        mine, others = self.counters[self.rank].data_ptr(), self.others_counters
        began = time.monotonic()
        while not self.native.cadre_meet(mine, others, len(others), self.turn, self.eager, _LOOK_SECONDS):
            missing = [rank for rank in self.others if self._misses(rank)]
            for rank in missing:
                # It may have come in the meantime, and ended after its last turn.
                if _gone(self.processes[rank]) and self._misses(rank):
                    raise dist.DistError(f"the process of {self._name(rank)} is gone")
            if missing and time.monotonic() - began > self.wait.total_seconds():
                raise dist.DistError(f"{self._name(missing[0])} has not answered for {self.wait}")
        return [blocks[(self.turn - 1) % 2] for blocks in self.blocks]

    def _misses(self, rank: int) -> bool:
        return int(self.counters[rank]) < self.turn

    def _name(self, rank: int) -> str:
        return f"rank {dist.get_global_rank(self.group, rank)}"

    def lay_out(self, sizes: Sequence[int], kinds: Sequence[Kind]) -> list[Tensor]:
        """Where this process writes rows for each rank, `sizes` of them, one rank's after the other's: of each kind a tensor
        [sum(sizes), elements]."""
        rows, block = sum(sizes), self.mine[self.turn % 2]
        self.room(_places(rows, kinds)[-1])
        for place, end in enumerate(accumulate(sizes, initial=0)):
            block.ends[place] = end
        self.uncollected = True
        return block.parts(rows, kinds)

    def collect(self, kinds: Sequence[Kind]) -> list[list[Tensor]]:
        """From each rank the rows that it has laid out for this one, of the same kinds. They lie where others will write: to be
        read before anything else is called."""
        self.uncollected = False
        return [
            block.parts(block.ends[self.group.size()], kinds, slice(block.ends[self.rank], block.ends[self.rank + 1]))
            for block in self.meet()
        ]

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        """Every rank's `mine`, of equal size and contiguous, rank by rank; out: [ranks * N], of which `mine` may be a part."""
        self.room(mine.nbytes).copy_(_bytes(mine))
        places = out.view(self.group.size(), -1)
        for place, block in zip(places, self.meet(), strict=True):
            if place.data_ptr() != mine.data_ptr():
                _bytes(place).copy_(block.upto(_HEAD + mine.nbytes)[_HEAD:])

    def add_up(self, out: Tensor, parts: Tensor) -> None:
        """out [N]: the sum, from rank 0 on, of what all have for this rank; parts: [ranks * N] of this process, which may lie
        in `room`."""
        if not self.holds(parts):
            self.room(parts.nbytes).copy_(_bytes(parts))
        start, size = self.rank * out.nbytes, out.nbytes
        terms = [block.upto(_HEAD + start + size)[_HEAD + start :].view(out.dtype) for block in self.meet()]
        out.copy_(terms[0])
        for term in terms[1:]:
            out.add_(term)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies in this turn's room."""
        return tensor.untyped_storage().data_ptr() == self.mine[self.turn % 2].tensor.untyped_storage().data_ptr()

    def all_to_all(self, out: Tensor, leaving: Tensor, sizes: Sequence[int]) -> None:
        """Rows for each rank, `sizes` of them, one rank's after the other's; out: what all have for this rank, rank by rank."""
        kinds = [(prod(leaving.shape[1:]), leaving.dtype)]
        (room,) = self.lay_out(sizes, kinds)
        room.copy_(leaving.view(room.shape))
        torch.cat([part for (part,) in self.collect(kinds)], out=out.view(-1, room.shape[1]))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _places(rows: int, kinds: Sequence[Kind]) -> list[int]:
    """At which byte the rows of each kind begin, and where they end."""
    places = [0]
    for width, dtype in kinds:
        places.append(places[-1] + -(-rows * width * dtype.itemsize // _LINE) * _LINE)
    return places


def _network() -> str:
    """Of the network that this process sees: others stand for another machine's, and can be cut off."""
    try:
        return str(Path("/proc/self/ns/net").readlink())
    except OSError:
        return ""


def _gone(process: int) -> bool:
    """Whether a process has ended, if only its parent does not know yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in ("Z", "X")


def _made(ranks: int) -> list[_Block]:
    """This process's two blocks; none where there are no such files, or the head has no room for so many ranks."""
    if not hasattr(os, "memfd_create") or (ranks + 1) * _WORD > _COUNTER:
        return []
    try:
        return [_Block(os.memfd_create(_NAME)) for _ in range(2)]
    except OSError:
        return []


def _found(process: int, files: list[int], key: bytes) -> list[_Block]:
    """The two blocks of a process, if that is what is found under its number here and begins with the key."""
    paths = [Path(f"/proc/{process}/fd/{file}") for file in files]
    try:
        # Of another machine, or seen from another container, these are anyone's files: only such a one is opened.
        if not all(str(path.readlink()).startswith(f"/memfd:{_NAME}") for path in paths):
            return []
        blocks = [_Block(os.open(path, os.O_RDWR)) for path in paths]
    except (OSError, ValueError):
        return []
    same = all(bytes(block.tensor[: len(key)].tolist()) == key for block in blocks)
    return blocks if same else []
