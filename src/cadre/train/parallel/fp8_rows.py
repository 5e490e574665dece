"""Rows quantized to 8 bits, as they are sent to experts: E4M3 elements, with one scale for each run of 128 elements of a row
(DeepSeek-V3 report, arXiv 2412.19437, sections 3.3.2 and 3.3.3). A scale is a power of two, stored as its exponent in one byte,
so a row of D elements takes D + ceil(D / 128) bytes.

Letters in names: R row, D element, G run of elements with one scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.kernels.fp8 import ELEMENT, RUN, exponent_of, power_of_two

# Of a float32's exponent, which is how a scale is stored.
_BIAS = 127


def quantize(rows_RD: Tensor) -> Tensor:
    """uint8 [R, D + ceil(D / 128)] of floating-point rows: the elements, then the scales. What `dequantize` makes of it differs
    by at most 1/16 of an element, or 2^-17 of the largest element of its run if that is more. A run that holds an infinity or
    NaN comes back without a finite element."""
    height, width = rows_RD.shape
    runs_RG = F.pad(rows_RD.float(), (0, -width % RUN)).view(height, _runs(width), RUN)
    byte_RG = (exponent_of(runs_RG.abs().amax(dim=2)) + _BIAS).to(torch.uint8)
    narrow_RD = (runs_RG / _scale(byte_RG)[..., None]).to(ELEMENT).view(torch.uint8)
    return torch.cat((narrow_RD.flatten(1)[:, :width], byte_RG), dim=1)


def dequantize(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[R, width] in `dtype`, from what `quantize` gave for rows of so many elements."""
    narrow_RD, byte_RG = packed[:, :width].contiguous().view(ELEMENT), packed[:, width:]
    scale_RD = _scale(byte_RG).repeat_interleave(RUN, dim=1)[:, :width]
    return (narrow_RD.float() * scale_RD).to(dtype)


def _runs(width: int) -> int:
    return -(-width // RUN)


def _scale(byte_RG: Tensor) -> Tensor:
    """2^(byte - 127), exactly."""
    return power_of_two(byte_RG.int() - _BIAS)
