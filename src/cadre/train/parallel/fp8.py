"""Rows in 8 bits: E4M3 elements, each run of 128 of a row under a scale that is a power of two (DeepSeek-V3 report, arXiv
2412.19437, sections 3.3.2 and 3.3.3). A scale is its exponent, so a row of D elements is D + ceil(D / 128) bytes.

Letters in names: R row, D element, G run of elements under one scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.kernels.fp8 import ELEMENT, RUN, exponent_of, power_of_two

# Of a float32's exponent.
_BIAS = 127


def packed_width(width: int) -> int:
    """Bytes of a row of so many elements."""
    return width + _runs(width)


def pack(rows_RD: Tensor) -> Tensor:
    """uint8 [R, packed_width(D)] of floating-point rows. What comes back differs by at most 1/16 of an element, or 2^-17 of
    the largest in its run if that is more; of a run that holds an infinity or NaN nothing finite comes back."""
    height, width = rows_RD.shape
    runs_RG = F.pad(rows_RD.float(), (0, -width % RUN)).view(height, _runs(width), RUN)
    byte_RG = (exponent_of(runs_RG.abs().amax(dim=2)) + _BIAS).to(torch.uint8)
    narrow_RD = (runs_RG / _scale(byte_RG)[..., None]).to(ELEMENT).view(torch.uint8)
    return torch.cat((narrow_RD.flatten(1)[:, :width], byte_RG), dim=1)


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows again: [R, width]."""
    narrow_RD, byte_RG = packed[:, :width].contiguous().view(ELEMENT), packed[:, width:]
    scale_RD = _scale(byte_RG).repeat_interleave(RUN, dim=1)[:, :width]
    return (narrow_RD.float() * scale_RD).to(dtype)


def _runs(width: int) -> int:
    return -(-width // RUN)


def _scale(byte_RG: Tensor) -> Tensor:
    """2^(byte - 127), exactly."""
    return power_of_two(byte_RG.int() - _BIAS)
