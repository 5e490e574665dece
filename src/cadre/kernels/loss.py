"""Head and cross-entropy in one: the logits of a few rows at a time, never of the whole batch.

Letters in names: N position, D hidden, W vocabulary (words).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at once, in elements: 16 MB in float32, few enough for the cache, rows enough for the products.
_CHUNK_ELEMENTS = 1 << 22


def linear_cross_entropy_reference(hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
    """sum_n weight_n * (-log softmax(hidden_n head^T)[target_n]): float32 scalar, logits in float32 at once."""
    logits = F.linear(hidden_ND, head_WD.to(hidden_ND.dtype)).float()
    return (F.cross_entropy(logits, target_N, reduction="none") * weight_N).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are taken while a chunk's logits are at hand, so nothing of vocabulary width is kept or recomputed."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
        dtype = hidden_ND.dtype
        head = head_WD.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head = torch.zeros_like(head_WD, dtype=torch.float32) if needs_head else None
        rows = max(64, _CHUNK_ELEMENTS // len(head_WD))
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            hidden, target, weight = hidden_ND[part], target_N[part, None], weight_N[part, None]
            log_p = torch.log_softmax(F.linear(hidden, head).float(), dim=-1)
            total -= (log_p.gather(1, target) * weight).sum()
            if grad_hidden is None and grad_head is None:
                continue
            grad = log_p.exp_().mul_(weight)
            grad.scatter_add_(1, target, -weight)
            grad = grad.to(dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
            if grad_head is not None:
                if dtype == torch.float32:
                    grad_head.addmm_(grad.t(), hidden)
                else:
                    grad_head += grad.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_WD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_total).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None


def linear_cross_entropy(hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
    """As the reference, in chunks. weight_N: float32, 0 for positions that do not count; it gets no gradient."""
    return _LinearCrossEntropy.apply(hidden_ND, head_WD, target_N, weight_N)
