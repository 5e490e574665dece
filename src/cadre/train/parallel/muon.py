"""Muon on matrices cut into rows: Newton-Schulz needs a matrix whole. Each is gathered by one rank, which orthogonalises it
and hands the rows back; matrices are dealt out in turn, so that no rank computes what another does. All travel at once: one
message to each other rank there, one back.

Letters in names: M row, N column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.train.muon import Alike, Muon
from cadre.train.parallel.shared_memory import SharedMemory


class SpreadMuon(Muon):
    """`rows`: how many rows the whole of each 2-D parameter has, of which this rank holds its run. 3-D parameters, experts,
    are cut between matrices and need no other rank."""

    def __init__(
        self, params: Iterable, rows: dict[Tensor, int], group: dist.ProcessGroup, shared: SharedMemory | None, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self.whole_rows, self.group, self.shared = rows, group, shared

    def rows(self, parameter: Tensor) -> int:
        return self.whole_rows.get(parameter, super().rows(parameter))

    def is_whole(self, parameter: Tensor) -> bool:
        return self.group.size() == 1 or parameter not in self.whole_rows

    def orthogonalized(self, every: Iterator[Alike]) -> Iterator[tuple[Alike, list[Tensor]]]:
        cut = []
        for alike in every:
            if not self.is_whole(alike.steps[0].weight):
                cut.append(alike)
            else:
                held = any(len(update) for update in alike.updates)
                yield alike, self.together(alike.updates, alike.iterations) if held else alike.updates
        if cut:
            yield from zip(cut, self._exchanged(cut), strict=True)

    def _exchanged(self, cut: list[Alike]) -> list[list[Tensor]]:
        """This rank's rows of matrices orthogonalised as wholes."""
        ranks, rank = self.group.size(), self.group.rank()
        mine = [update[0] for alike in cut for update in alike.updates]
        kinds = [(alike.shape, alike.iterations) for alike in cut for _ in alike.updates]
        dealt = [range(owner, len(mine), ranks) for owner in range(ranks)]
        order = [matrix for matrices in dealt for matrix in matrices]
        # Elements of a matrix that a rank holds.
        held = [[_rows_of(shape[0], place, ranks) * shape[1] for place in range(ranks)] for shape, _ in kinds]
        there = [sum(held[matrix][rank] for matrix in matrices) for matrices in dealt]
        here = [sum(held[matrix][place] for matrix in dealt[rank]) for place in range(ranks)]
        out = torch.cat([mine[matrix].flatten() for matrix in order])
        gathered = out.new_empty(sum(here))
        self._send(gathered, out, here, there)
        if dealt[rank]:
            sizes = [held[matrix][place] for place in range(ranks) for matrix in dealt[rank]]
            runs, count = gathered.split(sizes), len(dealt[rank])
            whole = {
                matrix: torch.cat([run.view(-1, kinds[matrix][0][1]) for run in runs[index::count]])
                for index, matrix in enumerate(dealt[rank])
            }
            done = self._orthogonalized(whole, kinds)
            rows = {matrix: done[matrix].flatten().split(held[matrix]) for matrix in dealt[rank]}
            gathered = torch.cat([rows[matrix][place] for place in range(ranks) for matrix in dealt[rank]])
        self._send(out, gathered, there, here)
        back = dict(zip(order, out.split([held[matrix][rank] for matrix in order]), strict=True))
        each = iter([back[matrix].view_as(mine[matrix])[None] for matrix in range(len(mine))])
        return [[next(each) for _ in alike.updates] for alike in cut]

    def _send(self, arriving: Tensor, leaving: Tensor, here: list[int], there: list[int]) -> None:
        if self.shared is None:
            dist.all_to_all_single(arriving, leaving, here, there, group=self.group)
        else:
            self.shared.all_to_all(arriving, leaving, there)

    def _orthogonalized(self, whole: dict[int, Tensor], kinds: list[tuple[tuple[int, int], int]]) -> dict[int, Tensor]:
        """Whole matrices [M, N] by number, those of one kind (shape, iterations) together."""
        alike: dict[tuple[tuple[int, int], int], list[int]] = {}
        for matrix in whole:
            alike.setdefault(kinds[matrix], []).append(matrix)
        done: dict[int, Tensor] = {}
        for (_, iterations), matrices in alike.items():
            updates = self.together([whole[matrix][None] for matrix in matrices], iterations)
            done |= {matrix: update[0] for matrix, update in zip(matrices, updates, strict=True)}
        return done


def _rows_of(rows: int, place: int, ranks: int) -> int:
    """How many of so many rows a rank holds, cut as `torch.chunk` does."""
    step = -(-rows // ranks)
    return max(0, min(step, rows - place * step))
