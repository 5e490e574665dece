"""Gathers the sharded parameters of a model in the main process, a few rows at a time, so that it can write a model directory
without holding the whole model.

The main process asks for rows of a parameter by broadcast; the ranks that hold them send them, cast to the dtype that they will
be stored in.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.train.parallel.shard import Part

_MAIN = 0


class GatherToMain:
    """The main process calls `fetch` inside `with`, and all other processes call `serve`, which returns when the `with` block
    ends. `kept`: tensors that every process holds whole."""

    def __init__(
        self, parts: dict[str, Part], kept: dict[str, Tensor], dtype: torch.dtype, group: dist.ProcessGroup | None = None
    ) -> None:
        self.parts, self.kept, self.dtype, self.group = parts, kept, dtype, group
        self.names = sorted(parts)  # every rank must number the parameters alike

    def __enter__(self) -> GatherToMain:
        return self

    def __exit__(self, *_: object) -> None:
        self._broadcast_request(-1, 0, 0)

    def fetch(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """What `index` selects of the whole parameter, in `dtype`; a tensor of `kept` in its own dtype. `index` is empty, or
        one slice of rows, or the number of a row (of an expert) followed by an index into that row."""
        if name in self.kept:
            return self.kept[name][index]
        first = index[0] if index else slice(0, self.parts[name].shape[0])
        rows = slice(first, first + 1) if isinstance(first, int) else first
        whole = self._send_to_main(*self._broadcast_request(self.names.index(name), rows.start, rows.stop))
        assert whole is not None
        return whole[0][index[1:]] if isinstance(first, int) else whole

    def serve(self) -> None:
        while (request := self._broadcast_request(0, 0, 0))[0] >= 0:
            self._send_to_main(*request)

    def _broadcast_request(self, number: int, start: int, stop: int) -> tuple[int, int, int]:
        """The main process's request: the number of a parameter (-1 for the end) and which of its rows."""
        request = torch.tensor([number, start, stop])
        dist.broadcast(request, _MAIN, group=self.group)
        number, start, stop = request.tolist()
        return number, start, stop

    def _send_to_main(self, number: int, start: int, stop: int) -> Tensor | None:
        """Send the rows that this rank holds to the main process, which returns all of them."""
        part = self.parts[self.names[number]]
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
