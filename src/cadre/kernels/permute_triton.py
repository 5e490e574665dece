"""The gradient of `kernels.permute.sum_choices` in Triton: one pass, what weights get added up in float32.

Letters in names: T token, K choices of a token, R = T*K routed rows, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def sum_choices_gradient_on_card(grad_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Of y [R, D] in its dtype, by weights rounded as they were on the way forward; of the weights float32 [T, K]. All
    contiguous; row_TK names each row once."""
    (T, K), D = row_TK.shape, y_RD.shape[1]
    grad_RD, grad_TK = torch.empty_like(y_RD), torch.empty_like(weight_TK, dtype=torch.float32)
    if T * K:
        _choice[(T * K,)](grad_TD, y_RD, weight_TK, row_TK, grad_RD, grad_TK, K, D, BLOCK=min(BLOCK, triton.next_power_of_2(D)))
    return grad_RD, grad_TK


@triton.jit
def _choice(grad, y, weight, rows, grad_y, grad_weight, K, D, BLOCK: tl.constexpr):
    choice = tl.program_id(0)
    token = (choice // K).to(tl.int64)
    row = tl.load(rows + choice).to(tl.int64)
    factor = tl.load(weight + choice).to(grad_y.dtype.element_ty).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + lane < D
        g = tl.load(grad + token * D + start + lane, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(y + row * D + start + lane, mask=inside, other=0.0).to(tl.float32)
        total += g * own
        tl.store(grad_y + row * D + start + lane, (g * factor).to(grad_y.dtype.element_ty), mask=inside)
    tl.store(grad_weight + choice, tl.sum(total, axis=0))
