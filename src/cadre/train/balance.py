"""Keeping experts evenly used: records the routes of every forward pass, counts loads, adds up the balance losses, moves the
routers' biases, and says how it stands.

Letters in names: L sparse layer, E expert, K choices, T token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cadre.kernels.permute import count_choices
from cadre.model.experts import MixtureOfExperts
from cadre.model.transformer import Transformer
from cadre.train.balance_losses import BalanceLoss, BatchLoss, GlobalLoss, RecordedRoutes, RouterZLoss, SequenceLoss
from cadre.train.loads import dead_experts, evenness, max_violation
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import BalanceSection


def bias_step(rule: str, load_LE: Tensor) -> Tensor:
    """Where a bias moves per unit of speed, float32 [L, E], from the loads of one optimizer step. `sign`: one up below the
    mean load, one down above it (arXiv 2408.15664, algorithm 1). `proportional`: by the distance to the mean load as a share
    of it (the variant of its section 4.3, freed of the batch's size)."""
    load_LE = load_LE.double()
    mean_L1 = load_LE.mean(dim=-1, keepdim=True)
    below_LE = mean_L1 - load_LE
    return (torch.sign(below_LE) if rule == "sign" else below_LE / mean_L1.clamp(min=1)).float()


class Balance:
    """The balancing of a model by a recipe's `[balance]`. One optimizer step:

        reset(), then for each micro-batch record(), forward pass, recorded() -> count() and weighted_losses(), backward pass;
        then update()

    Loads are of the choices made, bias and groups included, and of all micro-batches. What a backward pass recomputes is
    not recorded. The window is all that was counted since `close_window`; it is in `state()`, the rest lasts one step.
    """

    def __init__(self, model: Transformer, section: BalanceSection, parallel: Parallel | None = None) -> None:
        self.section = section
        self.layers: list[tuple[int, MixtureOfExperts]] = model.sparse_layers()
        experts = (model.config.n_routed_experts or 0) if self.layers else 0
        device = model.device
        self.load_LE = torch.zeros(len(self.layers), experts, dtype=torch.int64, device=device)
        self.window_LE = torch.zeros_like(self.load_LE)
        self.window_steps = 0
        self.logit_squares_L = torch.zeros(len(self.layers), device=device)
        self.choices = model.config.num_experts_per_tok or 1
        self.modules_from = model.config.num_hidden_layers
        self.losses = _losses(section, len(self.layers), parallel or Parallel()) if self.layers else []
        self.globals = [loss for loss in self.losses if isinstance(loss, GlobalLoss)]

    def reset(self) -> None:
        """Begin an optimizer step."""
        self.load_LE.zero_()
        self.logit_squares_L.zero_()
        for loss in self.globals:
            loss.reset()
        if not self.section.use_bias:  # zero, not passed over: transformers and vLLM will add whatever the model holds
            for _, layer in self.layers:
                if layer.gate.e_score_correction_bias is not None:
                    layer.gate.e_score_correction_bias.zero_()

    # ------------------------------------------------------------------------------------------------- one micro-batch

    def record(self) -> None:
        """Keep the routes of the forward pass that follows."""
        for _, layer in self.layers:
            layer.routes, layer.keeps_routes = None, True

    def recorded(self, length: int, module_part: float = 1.0) -> list[RecordedRoutes]:
        """The routes of the forward pass since `record`, of sequences of `length` tokens, for every sparse layer that took
        part; no later pass is kept. `module_part`: the `RecordedRoutes.part` of layers in multi-token prediction modules."""
        recorded = []
        for place, (index, layer) in enumerate(self.layers):
            routes, layer.routes, layer.keeps_routes = layer.routes, None, False
            if routes is not None and len(routes.score_TE):  # else a module that this micro-batch did not train
                part = module_part if index >= self.modules_from else 1.0
                recorded.append(RecordedRoutes(place, layer.gate, routes, len(routes.score_TE) // length, part))
        return recorded

    @torch.no_grad()
    def count(self, recorded: list[RecordedRoutes]) -> None:
        """Add a micro-batch to the step's loads."""
        for one in recorded:
            self.load_LE[one.layer] += count_choices(one.routes.expert_TK, self.load_LE.shape[1])
            self.logit_squares_L[one.layer] += one.routes.logit_TE.square().sum()

    def collect_loads(self, recorded: list[RecordedRoutes]) -> None:
        """Tell the global loss a micro-batch's frequencies, before the first of the step is trained."""
        for loss in self.globals:
            for one in recorded:
                loss.collect_loads(one)

    def collected_loads(self) -> list[Tensor]:
        """The global loss's frequencies, to be added up over processes before the first micro-batch is trained."""
        none = self.logit_squares_L.new_zeros(1, self.load_LE.shape[1])
        for loss in self.globals:
            loss.load_LE = [none.clone() if load is None else load for load in loss.load_LE]
        return [load for loss in self.globals for load in loss.load_LE if load is not None]

    def counters(self) -> list[Tensor]:
        """What counts an optimizer step, to be added up over processes before `update`."""
        return [self.load_LE, self.logit_squares_L]

    def weighted_losses(self, recorded: list[RecordedRoutes]) -> list[tuple[str, float, Tensor]]:
        """(key in the metrics, weight, sum over layers) of each balance loss in use, for one micro-batch."""
        none = torch.zeros((), device=self.load_LE.device)
        return [
            (loss.key, loss.weight, torch.stack([loss(one) * one.part for one in recorded]).sum() if recorded else none)
            for loss in self.losses
        ]

    # ------------------------------------------------------------------------------------------------- one optimizer step

    @torch.no_grad()
    def update(self, factor: float = 1.0) -> None:
        """End an optimizer step: move the biases by its loads, once, and take them into the window. `factor`: the share of the
        peak learning rate that this step is made with; biases that go on at full speed while the weights settle keep sending
        tokens to experts that have not learned them (V3 stops them for its last 500B tokens, section 4.2)."""
        if not self.layers:
            return
        self.window_LE += self.load_LE
        self.window_steps += 1
        section = self.section
        if section.bias_update == "none" or not section.bias_speed:
            return
        step_LE = section.bias_speed * factor * bias_step(section.bias_update, self.load_LE)
        for (_, layer), step_E in zip(self.layers, step_LE, strict=True):
            bias = layer.gate.e_score_correction_bias
            if bias is not None:
                bias += step_E

    # ------------------------------------------------------------------------------------------------- how it stands

    def metrics(self) -> dict[str, Any]:
        """How it stands, per sparse layer, as `metrics.jsonl` keeps it: load shares, MaxVio and logit scale of the last
        step, the rest of the window."""
        if not self.layers:
            return {}
        load_LE, window_LE = self.load_LE.cpu().numpy(), self.window_LE.cpu().numpy()
        routed_L1 = load_LE.sum(axis=1, keepdims=True).clip(min=1)
        logits_L = routed_L1[:, 0] * load_LE.shape[1] / self.choices
        scale_L = (self.logit_squares_L.cpu().double().numpy() / logits_L) ** 0.5
        biases = [layer.gate.e_score_correction_bias for _, layer in self.layers]
        return {
            "load_layers": [index for index, _ in self.layers],
            "load": (load_LE / routed_L1).tolist(),
            "max_vio": max_violation(load_LE).round(4).tolist(),
            "max_vio_window": max_violation(window_LE).round(4).tolist(),
            "load_entropy": evenness(window_LE).round(4).tolist(),
            "dead_experts": dead_experts(window_LE).tolist(),
            "bias_range": [None if bias is None else round(float(bias.max() - bias.min()), 6) for bias in biases],
            "logit_scale": scale_L.round(6).tolist(),
        }

    def close_window(self) -> None:
        self.window_LE.zero_()
        self.window_steps = 0

    def state(self) -> dict[str, Any]:
        """The window, as plain JSON (the biases are among the model's tensors)."""
        return {"window_steps": self.window_steps, "window": self.window_LE.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        self.window_steps = state["window_steps"]
        self.window_LE.copy_(torch.tensor(state["window"], dtype=torch.int64).view_as(self.window_LE))


def _losses(section: BalanceSection, layers: int, parallel: Parallel) -> list[BalanceLoss]:
    every: list[BalanceLoss] = [
        SequenceLoss(section.sequence_weight, parallel.add_shared),
        BatchLoss(section.batch_weight, parallel.add_shared),
        GlobalLoss(section.global_weight, layers),
        RouterZLoss(section.z_weight),
    ]
    return [loss for loss in every if loss.weight]
