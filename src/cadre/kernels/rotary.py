"""Turning pairs of dimensions by position: the two ways in which weights pair them.

Letters in names: B batch, T position, H head, R rotary dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x_BTHR: Tensor, turn_TR: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1), as DeepSeek's weights expect. The order within the result is the same for queries and
    keys, so scores equal transformers', which writes V3's pairs out de-interleaved. turn_TR: complex64 [T, R/2]."""
    # view_as_complex refuses the odd strides and the odd offset of a slice beside an odd latent width.
    wide_BTHR = x_BTHR.float().contiguous()
    if wide_BTHR.storage_offset() % 2:
        wide_BTHR = wide_BTHR.clone()
    pairs = torch.view_as_complex(wide_BTHR.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn_TR[:, None]).flatten(-2).to(x_BTHR.dtype)


def rotate_halves(x_BTHR: Tensor, turn_TR: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2), as llama's and glm4_moe's weights expect."""
    first, second = x_BTHR.float().chunk(2, dim=-1)
    cos, sin = turn_TR.real[:, None], turn_TR.imag[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHR.dtype)
