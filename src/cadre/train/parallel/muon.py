"""Muon on matrices cut into rows: Newton-Schulz needs a matrix whole. Each is gathered by one rank, which orthogonalises it
and hands the rows back; matrices are dealt out in turn, so that no rank computes what another does.

Letters in names: L matrix, M row, N column, S rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.kernels.orthogonalize import orthogonalize
from cadre.train.muon import Muon


class SpreadMuon(Muon):
    """`rows`: how many rows the whole of each 2-D parameter has, of which this rank holds its run. 3-D parameters, experts,
    are cut between matrices and need no other rank."""

    def __init__(self, params: Iterable, rows: dict[Tensor, int], group: dist.ProcessGroup, **options: float) -> None:
        super().__init__(params, **options)
        self.rows, self.group, self.turn = rows, group, 0

    def matrix_shape(self, parameter: Tensor) -> tuple[int, int]:
        return self.rows.get(parameter, parameter.shape[-2]), parameter.shape[-1]

    def orthogonalized(self, parameters: list[Tensor], updates: list[Tensor], iterations: int) -> list[Tensor]:
        cut = [place for place, parameter in enumerate(parameters) if parameter in self.rows]
        whole = [place for place, parameter in enumerate(parameters) if parameter not in self.rows and len(updates[place])]
        result = list(updates)
        if whole:
            done = super().orthogonalized([], [updates[place] for place in whole], iterations)
            for place, update in zip(whole, done, strict=True):
                result[place] = update
        if cut:
            rows = self.rows[parameters[cut[0]]]
            done = self._exchanged([updates[place][0] for place in cut], rows, iterations)
            for place, update in zip(cut, done, strict=True):
                result[place] = update[None]
        return result

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.turn = 0
        super().step()

    def _exchanged(self, mine: list[Tensor], rows: int, iterations: int) -> list[Tensor]:
        """This rank's rows of equally shaped matrices, orthogonalised as wholes."""
        ranks, rank, columns = self.group.size(), self.group.rank(), mine[0].shape[1]
        step = -(-rows // ranks)
        held = [max(0, min(step, rows - place * step)) for place in range(ranks)]
        dealt = [[place for place in range(len(mine)) if (place + self.turn) % ranks == owner] for owner in range(ranks)]
        self.turn += len(mine)
        order = [place for places in dealt for place in places]
        out = torch.stack([mine[place] for place in order]).flatten()
        there = [len(places) * held[rank] * columns for places in dealt]
        here = [len(dealt[rank]) * height * columns for height in held]
        gathered = out.new_empty(sum(here))
        dist.all_to_all_single(gathered, out, here, there, group=self.group)
        if dealt[rank]:
            runs = [run.view(len(dealt[rank]), -1, columns) for run in gathered.split(here)]
            done = orthogonalize(torch.cat(runs, dim=1), iterations).split(held, dim=1)
            gathered = torch.cat([run.flatten() for run in done])
        dist.all_to_all_single(out, gathered, there, here, group=self.group)
        back = dict(zip(order, out.view(len(mine), -1, columns), strict=True))
        return [back[place] for place in range(len(mine))]
