"""Muon: momentum whose update is orthogonalised, for matrices (K. Jordan 2024; scaled to AdamW's update size as in
"Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). Expert weights are batches of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cadre.kernels.orthogonalize import orthogonalize

_UPDATE_RMS = 0.2
# Newton-Schulz iterations, unless a group says otherwise.
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Takes parameters of 2 dimensions [M, N] or 3 [E, M, N]; a 3-D one is E separate matrices. Parameters of equal
    matrix shape are orthogonalised in one batch. A group may say `iterations` (of Newton-Schulz), and of 3-D parameters
    `fused`: how many matrices lie one above the other in each [M, N], as gate and up do in `gate_up_proj`."""

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=_ITERATIONS, fused=1))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = self.matrix_shape(parameter)
                    by_shape.setdefault((rows // group["fused"], columns), []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_alike(parameters, shape, group)

    def matrix_shape(self, parameter: Tensor) -> tuple[int, int]:
        """Rows and columns of each matrix that a parameter is or holds."""
        return parameter.shape[-2], parameter.shape[-1]

    def orthogonalized(self, parameters: list[Tensor], updates: list[Tensor], iterations: int) -> list[Tensor]:
        """The updates [B, M, N] of parameters of one matrix shape, orthogonalised together."""
        if len(updates) == 1:
            return [orthogonalize(updates[0], iterations)]
        return list(orthogonalize(torch.cat(updates), iterations).split([len(update) for update in updates]))

    def _step_alike(self, parameters: list[Tensor], shape: tuple[int, int], group: dict) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])
            updates.append(nesterov.reshape(len(nesterov) * group["fused"], *shape) if nesterov.ndim == 3 else nesterov[None])
        scale = _UPDATE_RMS * max(shape) ** 0.5
        for parameter, part in zip(parameters, self.orthogonalized(parameters, updates, group["iterations"]), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(part.reshape(parameter.shape), alpha=-group["lr"] * scale)
