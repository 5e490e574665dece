"""The optimizer of a run: which parameters step how, and its state as named tensors for checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from cadre.model.experts import Router
from cadre.model.transformer import Transformer
from cadre.train.muon import Muon
from cadre.train.recipe import OptimizerSection


class Optimizer:
    """AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest. Norms and biases do not decay.

    Each parameter group keeps its own peak rate; `step(factor)` multiplies all of them by the schedule's factor.
    """

    def __init__(self, model: Transformer, section: OptimizerSection) -> None:
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        routers = {module.weight for module in model.modules() if isinstance(module, Router)}
        ends = {model.embed_tokens.weight, model.lm_head.weight}
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
        fused = {p.device.type for p in self.names} <= {"cpu", "cuda"}
        betas = (section.beta1, section.beta2)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=section.eps, fused=fused)
        ]
        if matrices:
            self.parts.append(Muon(matrices, lr=section.lr, momentum=section.momentum, weight_decay=decay))
        self.peak = [group["lr"] for part in self.parts for group in part.param_groups]
        self.lr = section.lr

    def step(self, factor: float) -> None:
        groups = (group for part in self.parts for group in part.param_groups)
        for group, peak in zip(groups, self.peak, strict=True):
            group["lr"] = peak * factor
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All state by parameter name: `<name>.exp_avg`, `.exp_avg_sq`, `.step`, or `.momentum`."""
        return {
            f"{self.names[parameter]}.{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave, bit for bit."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            parameter = parameters[name]
            device = parameter.device if value.ndim or parameter.device.type == "cuda" else value.device
            owner[parameter].state[parameter][key] = value.to(device)
