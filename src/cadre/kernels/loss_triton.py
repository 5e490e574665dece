"""The step of `kernels.loss` over a few rows of logits in Triton: the loss, and the gradient written over the logits.

Letters in names: N position, W vocabulary (words).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def cross_entropy_on_card(logit_NW: Tensor, target_N: Tensor, weight_N: Tensor, wants_grad: bool) -> Tensor:
    """float32 [N]: weight * -log softmax(logit)[target]; with `wants_grad` logit_NW becomes its gradient, in its dtype.

    logit_NW: floating-point, words adjacent. target_N: int64, contiguous; the loss of one that is no word is NaN. weight_N:
    float32.
    """
    N, W = logit_NW.shape
    loss_N = torch.empty(N, dtype=torch.float32, device=logit_NW.device)
    if N:
        _cross_entropy[(N,)](
            logit_NW, target_N, weight_N, loss_N, logit_NW.stride(0), weight_N.stride(0), W, GRAD=wants_grad, **launch(W)
        )
    return loss_N


def launch(words: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(words))
    return {"BLOCK": block, "num_warps": 16 if block == BLOCK else 4}


@triton.jit
def _cross_entropy(logit, target, weight, loss, stride, weight_stride, W, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logit + row * stride
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, W, BLOCK):
        x = tl.load(at + start + lane, mask=start + lane < W, other=float("-inf")).to(tl.float32)
        new = tl.maximum(most, x)
        # Lanes that have seen nothing yet stay at -inf, whose difference with itself would be NaN.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(most - shift) + tl.exp(x - shift)
        most = new
    top = tl.max(most, axis=0)
    total = tl.sum(total * tl.exp(most - top), axis=0)
    place, factor = tl.load(target + row), tl.load(weight + row * weight_stride)
    own = tl.load(at + place, mask=(place >= 0) & (place < W), other=float("nan")).to(tl.float32)
    tl.store(loss + row, (top + tl.log(total) - own) * factor)
    if GRAD:
        tl.debug_barrier()  # before it is written over, `own` has been read
        scale = factor / total
        for start in range(0, W, BLOCK):
            inside = start + lane < W
            x = tl.load(at + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - top) * scale - tl.where(start + lane == place, factor, 0.0)
            tl.store(at + start + lane, grad.to(logit.dtype.element_ty), mask=inside)
