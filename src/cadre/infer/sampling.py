"""Choosing the next token from the model's logits.

Letters in names: B batch, W vocabulary (words), of which top-k may leave fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cadre.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises `UsageError` for a value out of range.

    temperature: what the logits are divided by; 0 always takes the likeliest token. top_k: only the k likeliest tokens
    may be drawn; 0 for all. top_p: only the likeliest tokens that together reach this probability may be drawn, the
    one that crosses it included (nucleus sampling, arXiv 1904.09751, section 3.1), after temperature and top-k.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; it must be a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be 0 (no limit) or more")


def sample(logits_BW: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token id for each row: int64 [B] from logits [B, W] of any float type; the arithmetic is float32.

    `generator` must be on the logits' device; greedy choice (temperature 0, or too near it for float32) draws nothing.
    """
    if sampling.temperature < torch.finfo(torch.float32).tiny:
        return logits_BW.argmax(dim=-1)
    logits_BW = logits_BW.float()
    id_BW = None
    words = logits_BW.shape[-1]
    if 0 < sampling.top_k < words:
        logits_BW, id_BW = logits_BW.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        logits_BW, id_BW = logits_BW.sort(dim=-1, descending=True)
    # Shifting first keeps a tiny temperature from overflowing to infinity minus infinity.
    logits_BW = (logits_BW - logits_BW.amax(dim=-1, keepdim=True)) / sampling.temperature
    p_BW = logits_BW.softmax(dim=-1)
    if sampling.top_p < 1:
        before_BW = p_BW.cumsum(dim=-1) - p_BW
        p_BW = p_BW.masked_fill(before_BW >= sampling.top_p, 0.0)
    choice_B1 = torch.multinomial(p_BW, 1, generator=generator)
    return (choice_B1 if id_BW is None else id_BW.gather(-1, choice_B1))[:, 0]
