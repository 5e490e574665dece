"""The optimizer of a run: which parameters step how, and its state as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cadre.kernels.limits import dtype_name
from cadre.kernels.total_norm import total_norm
from cadre.model.experts import Router
from cadre.model.transformer import Transformer
from cadre.train.adamw import AdamW, NarrowAdamW
from cadre.train.muon import Muon
from cadre.train.parallel.group import Parallel
from cadre.train.parameter_groups import ParameterGroups
from cadre.train.recipe import OptimizerSection


class Optimizer:
    """AdamW for everything, with moments of float32 or of bfloat16, or Muon for the matrices inside blocks and AdamW for the
    rest. Norms and biases do not decay.

    Each parameter group keeps its own peak rate; `step(factor)` multiplies all of them by the schedule's factor.
    `narrow`: Muon may multiply in bfloat16.
    """

    def __init__(
        self, model: Transformer, section: OptimizerSection, parallel: Parallel | None = None, *, narrow: bool = False
    ) -> None:
        self.parallel = parallel or Parallel()
        held = self.parallel.held(model)
        self.names: dict[Tensor, str] = {tensor: name for name, tensor in held.items()}
        named = (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Router))
        routers = {held[name] for name in named if name in held}
        ends = {held[name] for name in ("embed_tokens.weight", "lm_head.weight") if name in held}
        matrices, plain, vectors = [], [], []
        for parameter in self.names:
            if parameter.ndim < 2:
                vectors.append(parameter)
            elif section.name == "muon" and parameter not in routers and parameter not in ends:
                matrices.append(parameter)
            elif parameter not in routers:
                plain.append(parameter)
        adamw_lr = section.adamw_lr or section.lr
        decay = section.weight_decay
        groups = [
            {"params": plain, "lr": adamw_lr, "weight_decay": decay},
            {"params": sorted(routers, key=self.names.__getitem__), "lr": adamw_lr * section.router_lr_scale,
             "weight_decay": decay},
            {"params": vectors, "lr": adamw_lr, "weight_decay": 0.0},
        ]  # fmt: skip
        betas = (section.beta1, section.beta2)
        groups = [g for g in groups if g["params"]]
        adamw = (NarrowAdamW if section.name == "adamw-bf16" else AdamW)(groups, betas, section.eps)
        self.moments = adamw.moments
        self.parts: list[ParameterGroups] = [adamw]
        if matrices:
            options = {"lr": section.lr, "momentum": section.momentum, "weight_decay": decay, "narrow": narrow}
            self.parts.append(self.parallel.muon(_muon_groups(matrices, self.names), **options))
        self.owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        self.peak = [group["lr"] for part in self.parts for group in part.param_groups]
        self.lr = section.lr if matrices else adamw_lr

    def clip(self, most: float) -> float:
        """Take over the gradients and scale them down to a global norm of `most`. Returns the norm they had."""
        self.parallel.hand_over_gradients()
        norm = total_norm([p.grad for p in self.names if p.grad is not None])
        norm = self.parallel.norm(norm)
        if (size := float(norm)) > most:  # else all would be multiplied by 1; a norm that is no number is for the caller to see
            torch.nn.utils.clip_grads_with_norm_(self.names, most, norm)
        return size

    def step(self, factor: float) -> None:
        groups = (group for part in self.parts for group in part.param_groups)
        for group, peak in zip(groups, self.peak, strict=True):
            group["lr"] = peak * factor
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()
        self.parallel.drop_gradients()

    def tensors(self) -> dict[str, Tensor]:
        """All state by parameter name: `<name>.exp_avg`, `.exp_avg_sq`, `.step`, or `.momentum`."""
        return {
            f"{self.names[parameter]}.{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def empty(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors to read a state of such names into. Raises `KeyError` for a name that no parameter's state here has."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        made = {}
        for full_name in names:
            name, _, key = full_name.rpartition(".")
            dtype = self._kept(parameters[name])[key]
            made[full_name] = torch.zeros(()) if key == "step" else torch.zeros_like(parameters[name], dtype=dtype)
        return made

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave, bit for bit. Raises `KeyError` for what is no state of this optimizer's."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            parameter = parameters[name]
            if self._kept(parameter)[key] != value.dtype:
                raise KeyError(f"{full_name} in {dtype_name(value.dtype)}")
            # torch's fused AdamW wants its count of steps on an accelerator as well.
            fused = parameter.device.type == "cuda" and self.moments == torch.float32
            device = parameter.device if value.ndim or fused else value.device
            self.owner[parameter].state[parameter][key] = value.to(device)

    def _kept(self, parameter: Tensor) -> dict[str, torch.dtype]:
        """What the state of a parameter is made of."""
        if isinstance(self.owner[parameter], Muon):
            return {"momentum": torch.float32}
        return {"step": torch.float32, "exp_avg": self.moments, "exp_avg_sq": self.moments}


# Newton-Schulz iterations of experts: as good as 5 (docs/log.md), and with many experts most of what an update takes.
_ITERATIONS_OF_EXPERTS = 3


def _muon_groups(matrices: list[Tensor], names: dict[Tensor, str]) -> list[dict[str, Any]]:
    """Matrices by themselves, and experts, whose fused gate and up are two matrices as a dense layer's are."""
    experts = [p for p in matrices if p.ndim == 3]
    fused = {p for p in experts if names[p].endswith("gate_up_proj")}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if p.ndim == 2]},
        {"params": [p for p in experts if p in fused], "iterations": _ITERATIONS_OF_EXPERTS, "fused": 2},
        {"params": [p for p in experts if p not in fused], "iterations": _ITERATIONS_OF_EXPERTS},
    ]
    return [group for group in groups if group["params"]]
