"""Collectives between the processes of one machine, through memory that they share. gloo would send the same tensors over the
loopback interface, which takes several times as long as copying them and wakes three threads per message (docs/log.md).

Every process has two blocks of memory, which the others read. A collective is one turn, and turns use the blocks alternately:

    write      this turn's own block
    barrier    count the turn, and wait until every process has counted it: kernels/native/meet.cpp
    read       this turn's blocks of the others

Because there are two blocks, one barrier per turn is enough:

    turn n      write block 0, barrier, read the others' block 0
    turn n + 1  write block 1 (others may still be reading block 0), barrier: now everyone has finished reading block 0
    turn n + 2  write block 0

A block begins with a head: for rows sent to each rank, where each rank's begin and where the last ones end, and at its end the
counter of turns. The files have no name and are gone with the last process.
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

# Bytes of a block's head, and where in it the counter is. Only the first block's counter is used: it counts the turns of both.
_HEAD, _COUNTER = 4096, 4096 - 64
# Bytes of an integer in the head.
_WORD = 8
# The tensors of a block begin at multiples of so many bytes, a cache line.
_LINE = 64
# Seconds of waiting in a barrier before each check that the missing processes still exist.
_CHECK_SECONDS = 0.2
# Seconds of busy waiting in a barrier: mostly the others arrive within microseconds.
_SPIN_SECONDS = 1e-3
# A block grows at least by this factor, and is never smaller than so many bytes, because mapping it again costs time.
_GROWTH, _LEAST = 1.25, 1 << 20
# What the files are called in /proc.
_NAME = "cadre"

# What rows of one tensor are: the number of elements in each, and their dtype.
RowType = tuple[int, torch.dtype]


class _Block:
    """A file in memory, which is closed with this object. `tensor`: all of its bytes, uint8. `offsets`: the row numbers in its
    head, where the rows for each rank begin and the last ones end. Raises `OSError` if it cannot be mapped."""

    def __init__(self, file: int) -> None:
        self.file = file
        if not os.fstat(file).st_size:
            os.ftruncate(file, _LEAST)
        self.map()

    def __del__(self) -> None:
        os.close(self.file)

    @torch.inference_mode(False)  # the block may grow during an evaluation, and training writes to the same tensor later
    def map(self) -> None:
        memory = mmap.mmap(self.file, os.fstat(self.file).st_size)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.offsets = memoryview(memory)[:_COUNTER].cast("q")

    def grow(self, size: int) -> None:
        if size > len(self.tensor):
            try:
                os.ftruncate(self.file, -(-max(size, int(_GROWTH * len(self.tensor))) // mmap.PAGESIZE) * mmap.PAGESIZE)
                self.map()
            except OSError as error:
                raise RunError(f"no memory to share {size:,} bytes between processes: {error.strerror}") from None

    def first_bytes(self, size: int) -> Tensor:
        """uint8 [size]. Maps the file again if its owner has made it longer."""
        if size > len(self.tensor):
            self.map()
        return self.tensor[:size]

    def rows(self, count: int, row_types: Sequence[RowType], wanted: slice = slice(None)) -> list[Tensor]:
        """The block holds `count` rows of each type, one type after the other. Returns the `wanted` ones of each: [rows,
        elements]."""
        *starts, end = _byte_offsets(count, row_types)
        whole, (first, last, _) = self.first_bytes(_HEAD + end), wanted.indices(count)
        tensors = []
        for start, (width, dtype) in zip(starts, row_types, strict=True):
            size = width * dtype.itemsize
            part = whole[_HEAD + start + first * size : _HEAD + start + last * size]
            tensors.append(part.view(dtype).view(last - first, width))
        return tensors


class SharedMemory:
    """The blocks of all processes of a group. All processes must call the same methods in the same order, and a collective must
    have ended before the next begins. `wait`: how long to wait for the other processes. Raises `RunError` if this process's
    memory cannot grow, `DistError` if another process has ended or does not come within `wait`."""

    def __init__(
        self, group: dist.ProcessGroup, blocks: list[list[_Block]], processes: list[int], wait: timedelta, native: ctypes.CDLL
    ) -> None:
        self.group, self.rank, self.blocks, self.processes = group, group.rank(), blocks, processes
        self.own = blocks[self.rank]
        self.others = [rank for rank in range(group.size()) if rank != self.rank]
        self.wait, self.native = wait, native
        # With more processes than cores, one that waits busily takes time from the one that it waits for.
        self.spin_seconds = _SPIN_SECONDS if group.size() <= len(os.sched_getaffinity(0)) else 0.0
        self.counters = [of_rank[0].tensor[_COUNTER : _COUNTER + _WORD].view(torch.int64) for of_rank in blocks]
        self.others_counters = (ctypes.c_void_p * len(self.others))(*(self.counters[rank].data_ptr() for rank in self.others))
        self.turn = 0
        self.sending = False  # between `send_buffers` and `receive`

    @classmethod
    def open(cls, group: dist.ProcessGroup, device: torch.device, wait: timedelta) -> SharedMemory | None:
        """None unless the group has several processes that can all read each other's memory: they compute on CPUs (accelerators
        have faster ways), run on one Linux machine, in one network namespace and as one user, and have the C++ kernels. All
        processes of the group must call it."""
        if device.type != "cpu" or group.size() == 1 or dist.get_backend(group) != "gloo":
            return None
        native = library()
        own = [] if native is None else _create_blocks(group.size())
        key = secrets.token_bytes(16)
        for block in own:
            block.tensor[: len(key)] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, (_network(), os.getpid(), [block.file for block in own], key), group=group)
        near = len({network for network, *_ in told}) == 1
        blocks = [own if rank == group.rank() else _open_blocks(*one) if near else [] for rank, (_, *one) in enumerate(told)]
        opened: list[Any] = [None] * group.size()
        dist.all_gather_object(opened, all(blocks), group=group)
        if native is None or not all(opened):
            return None
        return cls(group, blocks, [process for _, process, _, _ in told], wait, native)

    def buffer(self, size: int) -> Tensor:
        """Where this process writes its `size` bytes of this turn: uint8 [size]. The others may read them until the second
        `barrier` from now."""
        if self.sending:
            raise RuntimeError("rows sent have not been received: this would overwrite them")
        block = self.own[self.turn % 2]
        block.grow(_HEAD + size)
        return block.tensor[_HEAD : _HEAD + size]

    def barrier(self) -> list[_Block]:
        """Wait until all processes have written their blocks of this turn. Returns the blocks by rank; they must be read before
        any other method is called."""
        self.turn += 1
        own, others = self.counters[self.rank].data_ptr(), self.others_counters
        began = time.monotonic()
        while not self.native.cadre_meet(own, others, len(others), self.turn, self.spin_seconds, _CHECK_SECONDS):
            missing = [rank for rank in self.others if self._is_behind(rank)]
            for rank in missing:
                # Asked twice, for it may have counted this turn and then ended.
                if _has_ended(self.processes[rank]) and self._is_behind(rank):
                    raise dist.DistError(f"the process of {self._name(rank)} is gone")
            if missing and time.monotonic() - began > self.wait.total_seconds():
                raise dist.DistError(f"{self._name(missing[0])} has not answered for {self.wait}")
        return [blocks[(self.turn - 1) % 2] for blocks in self.blocks]

    def _is_behind(self, rank: int) -> bool:
        return int(self.counters[rank]) < self.turn

    def _name(self, rank: int) -> str:
        return f"rank {dist.get_global_rank(self.group, rank)}"

    def send_buffers(self, send_counts: Sequence[int], row_types: Sequence[RowType]) -> list[Tensor]:
        """The first half of an all-to-all, which `receive` completes. Returns for each type a tensor [sum(send_counts),
        elements] that this process is to fill: `send_counts[0]` rows for rank 0, then those for rank 1, and so on."""
        rows, block = sum(send_counts), self.own[self.turn % 2]
        self.buffer(_byte_offsets(rows, row_types)[-1])
        for rank, offset in enumerate(accumulate(send_counts, initial=0)):
            block.offsets[rank] = offset
        self.sending = True
        return block.rows(rows, row_types)

    def receive(self, row_types: Sequence[RowType]) -> list[list[Tensor]]:
        """The second half of an all-to-all. Returns by rank the rows that it sent to this one, of each type a tensor [rows,
        elements]. They lie in the other's block and must be read before any other method is called."""
        self.sending = False
        return [
            block.rows(
                block.offsets[self.group.size()], row_types, slice(block.offsets[self.rank], block.offsets[self.rank + 1])
            )
            for block in self.barrier()
        ]

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        """out [ranks * N]: every rank's `own` [N], contiguous, in order of rank. `own` may be a view of `out`."""
        self.buffer(own.nbytes).copy_(_bytes(own))
        chunks = out.view(self.group.size(), -1)
        for chunk, block in zip(chunks, self.barrier(), strict=True):
            if chunk.data_ptr() != own.data_ptr():
                _bytes(chunk).copy_(block.first_bytes(_HEAD + own.nbytes)[_HEAD:])

    def reduce_scatter(self, out: Tensor, chunks: Tensor) -> None:
        """out [N]: the sum over ranks, from rank 0 on, of their chunks for this rank. chunks [ranks * N]: this process's chunk
        for each rank; it may lie in `buffer`."""
        if not self.is_in_buffer(chunks):
            self.buffer(chunks.nbytes).copy_(_bytes(chunks))
        start, size = self.rank * out.nbytes, out.nbytes
        terms = [block.first_bytes(_HEAD + start + size)[_HEAD + start :].view(out.dtype) for block in self.barrier()]
        out.copy_(terms[0])
        for term in terms[1:]:
            out.add_(term)

    def is_in_buffer(self, tensor: Tensor) -> bool:
        """Whether it lies in this turn's buffer."""
        return tensor.untyped_storage().data_ptr() == self.own[self.turn % 2].tensor.untyped_storage().data_ptr()

    def all_to_all(self, out: Tensor, rows: Tensor, send_counts: Sequence[int]) -> None:
        """rows [sum(send_counts), ...]: `send_counts[0]` rows for rank 0, then those for rank 1, and so on. out: the rows that
        all ranks have for this one, in order of rank."""
        row_types = [(prod(rows.shape[1:]), rows.dtype)]
        (buffer,) = self.send_buffers(send_counts, row_types)
        buffer.copy_(rows.view(buffer.shape))
        torch.cat([part for (part,) in self.receive(row_types)], out=out.view(-1, buffer.shape[1]))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _byte_offsets(rows: int, row_types: Sequence[RowType]) -> list[int]:
    """At which byte after the head the rows of each type begin, and where the last ones end."""
    offsets = [0]
    for width, dtype in row_types:
        offsets.append(offsets[-1] + -(-rows * width * dtype.itemsize // _LINE) * _LINE)
    return offsets


def _network() -> str:
    """This process's network namespace. Processes in different ones count as being on different machines."""
    try:
        return str(Path("/proc/self/ns/net").readlink())
    except OSError:
        return ""


def _has_ended(process: int) -> bool:
    """Whether a process has ended, even if its parent has not asked for its exit status yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in ("Z", "X")


def _create_blocks(ranks: int) -> list[_Block]:
    """This process's two blocks; none if the system has no such files, or if the head is too short for so many ranks."""
    if not hasattr(os, "memfd_create") or (ranks + 1) * _WORD > _COUNTER:
        return []
    try:
        return [_Block(os.memfd_create(_NAME)) for _ in range(2)]
    except OSError:
        return []


def _open_blocks(process: int, files: list[int], key: bytes) -> list[_Block]:
    """The two blocks of another process: its open `files`, which must begin with `key`. None if they cannot be opened."""
    paths = [Path(f"/proc/{process}/fd/{file}") for file in files]
    try:
        # The process may be on another machine or in another container; here its number can then be any process's. So only
        # files that carry our name are opened, and the key shows whose they are.
        if not all(str(path.readlink()).startswith(f"/memfd:{_NAME}") for path in paths):
            return []
        blocks = [_Block(os.open(path, os.O_RDWR)) for path in paths]
    except (OSError, ValueError):
        return []
    same = all(bytes(block.tensor[: len(key)].tolist()) == key for block in blocks)
    return blocks if same else []
