"""Keeping experts evenly used: reads the loads of a whole optimizer step, moves the routers' biases.

Letters in names: B sequence, T position, E expert, K choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.model.experts import MixtureOfExperts, Routes
from cadre.model.transformer import Transformer


def sequence_balance_loss(routes: Routes, sequences: int) -> Tensor:
    """Sequence-wise balance loss without its factor (V3 report, equations 17-20), averaged over sequences; 1 when every
    sequence spreads evenly over the experts. Gradients reach the router through the normalised affinities. Loads are of
    the choices made, correction bias and groups included; equation 18 counts the top-k of the bare affinities."""
    experts = routes.score_TE.shape[1]
    score_TE = routes.score_TE / routes.score_TE.sum(dim=-1, keepdim=True)
    share_BE = score_TE.unflatten(0, (sequences, -1)).mean(dim=1)
    chosen_BR = routes.expert_TK.view(sequences, -1)
    count_BE = torch.zeros_like(share_BE).scatter_add_(1, chosen_BR, torch.ones_like(chosen_BR, dtype=share_BE.dtype))
    load_BE = count_BE * (experts / chosen_BR.shape[1])
    return (load_BE * share_BE).sum(dim=-1).mean()


def max_violation(load_E: Tensor) -> float:
    """MaxVio: how far the busiest expert is above the mean, as a share of the mean (arXiv 2408.15664, section 4.1)."""
    load_E = load_E.float()
    return float(load_E.max() / load_E.mean().clamp(min=1e-9) - 1)


class Balance:
    """Counts loads over all micro-batches of a step, then moves each router's bias once: up by `speed` for experts below
    the mean load, down for those above (arXiv 2408.15664, algorithm 1)."""

    def __init__(self, model: Transformer, speed: float) -> None:
        self.speed = speed
        self.layers: list[tuple[int, MixtureOfExperts]] = model.sparse_layers()
        self.load_LE = [torch.zeros(layer.gate.weight.shape[0], dtype=torch.int64) for _, layer in self.layers]

    @torch.no_grad()
    def read(self) -> list[Routes]:
        """Take the routes of the last forward pass in training mode out of every sparse layer that took part, and count
        them."""
        taken = []
        for (_, layer), load_E in zip(self.layers, self.load_LE, strict=True):
            routes, layer.routes = layer.routes, None
            if routes is None:  # a multi-token prediction block that this micro-batch did not train
                continue
            load_E += torch.bincount(routes.expert_TK.flatten(), minlength=len(load_E)).to(load_E.device)
            taken.append(routes)
        return taken

    @torch.no_grad()
    def update(self) -> None:
        """Move the biases by the loads counted since the last `reset`."""
        if not self.speed:
            return
        for (_, layer), load_E in zip(self.layers, self.load_LE, strict=True):
            bias = layer.gate.e_score_correction_bias
            if bias is not None:
                load = load_E.to(bias.device, torch.float32)
                bias += self.speed * torch.sign(load.mean() - load)

    def reset(self) -> None:
        for load_E in self.load_LE:
            load_E.zero_()

    def metrics(self) -> dict[str, object]:
        """Load shares and MaxVio per sparse layer, as `metrics.jsonl` keeps them."""
        if not self.layers:
            return {}
        shares = [F.normalize(load_E.float(), p=1, dim=0) for load_E in self.load_LE]
        return {
            "load_layers": [index for index, _ in self.layers],
            "load": [share.tolist() for share in shares],
            "max_vio": [round(max_violation(load_E), 4) for load_E in self.load_LE],
        }
