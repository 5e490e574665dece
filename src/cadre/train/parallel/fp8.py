"""Rows in 8 bits: E4M3 elements, each run of 128 of a row under a scale that is a power of two (DeepSeek-V3 report, arXiv
2412.19437, sections 3.3.2 and 3.3.3). A scale is its exponent, so a row of D elements is D + ceil(D / 128) bytes.

Letters in names: R row, D element, G run of elements under one scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RUN = 128
_ELEMENT = torch.float8_e4m3fn
# The largest E4M3 number is 448 = 0.875 x 2^9.
_MANTISSA, _EXPONENT = 0.875, 9
# Of a float32's exponent; all ones mean infinity.
_BIAS, _INFINITE = 127, 255


def packed_width(width: int) -> int:
    """Bytes of a row of so many elements."""
    return width + _runs(width)


def pack(rows_RD: Tensor) -> Tensor:
    """uint8 [R, packed_width(D)] of floating-point rows. What comes back differs by at most 1/16 of an element, or 2^-17 of
    the largest in its run if that is more; of a run that holds an infinity or NaN nothing finite comes back."""
    height, width = rows_RD.shape
    runs_RG = F.pad(rows_RD.float(), (0, -width % _RUN)).view(height, _runs(width), _RUN)
    most_RG = runs_RG.abs().amax(dim=2)
    mantissa_RG, exponent_RG = torch.frexp(most_RG)
    exponent_RG = exponent_RG - _EXPONENT + (mantissa_RG > _MANTISSA).int()
    byte_RG = (exponent_RG + _BIAS).clamp(min=1).where(most_RG.isfinite(), _INFINITE).to(torch.uint8)
    narrow_RD = (runs_RG / _scale(byte_RG)[..., None]).to(_ELEMENT).view(torch.uint8)
    return torch.cat((narrow_RD.flatten(1)[:, :width], byte_RG), dim=1)


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows again: [R, width]."""
    narrow_RD, byte_RG = packed[:, :width].contiguous().view(_ELEMENT), packed[:, width:]
    scale_RD = _scale(byte_RG).repeat_interleave(_RUN, dim=1)[:, :width]
    return (narrow_RD.float() * scale_RD).to(dtype)


def _runs(width: int) -> int:
    return -(-width // _RUN)


def _scale(byte_RG: Tensor) -> Tensor:
    """2^(byte - 127), exactly: the byte as a float32's exponent."""
    return (byte_RG.int() << 23).view(torch.float32)
