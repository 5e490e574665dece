"""FP8 checkpoints: E4M3 weights with one scale per 128 x 128 block (DeepSeek-V3 report, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cadre.errors import UsageError

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"


def check_quantization(config: dict[str, Any], where: str) -> None:
    """Refuse a config.json whose `quantization_config` is anything but FP8 in 128 x 128 blocks. Raises `UsageError`."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if method != "fp8" or block != [BLOCK, BLOCK]:
        raise UsageError(
            f"{where}: quantization_config with quant_method {method!r} and weight_block_size {block}; Cadre reads"
            f" unquantized weights and 'fp8' with [{BLOCK}, {BLOCK}]"
        )


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight of this shape: one per block, the last ones covering less."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize(weight_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight x scale of its block, in `dtype`; the product is taken in float32.

    weight_RC: float8_e4m3fn [R, C]. scale: [ceil(R/128), ceil(C/128)], the factor that quantization divided by.
    """
    result = torch.empty(weight_RC.shape, dtype=dtype)
    for index, scale_of_row in enumerate(scale.float()):
        rows = slice(index * BLOCK, (index + 1) * BLOCK)
        wide = scale_of_row.repeat_interleave(BLOCK)[: weight_RC.shape[1]]
        result[rows] = weight_RC[rows].float() * wide
    return result
