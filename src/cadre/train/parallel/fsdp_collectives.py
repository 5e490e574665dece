"""The collectives that FSDP uses between CPU processes: an all-gather of weights and a reduce-scatter of gradients. Between
processes of one machine they go through shared memory. Elsewhere gloo carries them, but not by its own reduce-scatter, which
copies its input, sums the whole of it on every rank and then drops all but one chunk: here each rank sends every other rank
only the chunk that is for it and sums the chunks it receives, which takes half of the bytes and a third of the time
(docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from cadre.train.parallel.shared_memory import SharedMemory

# The name it has since torch 2.13, which warns of the one before, in every process.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class AllGather:
    """For `FSDPModule.set_custom_all_gather`."""

    def __init__(self, shared: SharedMemory | None) -> None:
        self.shared = shared

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """input_tensor [N]: this rank's chunk; output_tensor [ranks * N]: all ranks' chunks, in order of rank."""
        if self.shared is None:
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        self.shared.all_gather(output_tensor, input_tensor)
        return None


class ReduceScatter:
    """For `FSDPModule.set_custom_reduce_scatter`; the only reduction is the sum."""

    def __init__(self, shared: SharedMemory | None) -> None:
        self.shared = shared
        self.input_allocated = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        # For each call FSDP allocates the input and then the output. The input lies in shared memory from the start, so that
        # it need not be copied there.
        if self.shared is None or self.input_allocated:
            return torch.empty(*size, dtype=dtype, device=device)
        self.input_allocated = True
        return self.shared.buffer(prod(size) * dtype.itemsize).view(dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """input_tensor [ranks * N]: this rank's chunk for each rank; output_tensor [N]: the sum over ranks of their chunks for
        this one. Raises `ValueError` for an `op` other than the sum."""
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"gradients are added, not combined by {op}")
        self.input_allocated = False
        if self.shared is not None:
            self.shared.reduce_scatter(output_tensor, input_tensor)
            return
        chunks = torch.empty_like(input_tensor)
        dist.all_to_all_single(chunks, input_tensor, group=group)
        torch.sum(chunks.view(group.size(), -1), dim=0, out=output_tensor)
