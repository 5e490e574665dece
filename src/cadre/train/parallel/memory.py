"""Large tensors between processes of one machine, through memory that they share: gloo carries them through the loopback, which
takes several times as long as copying them (docs/log.md). What is small, and who waits for whom, stays gloo's.

Every process has two blocks of memory that the others read, and writes into them in turn:

    write      its own block of this turn
    meet       all have written: a message of gloo's, so that one that is gone or cut off is noticed as ever
    read       the others' blocks of this turn

A block may still be read while its owner writes that of the next turn; before it writes this one again all have met once more,
and so have read it. The files have no name and are gone with the last process.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.errors import RunError

# Bytes at the head of a block: where the part of each rank begins, and the end.
_HEAD = 4096
_WORD = 8
_NAME = "cadre"
# Blocks grow by a share of what they are, and at least by so much: to map one again costs time.
_GROWTH, _LEAST = 1.25, 1 << 20


class _Block:
    """A file in memory, which it owns. `tensor`: its bytes, uint8. Raises `OSError` where that cannot be had."""

    def __init__(self, file: int) -> None:
        self.file = file
        if not os.fstat(file).st_size:
            os.ftruncate(file, _LEAST)
        self.map()

    def __del__(self) -> None:
        os.close(self.file)

    @torch.inference_mode(False)  # an evaluation may be what makes it grow, and training goes on writing there
    def map(self) -> None:
        self.tensor = torch.frombuffer(mmap.mmap(self.file, os.fstat(self.file).st_size), dtype=torch.uint8)

    def grow(self, size: int) -> None:
        if size > len(self.tensor):
            try:
                os.ftruncate(self.file, max(size, int(_GROWTH * len(self.tensor))))
                self.map()
            except OSError as error:
                raise RunError(f"no memory to share {size:,} bytes between processes: {error.strerror}") from None

    def upto(self, size: int) -> Tensor:
        """Its first bytes, if need be those that its owner has added."""
        if size > len(self.tensor):
            self.map()
        return self.tensor[:size]


class Shared:
    """The blocks of all processes of a group. All must call the same methods in the same order, one call ending before the next
    begins. Raises `RunError` where its own memory cannot grow; what gloo raises where a process is gone comes through."""

    def __init__(self, group: dist.ProcessGroup, mine: list[_Block], all_of_them: list[list[_Block]]) -> None:
        self.group, self.mine, self.blocks = group, mine, all_of_them
        self.turn = 0
        self.sign = torch.zeros(1)

    @classmethod
    def open(cls, group: dist.ProcessGroup, device: torch.device) -> Shared | None:
        """None unless there are several and every one can read every other's memory: of processors (accelerators have ways of
        their own), on one machine, on Linux, for one user. All must call it."""
        if device.type != "cpu" or group.size() == 1 or dist.get_backend(group) != "gloo":
            return None
        mine = _made(group.size())
        key = secrets.token_bytes(16)
        for block in mine:
            block.tensor[: len(key)] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, (os.getpid(), [block.file for block in mine], key), group=group)
        blocks = [_found(*one) for one in told]
        opened: list[Any] = [None] * group.size()
        dist.all_gather_object(opened, all(blocks), group=group)
        return cls(group, mine, blocks) if all(opened) else None

    def room(self, size: int) -> Tensor:
        """Where this process writes so many bytes, uint8; they stay until the second `meet` from now."""
        block = self.mine[self.turn % 2]
        block.grow(_HEAD + size)
        return block.tensor[_HEAD : _HEAD + size]

    def meet(self) -> list[_Block]:
        """Wait until all have written. Returns the blocks of this turn, to be read before anything else is called."""
        dist.all_reduce(self.sign, group=self.group)
        self.turn += 1
        return [blocks[(self.turn - 1) % 2] for blocks in self.blocks]

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
        start, size = self.group.rank() * out.nbytes, out.nbytes
        terms = [block.upto(_HEAD + start + size)[_HEAD + start :].view(out.dtype) for block in self.meet()]
        out.copy_(terms[0])
        for term in terms[1:]:
            out.add_(term)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies in this turn's room."""
        return tensor.untyped_storage().data_ptr() == self.mine[self.turn % 2].tensor.untyped_storage().data_ptr()

    def all_to_all(self, out: Tensor, leaving: Tensor, sizes: Sequence[int]) -> Callable[[], None]:
        """Rows for each rank, `sizes` of them, one rank's after the other's. What is returned ends it: then out holds what all
        have for this rank, rank by rank."""
        row = prod(leaving.shape[1:]) * leaving.element_size()
        self.room(leaving.nbytes).copy_(_bytes(leaving))
        ends = torch.tensor([0, *sizes]).cumsum(0) * row
        self._head(self.mine[self.turn % 2])[: len(ends)] = ends

        def end() -> None:
            to, rank, filled = _bytes(out), self.group.rank(), 0
            for block in self.meet():
                first, last = self._head(block)[rank : rank + 2].tolist()
                part = block.upto(_HEAD + last)[_HEAD + first :]
                to[filled : filled + len(part)] = part
                filled += len(part)

        return end

    @staticmethod
    def _head(block: _Block) -> Tensor:
        return block.tensor[:_HEAD].view(torch.int64)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _made(ranks: int) -> list[_Block]:
    """This process's two blocks; none where there are no such files, or the head has no room for so many ranks."""
    if not hasattr(os, "memfd_create") or (ranks + 1) * _WORD > _HEAD:
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
