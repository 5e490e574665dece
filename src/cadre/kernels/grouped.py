"""The experts' SwiGLU over tokens sorted by expert.

Letters in names: E expert, R routed row (one token at one of its experts; rows sorted by expert), D hidden, F expert
width, N output width of one matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.kernels.fp8 import grouped_linear_fp8
from cadre.kernels.native.library import kernels_take_rows
from cadre.kernels.routed import rows_swiglu
from cadre.kernels.swiglu import swiglu, swiglu_reference


def expert_swiglu_reference(x_RD: Tensor, load_E: Tensor, gate_up_END: Tensor, down_EDF: Tensor) -> Tensor:
    """Each expert's down(silu(gate x) * up x) on its own rows, one expert after the other.

    x_RD: rows sorted by expert. load_E: int64, how many rows each expert has; sums to R. gate_up_END: [E, 2F, D], gate
    first, as transformers 5 keeps it. down_EDF: [E, D, F]. Returns [R, D] in x's dtype.
    """
    outputs = []
    for expert, rows in enumerate(x_RD.split(load_E.tolist())):
        gate, up = F.linear(rows, gate_up_END[expert].to(rows.dtype)).chunk(2, dim=-1)
        outputs.append(F.linear(swiglu_reference(gate, up), down_EDF[expert].to(rows.dtype)))
    return torch.cat(outputs)


def expert_swiglu(
    x_RD: Tensor, load_E: Tensor, gate_up_END: Tensor, down_EDF: Tensor, narrow: bool = False, fp8: bool = False
) -> Tensor:
    """As the reference: in C++ where it can be had, else with one grouped GEMM per matrix. Shapes that the grouped GEMM refuses
    take the reference. `narrow`: as in `kernels.linear`, in C++. `fp8`: both products in FP8 instead (`kernels.fp8`)."""
    if fp8:
        return grouped_linear_fp8(swiglu(grouped_linear_fp8(x_RD, load_E, gate_up_END)), load_E, down_EDF)
    if kernels_take_rows(x_RD, gate_up_END, down_EDF, narrow=narrow):
        return rows_swiglu(x_RD, load_E, gate_up_END, down_EDF, narrow)
    if not _grouped_mm_takes(x_RD, down_EDF):
        return expert_swiglu_reference(x_RD, load_E, gate_up_END, down_EDF)
    stop_E = load_E.cumsum(0).to(torch.int32)
    gate_up = F.grouped_mm(x_RD, gate_up_END.to(x_RD.dtype).transpose(1, 2), offs=stop_E)
    return F.grouped_mm(swiglu(gate_up), down_EDF.to(x_RD.dtype).transpose(1, 2), offs=stop_E)


def _grouped_mm_takes(x_RD: Tensor, down_EDF: Tensor) -> bool:
    """torch.nn.functional.grouped_mm wants at most 32 bits, on a card 16, rows in order whose stride is a multiple of 16 bytes,
    and at least one row."""
    width = 16 // x_RD.element_size()
    if x_RD.dtype == torch.float64 or (x_RD.is_cuda and x_RD.dtype != torch.bfloat16):
        return False
    if not x_RD.is_contiguous() or x_RD.shape[0] == 0:
        return False
    return x_RD.shape[1] % width == 0 and down_EDF.shape[2] % width == 0
