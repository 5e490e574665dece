"""Experts' products in FP8, forward and backward: E4M3 elements under one scale a run of 128 in activations and gradients, a
block of 128 x 128 in weights, sums in float32 (DeepSeek-V3 report, arXiv 2412.19437, section 3.3). Scales are powers of two, as
DeepSeek-V3.1's are; so what is multiplied is also exactly bfloat16. Runs lie along what a product adds up over: of the
gradient of a weight these are an expert's rows.

Letters in names: R row, rows sorted by expert; E expert; K width of a row, N of what its expert makes of it; G run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.card import multiplies_fp8

RUN = 128
ELEMENT = torch.float8_e4m3fn
# The largest E4M3 number is 448 = 0.875 x 2^9.
_MANTISSA, _EXPONENT = 0.875, 9
# The exponents of float32 that are neither subnormal nor infinite, and that of infinity.
_LEAST, _MOST, _INFINITE = -126, 127, 128


def exponent_of(most: Tensor) -> Tensor:
    """Of a run whose largest size is `most`, the exponent of its scale, int32: the least at which no element is beyond 448;
    128, an infinite scale, of a run that holds an infinity or NaN: nothing finite comes back of it."""
    mantissa, exponent = torch.frexp(most.float())
    exponent = (exponent - _EXPONENT + (mantissa > _MANTISSA).int()).clamp(_LEAST, _MOST)
    return exponent.where(most.isfinite(), _INFINITE)


def power_of_two(exponent: Tensor) -> Tensor:
    """float32 of exponents, int32 from -126 to 127; of 128, infinity."""
    return (exponent + 127 << 23).view(torch.float32)


def rounded_rows(x: Tensor) -> Tensor:
    """What FP8 makes of x, runs along its last dimension, the last of them shorter: float32 of x's shape."""
    width = x.shape[-1]
    runs = F.pad(x.float(), (0, -width % RUN)).unflatten(-1, (-1, RUN))
    return _rounded(runs, (-1,)).flatten(-2)[..., :width]


def rounded_blocks(w_ENK: Tensor) -> Tensor:
    """What FP8 makes of weights, a scale for each 128 x 128: float32."""
    N, K = w_ENK.shape[-2:]
    padded = F.pad(w_ENK.float(), (0, -K % RUN, 0, -N % RUN))
    blocks = padded.unflatten(-1, (-1, RUN)).unflatten(-3, (-1, RUN))
    return _rounded(blocks, (-3, -1)).flatten(-4, -3).flatten(-2)[..., :N, :K]


def _rounded(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    scale = power_of_two(exponent_of(x.abs().amax(dims, keepdim=True)))
    return (x / scale).to(ELEMENT).float() * scale


class _Reference:
    """The three products, one expert after the other, of float32 numbers that FP8 can hold."""

    def __init__(self, w_ENK: Tensor) -> None:
        self.w_ENK = rounded_blocks(w_ENK)

    def forward(self, x_RK: Tensor, load_E: Tensor) -> Tensor:
        rows = rounded_rows(x_RK).split(load_E.tolist())
        return torch.cat([x @ w_NK.t() for x, w_NK in zip(rows, self.w_ENK, strict=True)]).to(x_RK.dtype)

    def input_gradient(self, grad_RN: Tensor, load_E: Tensor) -> Tensor:
        rows = rounded_rows(grad_RN).split(load_E.tolist())
        return torch.cat([grad @ w_NK for grad, w_NK in zip(rows, self.w_ENK, strict=True)]).to(grad_RN.dtype)

    @staticmethod
    def weight_gradient(grad_RN: Tensor, x_RK: Tensor, load_E: Tensor) -> Tensor:
        loads = load_E.tolist()
        both = zip(grad_RN.split(loads), x_RK.split(loads), strict=True)
        return torch.stack([rounded_rows(grad.t()) @ rounded_rows(x.t()).t() for grad, x in both])


class _GroupedLinear(torch.autograd.Function):
    """x of each expert's rows times its w^T. What is rounded is taken for what it was."""

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, load_E: Tensor, w_ENK: Tensor, products: Any) -> Tensor:
        ctx.weights, ctx.dtype = products(w_ENK), w_ENK.dtype
        ctx.save_for_backward(x_RK, load_E)
        return ctx.weights.forward(x_RK, load_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x_RK, load_E = ctx.saved_tensors
        grad_RN = grad_RN.contiguous()
        grad_x = ctx.weights.input_gradient(grad_RN, load_E) if ctx.needs_input_grad[0] else None
        grad_w = ctx.weights.weight_gradient(grad_RN, x_RK, load_E).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_w, None


def grouped_linear_fp8(x_RK: Tensor, load_E: Tensor, w_ENK: Tensor) -> Tensor:
    """Each expert's rows times its weights, all three products in FP8: [R, N] in x's dtype.

    x_RK: floating-point rows sorted by expert. load_E: int64, rows per expert. w_ENK: float32 or bfloat16; its gradient is
    float32 before it is cast. By Triton on a card that multiplies FP8; elsewhere by the reference, which computes the same in
    float32 and is slow: to learn what FP8 does to a loss.
    """
    return _GroupedLinear.apply(x_RK.contiguous(), load_E, w_ENK, _products(x_RK))


def grouped_linear_fp8_reference(x_RK: Tensor, load_E: Tensor, w_ENK: Tensor) -> Tensor:
    return _GroupedLinear.apply(x_RK, load_E, w_ENK, _Reference)


def _products(x_RK: Tensor) -> Any:
    if not (x_RK.is_cuda and multiplies_fp8(x_RK.device)):
        return _Reference
    from cadre.kernels.fp8_triton import Products

    return Products
