"""Matrix products of training on a CPU, with gradients: float32 in and out, the factors rounded to bfloat16 on the way into a
product if wanted (`narrow`) and the sums float32. What lies between products keeps all its bits, so this is more exact than
bfloat16 activations, and no slower where the processor multiplies bfloat16 itself.

Letters in names: M, N, K as in a[M, K] b[K, N]; T row of x, I input, O output.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import (
    is_plain,
    kernels,
    kernels_take_rows,
    library,
    own_products_faster,
    training_kernels_take,
)
from cadre.kernels.native.structs import Keeper
from cadre.kernels.quantized import QuantizedMatrix, dequantize

# Fewer rows than these are read-bound: packing the weight would cost more than multiplying by it.
_LEAST_ROWS = 16


def rounded(x: Tensor) -> Tensor:
    """Float32 that bfloat16 can hold, the nearest: what a narrow product multiplies."""
    return x.to(torch.bfloat16).to(x.dtype)


def product_reference(
    a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, *, add: bool = False, narrow: bool = False
) -> Tensor:
    """a b, or out + a b with `add`. Float32 [M, N], in `out` where one is given."""
    b_KN = b_KN.to(a_MK.dtype)
    if narrow:
        a_MK, b_KN = rounded(a_MK), rounded(b_KN)
    if out is None:
        return a_MK @ b_KN
    return out.addmm_(a_MK, b_KN) if add else torch.mm(a_MK, b_KN, out=out)


def product(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, *, add: bool = False, narrow: bool = False) -> Tensor:
    """As the reference, by our kernel where it is the faster one. Operands may be transposed views. b may be of bfloat16 where
    `kernels_take_rows` takes it."""
    mine = kernels_take_rows(a_MK, b_KN, narrow=narrow) and own_products_faster(narrow) and a_MK.shape[0] >= _LEAST_ROWS
    if not mine or (out is not None and not _by_rows(out)):
        return product_reference(a_MK, b_KN, out, add=add, narrow=narrow)
    (M, K), N = a_MK.shape, b_KN.shape[1]
    if out is None:
        out = a_MK.new_empty(M, N)
    if b_KN.shape[0] != K or out.shape != (M, N) or not training_kernels_take(out):
        raise ValueError(f"{tuple(a_MK.shape)} times {tuple(b_KN.shape)} does not give {tuple(out.shape)}")
    a, b = _Operand(a_MK), _Operand(b_KN)
    kernels().cadre_product(
        a.data, a.stride, a.turned, b.data, b.stride, b.turned, b.halves, M, N, K, 1.0 if add else 0.0, narrow,
        torch.get_num_threads(), out.data_ptr(), max(out.stride(0), N),
    )  # fmt: skip
    return out


class _Operand:
    """How a matrix lies: rows of neighbours, or columns of them (`turned`). Holds on to what lies there."""

    def __init__(self, x: Tensor) -> None:
        self.turned = not _by_rows(x) and _by_rows(x.t())
        self.kept = x if self.turned or _by_rows(x) else x.contiguous()
        flat = self.kept.t() if self.turned else self.kept
        self.halves = x.dtype == torch.bfloat16
        self.data, self.stride = flat.data_ptr(), max(flat.stride(0), flat.shape[1])  # of a single row any stride is given


def _by_rows(x: Tensor) -> bool:
    return x.stride(1) == 1 and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, narrow: bool, narrow_back: bool) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.narrow = narrow_back
        return product(x_TI, weight_OI.t(), narrow=narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TI, weight_OI = ctx.saved_tensors
        grad = grad_TO.resolve_neg()
        grad_x = product(grad, weight_OI, narrow=ctx.narrow) if ctx.needs_input_grad[0] else None
        narrow = ctx.narrow and grad.shape[1] >= _LEAST_ROWS  # else all of x would be rounded for torch
        grad_weight = product(grad.t(), x_TI, narrow=narrow) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


def linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, narrow: bool = False, narrow_back: bool | None = None
) -> Tensor:
    """x W^T + b for x [..., I] in x's dtype: [..., O]. `narrow` where `own_products_faster(narrow)` says that there is such a
    thing; x is float32 then. `narrow_back`: the same of the gradients' products, if it is not as `narrow`."""
    rows, back = x.numel() // max(1, x.shape[-1]), narrow if narrow_back is None else narrow_back
    taken = rows >= _LEAST_ROWS and kernels_take_rows(x, weight_OI, narrow=narrow)
    if not (taken and (own_products_faster(narrow) or own_products_faster(back))):  # last, for it may have to compile
        return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))
    y = _Linear.apply(x.reshape(rows, x.shape[-1]), weight_OI, narrow, back).view(*x.shape[:-1], len(weight_OI))
    return y if bias_O is None else y + bias_O


def narrowed(matrix: QuantizedMatrix) -> Tensor:
    """What a quantized matrix stands for, rounded to bfloat16: [rows, cols]."""
    native = library() if is_plain(matrix.data, dtype=matrix.data.dtype) else None
    if native is None:
        return dequantize(matrix, torch.bfloat16)
    wide = torch.empty(matrix.rows, matrix.cols, dtype=torch.bfloat16)
    native.cadre_narrow(byref(Keeper().matrix(matrix)), torch.get_num_threads(), wide.data_ptr())
    return wide
