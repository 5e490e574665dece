"""Root-mean-square norm with a gradient in closed form: autograd's composite takes about twice the passes over memory.

Letters in names: N position, D normed dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import as_rows, kernels, threads_for, training_kernels_take


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, rounded to x's dtype before the weight."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return weight_D.to(x.dtype) * normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vecdot(x, x)[..., None]
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0)
        grad_normed = grad * weight_D
        along = torch.linalg.vecdot(grad_normed, normed)[..., None].div_(x.shape[-1])
        return grad_normed.addcmul_(normed, along, value=-1).mul_(scale), grad_weight, None


class _NativeRMSNorm(torch.autograd.Function):
    """The same in C++, forward and backward one pass over memory each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND, weight = as_rows(x), weight_D.contiguous()
        y, scale_N = x.new_empty(x.shape), x.new_empty(len(x_ND))
        kernels().cadre_norm_training(
            x_ND.data_ptr(),
            x_ND.stride(0),
            weight.data_ptr(),
            eps,
            *x_ND.shape,
            threads_for(x),
            y.data_ptr(),
            scale_N.data_ptr(),
        )
        ctx.save_for_backward(x_ND, weight, scale_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight, scale_N = ctx.saved_tensors
        grad_ND = as_rows(grad.resolve_neg())
        grad_x, grad_weight = grad.new_empty(grad.shape), weight.new_empty(weight.shape)
        kernels().cadre_norm_training_gradient(
            x_ND.data_ptr(), x_ND.stride(0), weight.data_ptr(), scale_N.data_ptr(), grad_ND.data_ptr(), grad_ND.stride(0),
            *x_ND.shape, threads_for(grad), grad_x.data_ptr(), grad_weight.data_ptr(),
        )  # fmt: skip
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As the reference; float32 activations take the closed form, on a CPU in C++, and a card torch's own fused norm, which
    rounds once, after the weight."""
    if weight_D.shape != x.shape[-1:]:
        raise ValueError(f"a norm of {len(weight_D)} cannot take {tuple(x.shape)}")
    if x.is_cuda:
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    if x.dtype == torch.float32 and weight_D.dtype == torch.float32 and x.ndim > 1:
        if training_kernels_take(x, weight_D):
            return _NativeRMSNorm.apply(x, weight_D, eps)
        return _RMSNorm.apply(x, weight_D, eps)
    return rms_norm_reference(x, weight_D, eps)
