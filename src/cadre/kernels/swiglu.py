"""The experts' gated activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.card import launches


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise over any shape (arXiv 2002.05202)."""
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only and writes both gradients into one tensor, where autograd would keep the activation too and
    join the gradients of the halves by filling and adding."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if _on_card(gate_up):
            from cadre.kernels.swiglu_triton import swiglu_on_card

            return swiglu_on_card(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if _on_card(gate_up, grad):
            from cadre.kernels.swiglu_triton import swiglu_gradient_on_card

            return swiglu_gradient_on_card(gate_up, grad.contiguous())
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def _on_card(gate_up: Tensor, *others: Tensor) -> bool:
    return gate_up.ndim == 2 and gate_up.is_contiguous() and launches(gate_up, *others)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension: [..., 2F] to [..., F]. By Triton on a card."""
    return _SwiGLU.apply(gate_up)
