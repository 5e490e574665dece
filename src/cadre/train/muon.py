"""Muon: momentum whose update is orthogonalised, for matrices (K. Jordan 2024; scaled to AdamW's update size as in
"Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). Expert weights are batches of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cadre.kernels.orthogonalize import orthogonalize

_UPDATE_RMS = 0.2
# Newton-Schulz iterations, unless a group says otherwise.
_ITERATIONS = 5
# Elements that are orthogonalised in one batch, unless one parameter has more: enough to keep a device busy, and of memory
# beside the weights no more than a few times that (`cadre.plan.memory.update_bytes`).
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Alike:
    """Parameters of a group whose matrices all are of one `shape` [M, N], and of each the update [B, M, N]."""

    group: dict[str, Any]
    shape: tuple[int, int]
    parameters: list[Tensor]
    updates: list[Tensor]


class Muon(torch.optim.Optimizer):
    """Takes parameters of 2 dimensions [M, N] or 3 [E, M, N]; a 3-D one is E separate matrices. Parameters of equal
    matrix shape are orthogonalised in batches. A group may say `iterations` (of Newton-Schulz), and of 3-D parameters
    `fused`: how many matrices lie one above the other in each [M, N], as gate and up do in `gate_up_proj`."""

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=_ITERATIONS, fused=1))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for alike, updates in self.orthogonalized(self._updates()):
            group, scale = alike.group, _UPDATE_RMS * max(alike.shape) ** 0.5
            for parameter, update in zip(alike.parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def matrix_shape(self, parameter: Tensor) -> tuple[int, int]:
        """Rows and columns of each matrix that a parameter is or holds."""
        return parameter.shape[-2], parameter.shape[-1]

    def orthogonalized(self, every: Iterator[Alike]) -> Iterator[tuple[Alike, list[Tensor]]]:
        """The updates, orthogonalised, of all that `every` gives."""
        for alike in every:
            yield alike, together(alike.updates, alike.group["iterations"])

    def _updates(self) -> Iterator[Alike]:
        """Step the momentum (Nesterov's)."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = self.matrix_shape(parameter)
                    by_shape.setdefault((parameter.ndim, rows // group["fused"], columns), []).append(parameter)
            for (_, *shape), all_alike in by_shape.items():
                for parameters in _runs(all_alike):
                    yield self._alike(group, (shape[0], shape[1]), parameters)

    def _alike(self, group: dict[str, Any], shape: tuple[int, int], parameters: list[Tensor]) -> Alike:
        updates = [self._update(parameter, group["momentum"]) for parameter in parameters]
        if parameters[0].ndim == 3:
            updates = [update.reshape(len(update) * group["fused"], *shape) for update in updates]
        else:
            updates = [update[None] for update in updates]
        return Alike(group, shape, parameters, updates)

    def _update(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def _runs(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in order, as many at a time as hold `_AT_ONCE` elements, or one."""
    run: list[Tensor] = []
    for parameter in parameters:
        if run and sum(p.numel() for p in run) + parameter.numel() > _AT_ONCE:
            yield run
            run = []
        run.append(parameter)
    if run:
        yield run


def together(updates: list[Tensor], iterations: int) -> list[Tensor]:
    """Batches of matrices of one shape [B, M, N], orthogonalised as one batch."""
    if len(updates) == 1:
        return [orthogonalize(updates[0], iterations)]
    return list(orthogonalize(torch.cat(updates), iterations).split([len(update) for update in updates]))
