"""Muon: momentum whose update is orthogonalised, for matrices (K. Jordan 2024; scaled to AdamW's update size as in
"Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). Expert weights are batches of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_UPDATE_RMS = 0.2


def orthogonalize(g_BMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix to each of a batch, roughly: Newton-Schulz quintic iterations that push singular
    values to within about 0.7 to 1.2. Float32 [B, M, N] in and out."""
    a, b, c = _COEFFICIENTS
    x = g_BMN.mT if g_BMN.shape[1] > g_BMN.shape[2] else g_BMN
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if g_BMN.shape[1] > g_BMN.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Takes parameters of 2 dimensions [M, N] or 3 [E, M, N]; a 3-D one is E separate matrices. Parameters of equal
    matrix shape are orthogonalised in one batch."""

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
            for parameters in by_shape.values():
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[Tensor], group: dict) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])
            updates.append(nesterov.view(-1, *parameter.shape[-2:]))
        update = orthogonalize(torch.cat(updates) if len(updates) > 1 else updates[0])
        scale = _UPDATE_RMS * max(update.shape[1:]) ** 0.5
        for parameter, part in zip(parameters, update.split([len(u) for u in updates]), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(part.reshape(parameter.shape), alpha=-group["lr"] * scale)
