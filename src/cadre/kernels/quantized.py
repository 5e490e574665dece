"""Weight matrices in 8 or 4 bits.

int8: one float32 scale a row, whole numbers -127..127. int4: groups of 32 columns share one bfloat16 scale; four bits name
one of 16 levels, spaced like the quantiles of a normal distribution, as trained weights are (NF4, arXiv 2305.14314,
section 3). 8.0 and 4.5 bits a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
HALF = GROUP // 2
# Elements rounded at once.
_AT_ONCE = 2**20


@dataclass
class QuantizedMatrix:
    """A [rows, cols] matrix. int8: data int8 [rows, cols], scale float32 [rows]. int4: data uint8 [rows, groups * 16],
    byte i of a group holding column i low and column i + 16 high; scale bfloat16 [rows, groups]; cols padded to groups."""

    bits: int
    rows: int
    cols: int
    data: Tensor
    scale: Tensor


@cache
def levels() -> Tensor:
    """The 16 levels of four bits, float32, from -1 to 1 with an exact zero: quantiles of the normal distribution, eight
    from its lower half and nine from its upper half, which share the zero (QLoRA, section 3). One tensor for all who ask,
    not to be written."""
    edge = 0.9677083  # the outermost quantile: halfway between 1 - 1/30 and 1 - 1/32
    # Kept: it must not belong to whatever mode or device its first user works in.
    with torch.inference_mode(False), torch.device("cpu"):
        upper = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64))[:-1]
        lower = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64))[:-1]
        return (torch.cat((lower, torch.zeros(1, dtype=torch.float64), upper.flip(0))) / upper[0]).float()


def quantize(weight: Tensor, bits: int) -> QuantizedMatrix:
    """Round a float matrix [rows, cols] to 8 or 4 bits."""
    rows, cols = weight.shape
    # Some rows at a time: on the way a weight takes 17 bytes, and the experts of a layer are many.
    parts = [_rounded(part, bits) for part in weight.split(max(1, _AT_ONCE // cols))]
    data, scale = (torch.cat(each) for each in zip(*parts, strict=True))
    return QuantizedMatrix(bits, rows, cols, data, scale)


def _rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`QuantizedMatrix.data` and `.scale`."""
    if bits == 8:
        wide = weight.float()
        scale = wide.abs().amax(dim=1) / 127
        return (wide / scale.clamp(min=1e-30)[:, None]).round_().to(torch.int8), scale
    wide = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = wide.abs().amax(dim=2).to(torch.bfloat16)
    level = levels().to(weight.device)
    middle = (level[1:] + level[:-1]) / 2
    code = torch.bucketize(wide / scale.float().clamp(min=1e-30)[:, :, None], middle).to(torch.uint8)
    return (code[:, :, :HALF] | code[:, :, HALF:] << 4).flatten(1), scale


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """The matrix that the bits stand for, [rows, cols]."""
    if matrix.bits == 8:
        return (matrix.data.float() * matrix.scale[:, None]).to(dtype)
    packed = matrix.data.unflatten(1, (-1, HALF))
    code = torch.cat((packed & 15, packed >> 4), dim=2)
    wide = levels().to(packed.device)[code.int()] * matrix.scale.float()[:, :, None]
    return wide.flatten(1)[:, : matrix.cols].to(dtype)
