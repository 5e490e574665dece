"""AdamW with moments of bfloat16, as an optimizer of torch's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cadre.kernels.adamw import AdamWStep, adamw_in_place


class NarrowAdamW(torch.optim.Optimizer):
    """torch's AdamW but for the moments' dtype, with state of the same names."""

    def __init__(self, params: Iterable, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, dict(betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        adamw_in_place(
            [
                self._step_of(group, parameter)
                for group in self.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
        )

    def _step_of(self, group: dict[str, Any], parameter: Tensor) -> AdamWStep:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        done, lr, (beta1, beta2) = float(state["step"]), group["lr"], group["betas"]
        return AdamWStep(
            parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], beta1, beta2, group["eps"],
            keep=1 - lr * group["weight_decay"], rate=-lr / (1 - beta1**done), unbias=(1 - beta2**done) ** -0.5,
        )  # fmt: skip
