"""Muon: momentum whose update is orthogonalised, for matrices (K. Jordan 2024; scaled to AdamW's update size as in
"Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). Expert weights are batches of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cadre.kernels.orthogonalize import MuonStep, muon_in_place, orthogonalize
from cadre.train.parameter_groups import ParameterGroups

_UPDATE_RMS = 0.2
# Newton-Schulz iterations, unless a group says otherwise.
_ITERATIONS = 5
# Elements that are orthogonalised in one batch, unless one parameter has more: enough to keep a device busy, and of memory
# beside the weights no more than a few times that (`cadre.plan.memory.update_bytes`).
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Alike:
    """Steps of parameters whose matrices all are of one `shape` [M, N], and of each the update [B, M, N]."""

    shape: tuple[int, int]
    iterations: int
    steps: list[MuonStep]
    updates: list[Tensor]


class Muon(ParameterGroups):
    """Takes parameters of 2 dimensions [M, N] or 3 [E, M, N]; a 3-D one is E separate matrices. Where no kernel steps all of
    them at once, parameters of equal matrix shape are orthogonalised in batches. A group may say `iterations` (of
    Newton-Schulz), and of 3-D parameters `fused`: how many matrices lie one above the other in each [M, N], as gate and up do
    in `gate_up_proj`. `narrow`: Newton-Schulz's products are of bfloat16 where the device has those (`orthogonalize`)."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.1,
        narrow: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=_ITERATIONS, fused=1)
        self.narrow = narrow

    @torch.no_grad()
    def step(self) -> None:
        steps = [
            self._step_of(group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        whole = [step for step in steps if self.is_whole(step.weight)]
        if muon_in_place(whole, self.narrow):
            steps = [step for step in steps if not self.is_whole(step.weight)]
        for alike, updates in self.orthogonalized(map(_alike, _runs(steps))):
            for step, update in zip(alike.steps, updates, strict=True):
                step.apply(update)

    def rows(self, parameter: Tensor) -> int:
        """Rows of each matrix that a parameter is, holds, or has a part of."""
        return parameter.shape[-2]

    def is_whole(self, parameter: Tensor) -> bool:
        """Whether this process holds all of a parameter's matrices."""
        return True

    def orthogonalized(self, every: Iterator[Alike]) -> Iterator[tuple[Alike, list[Tensor]]]:
        """The updates, orthogonalised, of all that `every` gives."""
        for alike in every:
            yield alike, self.together(alike.updates, alike.iterations)

    def together(self, updates: list[Tensor], iterations: int) -> list[Tensor]:
        """Batches of matrices of one shape [B, M, N], orthogonalised as one batch."""
        if len(updates) == 1:
            return [orthogonalize(updates[0], iterations, self.narrow)]
        whole = orthogonalize(torch.cat(updates), iterations, self.narrow)
        return list(whole.split([len(update) for update in updates]))

    def _step_of(self, group: dict[str, Any], parameter: Tensor) -> MuonStep:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        lr, rows, columns = group["lr"], self.rows(parameter) // group["fused"], parameter.shape[-1]
        rate = -lr * _UPDATE_RMS * max(rows, columns) ** 0.5
        keep = 1 - lr * group["weight_decay"]
        return MuonStep(parameter, parameter.grad, state["momentum"], rows, group["iterations"], group["momentum"], keep, rate)


def _alike(steps: list[MuonStep]) -> Alike:
    return Alike((steps[0].rows, steps[0].weight.shape[-1]), steps[0].iterations, steps, [step.nesterov() for step in steps])


def _runs(steps: Iterable[MuonStep]) -> Iterator[list[MuonStep]]:
    """Those whose matrices are of one shape together, as many at a time as hold `_AT_ONCE` elements, or one."""
    alike: dict[tuple[int, ...], list[MuonStep]] = {}
    for step in steps:
        alike.setdefault((step.weight.ndim, step.rows, step.weight.shape[-1], step.iterations), []).append(step)
    for all_alike in alike.values():
        run: list[MuonStep] = []
        for step in all_alike:
            if run and sum(s.weight.numel() for s in run) + step.weight.numel() > _AT_ONCE:
                yield run
                run = []
            run.append(step)
        yield run
