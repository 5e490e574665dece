"""Head and cross-entropy in one: the logits of a few rows at a time, never of the whole batch.

Letters in names: N position, D hidden, W vocabulary (words).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.card import has_triton, launches
from cadre.kernels.linear import product
from cadre.kernels.native.library import kernels, training_kernels_take

# Logits held at once, in elements: 16 MB in float32, few enough for the cache, rows enough for the products; on a card 128 MB
# in bfloat16, rows enough to outlast the launching of what follows. `cadre.plan.memory` counts them.
CHUNK_ELEMENTS = 1 << 22
CHUNK_ELEMENTS_OF_A_CARD = 1 << 26
LEAST_ROWS = 64


def linear_cross_entropy_reference(hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
    """sum_n weight_n * (-log softmax(hidden_n head^T)[target_n]): float32 scalar, logits in float32 at once."""
    logits = F.linear(hidden_ND, head_WD.to(hidden_ND.dtype)).float()
    return (F.cross_entropy(logits, target_N, reduction="none") * weight_N).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are taken while a chunk's logits are at hand, so nothing of vocabulary width is kept or recomputed."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor, keeps: bool, narrow: bool
    ) -> Tensor:
        dtype = hidden_ND.dtype
        head = head_WD.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        needs_hidden, needs_head = (needs and keeps for needs in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head = torch.zeros_like(head_WD, dtype=torch.float32) if needs_head else None
        rows = max(LEAST_ROWS, (CHUNK_ELEMENTS_OF_A_CARD if hidden_ND.is_cuda else CHUNK_ELEMENTS) // len(head_WD))
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            hidden = hidden_ND[part]
            loss, grad = _cross_entropy(
                product(hidden, head.t(), narrow=narrow), target_N[part], weight_N[part], needs_hidden or needs_head
            )
            total += loss
            if grad is None:
                continue
            if grad_hidden is not None:
                product(grad, head, grad_hidden[part], narrow=narrow)
            if grad_head is not None:
                if dtype == torch.float32:
                    product(grad.t(), hidden, grad_head, add=True, narrow=narrow)
                elif has_triton(grad.device):  # an NVIDIA card adds in float32 as it multiplies
                    torch.ops.aten.addmm.dtype_out(grad_head, grad.t(), hidden, torch.float32, out=grad_head)
                else:
                    grad_head += grad.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_WD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_total).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None, None


def _cross_entropy(logit_NW: Tensor, target_N: Tensor, weight_N: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient by the logits, which may be written over them."""
    if training_kernels_take(logit_NW, weight_N):
        if len(target_N) and not (int(target_N.min()) >= 0 and int(target_N.max()) < logit_NW.shape[1]):
            raise IndexError(f"a target is not one of the {logit_NW.shape[1]} words")
        logit, target, weight = logit_NW.contiguous(), target_N.to(torch.int64).contiguous(), weight_N.contiguous()
        loss_N = torch.empty_like(weight)
        kernels().cadre_cross_entropy(
            logit.data_ptr(), target.data_ptr(), weight.data_ptr(), *logit.shape, wants_grad, torch.get_num_threads(),
            loss_N.data_ptr(),
        )  # fmt: skip
        return loss_N.sum(), logit if wants_grad else None
    if launches(logit_NW, target_N, weight_N) and logit_NW.stride(1) == 1:
        from cadre.kernels.loss_triton import cross_entropy_on_card

        loss_N = cross_entropy_on_card(logit_NW, target_N.contiguous(), weight_N, wants_grad)
        return loss_N.sum(), logit_NW if wants_grad else None
    target, weight = target_N[:, None], weight_N[:, None]
    log_p = torch.log_softmax(logit_NW.float(), dim=-1)
    loss = -(log_p.gather(1, target) * weight).sum()
    if not wants_grad:
        return loss, None
    grad = log_p.exp_().mul_(weight)
    grad.scatter_add_(1, target, -weight)
    return loss, grad.to(logit_NW.dtype)


def linear_cross_entropy(
    hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor, narrow: bool = False
) -> Tensor:
    """As the reference, in chunks. weight_N: float32, 0 for positions that do not count; it gets no gradient. `narrow`: as in
    `kernels.linear`."""
    weight_N = weight_N.expand(target_N.shape)
    # Within `no_grad` a function is told of needs all the same.
    return _LinearCrossEntropy.apply(hidden_ND, head_WD, target_N, weight_N, torch.is_grad_enabled(), narrow)
