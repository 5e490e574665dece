"""How FSDP's pieces travel between processors: weights that are gathered, gradients that are added up. On one machine through
memory that its processes share. Elsewhere gloo's own reduce-scatter would add up everything everywhere, from a copy, and then
drop all but one part: here every rank sends each other its part alone, and adds up what it gets, half of the bytes in a third
of the time (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.train.parallel.shared_memory import SharedMemory


class Gather:
    """What `FSDPModule.set_custom_all_gather` takes."""

    def __init__(self, shared: SharedMemory | None) -> None:
        self.shared = shared

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """input: [N], this rank's; output: [ranks * N], rank by rank."""
        if self.shared is None:
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        self.shared.all_gather(output_tensor, input_tensor)
        return None


class AddUp:
    """What `FSDPModule.set_custom_reduce_scatter` takes: for the sum, of equal parts for each rank."""

    def __init__(self, shared: SharedMemory | None) -> None:
        self.shared = shared
        self.filling = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        # For each call FSDP allocates the input first: it is filled where the others read it.
        if self.shared is None or self.filling:
            return torch.empty(*size, dtype=dtype, device=device)
        self.filling = True
        return self.shared.buffer(prod(size) * dtype.itemsize).view(dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """input: [ranks * N], rank by rank; output: [N], the sum over ranks of what they have for this one."""
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"gradients are added, not combined by {op}")
        self.filling = False
        if self.shared is not None:
            self.shared.reduce_scatter(output_tensor, input_tensor)
            return
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        torch.sum(parts.view(group.size(), -1), dim=0, out=output_tensor)
