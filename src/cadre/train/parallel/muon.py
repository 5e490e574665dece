"""Muon on matrices that are sharded by rows: Newton-Schulz needs a whole matrix. The matrices are dealt out to the ranks in
turn. An all-to-all brings each rank all rows of its matrices, it orthogonalises these, and a second all-to-all brings the rows
back to the ranks that hold them. So no rank computes what another does, and two messages to each other rank carry all matrices.

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


class ShardedMuon(Muon):
    """`rows`: for each 2-D parameter, the number of rows of the whole matrix; the parameter itself is this rank's run of them.
    3-D parameters (experts) are sharded between matrices, so every matrix is whole on its rank. `shared`: used in place of
    messages, if there is any."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], rows: dict[Tensor, int], group: dist.ProcessGroup, shared: SharedMemory | None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(groups, **options)
        self.whole_rows, self.group, self.shared = rows, group, shared

    def rows(self, parameter: Tensor) -> int:
        return self.whole_rows.get(parameter, super().rows(parameter))

    def is_whole(self, parameter: Tensor) -> bool:
        return self.group.size() == 1 or parameter not in self.whole_rows

    def orthogonalized(self, every: Iterator[Alike]) -> Iterator[tuple[Alike, list[Tensor]]]:
        sharded = []
        for alike in every:
            if not self.is_whole(alike.steps[0].weight):
                sharded.append(alike)
            else:
                held = any(len(update) for update in alike.updates)
                yield alike, self.together(alike.updates, alike.iterations) if held else alike.updates
        if sharded:
            yield from zip(sharded, self._orthogonalized_rows(sharded), strict=True)

    def _orthogonalized_rows(self, sharded: list[Alike]) -> list[list[Tensor]]:
        """For each update the rows of this rank, after the whole matrix has been orthogonalised."""
        ranks, rank = self.group.size(), self.group.rank()
        own = [update[0] for alike in sharded for update in alike.updates]
        kinds = [(alike.shape, alike.iterations) for alike in sharded for _ in alike.updates]
        dealt = [range(owner, len(own), ranks) for owner in range(ranks)]  # numbers of the matrices that each rank computes
        order = [matrix for matrices in dealt for matrix in matrices]
        # Elements of each matrix that each rank holds.
        held = [[_rows_of(shape[0], holder, ranks) * shape[1] for holder in range(ranks)] for shape, _ in kinds]
        send_counts = [sum(held[matrix][rank] for matrix in matrices) for matrices in dealt]
        recv_counts = [sum(held[matrix][sender] for matrix in dealt[rank]) for sender in range(ranks)]
        rows = torch.cat([own[matrix].flatten() for matrix in order])
        received = rows.new_empty(sum(recv_counts))
        self._all_to_all(received, rows, recv_counts, send_counts)
        if dealt[rank]:
            sizes = [held[matrix][sender] for sender in range(ranks) for matrix in dealt[rank]]
            runs, count = received.split(sizes), len(dealt[rank])
            whole = {
                matrix: torch.cat([run.view(-1, kinds[matrix][0][1]) for run in runs[index::count]])
                for index, matrix in enumerate(dealt[rank])
            }
            done = self._orthogonalized(whole, kinds)
            split = {matrix: done[matrix].flatten().split(held[matrix]) for matrix in dealt[rank]}
            received = torch.cat([split[matrix][holder] for holder in range(ranks) for matrix in dealt[rank]])
        # The way back: what was sent there is received here.
        self._all_to_all(rows, received, send_counts, recv_counts)
        back = dict(zip(order, rows.split([held[matrix][rank] for matrix in order]), strict=True))
        each = iter([back[matrix].view_as(own[matrix])[None] for matrix in range(len(own))])
        return [[next(each) for _ in alike.updates] for alike in sharded]

    def _all_to_all(self, out: Tensor, rows: Tensor, recv_counts: list[int], send_counts: list[int]) -> None:
        if self.shared is None:
            dist.all_to_all_single(out, rows, recv_counts, send_counts, group=self.group)
        else:
            self.shared.all_to_all(out, rows, send_counts)

    def _orthogonalized(self, whole: dict[int, Tensor], kinds: list[tuple[tuple[int, int], int]]) -> dict[int, Tensor]:
        """Whole matrices [M, N] by number, orthogonalised; those of one kind (shape, iterations) in one batch."""
        alike: dict[tuple[tuple[int, int], int], list[int]] = {}
        for matrix in whole:
            alike.setdefault(kinds[matrix], []).append(matrix)
        done: dict[int, Tensor] = {}
        for (_, iterations), matrices in alike.items():
            updates = self.together([whole[matrix][None] for matrix in matrices], iterations)
            done |= {matrix: update[0] for matrix, update in zip(matrices, updates, strict=True)}
        return done


def _rows_of(rows: int, rank: int, ranks: int) -> int:
    """How many of a matrix's rows a rank holds, sharded as `torch.chunk` does."""
    step = -(-rows // ranks)
    return max(0, min(step, rows - rank * step))
