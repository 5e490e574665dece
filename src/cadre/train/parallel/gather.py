"""The tensors of a model in parts, one after the other in the main process's memory: what writing a model directory needs.

The main process says which rows it wants of which parameter, those that hold them send them, cast as they will be stored.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.train.parallel.shard import Part

_MAIN = 0


class Gather:
    """`fetch` in the main process within `with`, `serve` in all others meanwhile. `kept`: tensors that all hold whole."""

    def __init__(
        self, parts: dict[str, Part], kept: dict[str, Tensor], dtype: torch.dtype, group: dist.ProcessGroup | None = None
    ) -> None:
        self.parts, self.kept, self.dtype, self.group = parts, kept, dtype, group
        self.names = sorted(parts)  # in one order for all, whichever of them each holds

    def __enter__(self) -> Gather:
        return self

    def __exit__(self, *_: object) -> None:
        self._ask(-1, 0, 0)

    def fetch(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        if name in self.kept:
            return self.kept[name][index]
        first = index[0] if index else slice(0, self.parts[name].shape[0])
        rows = slice(first, first + 1) if isinstance(first, int) else first
        whole = self._send(*self._ask(self.names.index(name), rows.start, rows.stop))
        assert whole is not None
        return whole[0][index[1:]] if isinstance(first, int) else whole

    def serve(self) -> None:
        while (asked := self._ask(0, 0, 0))[0] >= 0:
            self._send(*asked)

    def _ask(self, place: int, start: int, stop: int) -> tuple[int, int, int]:
        asked = torch.tensor([place, start, stop])
        dist.broadcast(asked, _MAIN, group=self.group)
        place, start, stop = asked.tolist()
        return place, start, stop

    def _send(self, place: int, start: int, stop: int) -> Tensor | None:
        """Rows of a parameter to the main process, from each that holds some of them."""
        part = self.parts[self.names[place]]
        rank, runs = dist.get_rank(), []
        for holder in part.holders:
            rows = part.rows(holder)
            low, high = max(start, rows.start), min(stop, rows.stop)
            if low >= high:
                continue
            if rank == holder:
                run = part.local[low - rows.start : high - rows.start].to(self.dtype).contiguous()
                if rank == _MAIN:
                    runs.append((low, run))
                else:
                    dist.send(run, _MAIN, group=self.group)
            elif rank == _MAIN:
                run = torch.empty(high - low, *part.shape[1:], dtype=self.dtype, device=part.local.device)
                dist.recv(run, holder, group=self.group)
                runs.append((low, run))
        return torch.cat([run for _, run in sorted(runs, key=lambda pair: pair[0])]) if runs else None
