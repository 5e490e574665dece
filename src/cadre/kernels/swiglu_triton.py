"""`kernels.swiglu` in Triton, one pass over memory each way, what lies between in float32.

Letters in names: R row, F width of an expert, X = 2F gate and up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def swiglu_on_card(gate_up_RX: Tensor) -> Tensor:
    """silu(gate) * up, [R, F], of a contiguous gate_up_RX."""
    R, F = gate_up_RX.shape[0], gate_up_RX.shape[1] // 2
    out_RF = gate_up_RX.new_empty(R, F)
    if count := out_RF.numel():
        _forward[(triton.cdiv(count, BLOCK),)](gate_up_RX, out_RF, count, F, BLOCK=BLOCK)
    return out_RF


def swiglu_gradient_on_card(gate_up_RX: Tensor, grad_RF: Tensor) -> Tensor:
    """[R, X], of a contiguous grad_RF too."""
    out_RX, count = torch.empty_like(gate_up_RX), grad_RF.numel()
    if count:
        _backward[(triton.cdiv(count, BLOCK),)](gate_up_RX, grad_RF, out_RX, count, grad_RF.shape[1], BLOCK=BLOCK)
    return out_RX


@triton.jit
def _forward(gate_up, out, count, F, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate_at = gate_up + at + (at // F) * F
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate_up, grad, out, count, F, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate_at = at + (at // F) * F
    gate = tl.load(gate_up + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + gate_at + F, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(out + gate_at, (g * up * s * (1 + gate * (1 - s))).to(out.dtype.element_ty), mask=inside)
    tl.store(out + gate_at + F, (g * gate * s).to(out.dtype.element_ty), mask=inside)
