"""Rotary position embedding: frequencies, their long-context scalings, and the table of rotations.

Letters in names: T position, R rotary dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cadre.model.config import ModelConfig
from cadre.model.rope_parameters import RopeParameters


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature m(mscale) = 1 + 0.1 mscale ln(factor) (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """The factor on query-key products: head_dim^-0.5, times YaRN's m(mscale_all_dim)^2 with latent attention."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_parameters
    if config.attention == "latent" and rope.rope_type != "default" and rope.mscale_all_dim:
        # deepseek_v3 in transformers applies it; deepseek_v2 does through the same helper.
        scale *= yarn_magnitude(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each rotary pair, float32 [R/2], and the magnitude that cosines and sines are scaled by."""
    rope, dim = config.rope_parameters, config.rotary_dim
    freq = rope.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "linear":
        return freq / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(freq, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(freq, rope, dim)
    return freq, 1.0


def _yarn(freq: Tensor, rope: RopeParameters, dim: int) -> tuple[Tensor, float]:
    """NTK-by-parts interpolation: slow pairs are stretched by `factor`, fast ones kept, a ramp between."""
    context = rope.original_max_position_embeddings or 1

    def pair_turning(times: float) -> float:
        """The pair (fractional index) that makes `times` full turns within the original context."""
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # A tiny context can put `high` below `low`; transformers then lets the ramp fall, so this does too.
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    magnitude = rope.attention_factor
    if magnitude is None:
        if rope.mscale and rope.mscale_all_dim:
            magnitude = yarn_magnitude(rope.factor, rope.mscale) / yarn_magnitude(rope.factor, rope.mscale_all_dim)
        else:
            magnitude = yarn_magnitude(rope.factor)
    return freq / rope.factor * ramp + freq * (1 - ramp), magnitude


def _llama3(freq: Tensor, rope: RopeParameters) -> Tensor:
    context = rope.original_max_position_embeddings or 1
    turns = context * freq / (2 * math.pi)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return freq / rope.factor * (1 - blend) + freq * blend


class RotaryTable:
    """Cosines and sines by position as one complex table, grown on demand; kept for the device that asked last."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._turn_TR: Tensor | None = None

    def __call__(self, stop: int, device: torch.device) -> Tensor:
        """Unit rotations times the magnitude for positions below `stop`: complex64 [stop, R/2]."""
        table = self._turn_TR
        if table is None or table.device != device or len(table) < stop:
            length = max(stop, 2 * len(table) if table is not None else 128)
            # A table that generation makes must serve training too, and autograd refuses inference tensors.
            with torch.inference_mode(False):
                freq, magnitude = frequencies(self.config)
                angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
                table = torch.polar(torch.full_like(angle, magnitude), angle).to(device)
            self._turn_TR = table
        return table[:stop]

    def at(self, position_T: Tensor, stop: int) -> Tensor:
        """The same for any of them, in any order: complex64 [T, R/2]."""
        return self(stop, position_T.device)[position_T]
