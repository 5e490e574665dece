"""AdamW with moments of float32 or of bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cadre.kernels.adamw import AdamWStep, adamw_in_place
from cadre.train.parameter_groups import ParameterGroups


class AdamW(ParameterGroups):
    """Steps and state as those of `torch.optim.AdamW`: each parameter's `step`, `exp_avg` and `exp_avg_sq`."""

    moments = torch.float32

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            # torch's fused kernel, which takes all of them in one pass, is not to be had for every device.
            fused = {parameter.device.type for parameter in stepped} <= {"cpu", "cuda"}
            states = [self._state_of(parameter, on_device=fused) for parameter in stepped]
            adamw(
                stepped,
                [parameter.grad for parameter in stepped],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=fused,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: Tensor, *, on_device: bool) -> dict[str, Tensor]:
        """`on_device`: whether the count of steps lies where the parameter does."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
        return state


class NarrowAdamW(AdamW):
    """The same but for the moments' dtype, and by kernels of our own."""

    moments = torch.bfloat16

    @torch.no_grad()
    def step(self) -> None:
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
        state = self._state_of(parameter, on_device=False)
        state["step"] += 1
        done, lr, (beta1, beta2) = float(state["step"]), group["lr"], group["betas"]
        return AdamWStep(
            parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], beta1, beta2, group["eps"],
            keep=1 - lr * group["weight_decay"], rate=-lr / (1 - beta1**done), unbias=(1 - beta2**done) ** -0.5,
        )  # fmt: skip
