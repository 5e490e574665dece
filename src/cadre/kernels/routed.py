"""Tokens to their experts and back in one step, with gradients, through the C++ kernel (`experts_training.cpp`): float32 on a
CPU. Rows are moved, multiplied and activated while they lie in the processor's cache; only gate and up are kept for backward,
in bfloat16 where that is what is multiplied.

Letters in names: T token, D hidden, E expert, K choices of a token, R = T*K routed rows, F expert width, N gate and up.
"""

from __future__ import annotations

from ctypes import byref, pointer
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import kernels
from cadre.kernels.native.structs import ExpertsGradient, ExpertsTraining, Keeper, address
from cadre.kernels.quantized import QuantizedMatrix

# gate and up [F, D] and down [D, F] of a dense layer.
Dense = tuple[Tensor, Tensor, Tensor]


def routed_swiglu(
    x_TD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor, load_E: Tensor, gate_up_END: Tensor, down_EDF: Tensor,
    narrow: bool = False, shared: Dense | None = None,
) -> Tensor:  # fmt: skip
    """sum_k weight_TK[t, k] * expert_swiglu(x_TD[token_R])[row_TK[t, k]], [T, D], for what
    `kernels_take_rows`. Rows of one expert are adjacent, experts in order; load_E: rows per expert. Rows beyond their sum, at
    most R, are nobody's: their choices add nothing and get no gradient.

    `narrow`, here and below: as in `kernels.linear`. `shared`: what the shared experts are; their `dense_swiglu` is then part
    of the sum, and of its gradient, without a pass over memory to add it. Raises `ValueError` for operands that do not fit."""
    fits = gate_up_END.shape == (len(load_E), 2 * down_EDF.shape[2], x_TD.shape[1])
    _check_routes(x_TD, weight_TK, row_TK, token_R, load_E, fits)
    _check(x_TD, down_EDF, narrow or down_EDF.dtype == torch.float32, load_E)
    if shared is not None:
        _check_dense(x_TD, shared, narrow)
    return _Experts.apply(
        x_TD, weight_TK, row_TK, token_R, load_E, gate_up_END, None, down_EDF, *(shared or (None,) * 3),
        torch.is_grad_enabled(), narrow,
    )  # fmt: skip


def routed_swiglu_quantized(
    x_TD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor, load_E: Tensor, gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
) -> Tensor:  # fmt: skip
    """The same of quantized matrices, [E * 2F, D] and [E * D, F], each expert's turned to bfloat16 in the cache, for float32 x
    where `own_products_faster(narrow=True)`. Without gradients."""
    experts, F = len(load_E), down.cols
    fits = (gate_up.rows, gate_up.cols) == (experts * 2 * F, x_TD.shape[1]) and down.rows == experts * x_TD.shape[1]
    _check_routes(x_TD, weight_TK, row_TK, token_R, load_E, fits)
    x, weight, row, token, load = _contiguous(x_TD, weight_TK, row_TK, token_R, load_E)
    out, y, keeper = torch.empty_like(x), x.new_empty(len(token), x.shape[1]), Keeper()
    quantized = [pointer(keeper.matrix(matrix)) for matrix in (gate_up, down)]
    native = ExpertsTraining(
        *(address(tensor) for tensor in (x, token, row, load, weight)),
        *(None, None, None, *quantized, None, address(y), address(out)),
        len(x), len(token), x.shape[1], F, experts, row.shape[1], 0, True, False, False, torch.get_num_threads(),
    )  # fmt: skip
    kernels().cadre_experts_training(byref(native))
    return out


def rows_swiglu(x_RD: Tensor, load_E: Tensor, gate_up_END: Tensor, down_EDF: Tensor, narrow: bool = False) -> Tensor:
    """`expert_swiglu` of rows sorted by expert, for what `kernels_take_rows`. Raises `ValueError` if load_E does not sum to the
    number of rows."""
    if int(load_E.sum()) != len(x_RD):
        raise ValueError(f"load_E sums to {int(load_E.sum())}, but there are {len(x_RD)} rows")
    fits = gate_up_END.shape == (len(load_E), 2 * down_EDF.shape[2], x_RD.shape[1])
    _check(x_RD, down_EDF, fits and (narrow or down_EDF.dtype == torch.float32), load_E)
    return _Experts.apply(
        x_RD, None, None, None, load_E, gate_up_END, None, down_EDF, None, None, None, torch.is_grad_enabled(), narrow
    )


def dense_swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, narrow: bool = False) -> Tensor:
    """down(silu(gate x) * up x) of every position [..., D], for what `kernels_take_rows`."""
    x_TD = x.reshape(-1, x.shape[-1])
    _check_dense(x_TD, (gate_FD, up_FD, down_DF), narrow)
    load_E, absent = _all_of(x_TD), (None, None, None)
    return _Experts.apply(
        x_TD, *absent, load_E, gate_FD, up_FD, down_DF, *absent, torch.is_grad_enabled(), narrow
    ).view(x.shape)  # fmt: skip


def _all_of(x_TD: Tensor) -> Tensor:
    """The loads of a dense layer, an expert that has all tokens."""
    return torch.tensor([len(x_TD)], device="cpu")


def _check_dense(x_TD: Tensor, dense: Dense, narrow: bool) -> None:
    gate_FD, up_FD, down_DF = dense
    if not narrow and down_DF.dtype != torch.float32:
        raise ValueError("matrices of bfloat16 have narrow products only")
    if gate_FD.shape != up_FD.shape or gate_FD.shape != down_DF.mT.shape or x_TD.shape[1] != gate_FD.shape[1]:
        shapes = f"gate and up {tuple(gate_FD.shape)} and down {tuple(down_DF.shape)}"
        raise ValueError(f"rows {tuple(x_TD.shape)} do not fit {shapes}")


def _check_routes(x: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor, load_E: Tensor, fits: bool) -> None:
    fits &= weight_TK.shape == row_TK.shape and len(row_TK) == len(x) and token_R.numel() == row_TK.numel()
    fits &= row_TK.dtype == token_R.dtype == load_E.dtype == torch.int64 and len(load_E) > 0
    if not fits or int(load_E.min()) < 0 or int(load_E.sum()) > token_R.numel():
        raise ValueError(f"rows {tuple(x.shape)} and their routes do not fit {len(load_E)} experts")


def _check(x: Tensor, down_EDF: Tensor, fits: bool, load_E: Tensor) -> None:
    """What the kernel would otherwise find out by writing elsewhere."""
    if not fits or load_E.dtype != torch.int64 or down_EDF.shape[:2] != (len(load_E), x.shape[1]):
        raise ValueError(f"rows {tuple(x.shape)} do not fit {len(load_E)} experts of down {tuple(down_EDF.shape)}")


class _Experts(torch.autograd.Function):
    """With up None, gate is gate and up in one: [E, 2F, D]. With token_R None rows are tokens as they are. The last three
    matrices, if there, are a dense layer beside the experts."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor | None, row_TK: Tensor | None, token_R: Tensor | None, load_E: Tensor,
        gate: Tensor, up: Tensor | None, down: Tensor, dense_gate: Tensor | None, dense_up: Tensor | None,
        dense_down: Tensor | None, keeps: bool, narrow: bool,
    ) -> Tensor:  # fmt: skip
        keeps = keeps and any(ctx.needs_input_grad)
        x, *experts = _contiguous(x_TD, weight_TK, row_TK, token_R, load_E, gate, up, down)
        dense = _contiguous(dense_gate, dense_up, dense_down)
        out, kept = torch.empty_like(x), None
        ctx.narrow, ctx.beside = narrow, dense_down is not None
        if ctx.beside:
            kept = _forward(x, [None, None, None, _all_of(x), *dense], out, keeps, narrow, adds=False)
        inner = _forward(x, experts, out, keeps, narrow, adds=ctx.beside)
        ctx.save_for_backward(x, *experts, inner, *dense, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        experts, inner, dense, kept = saved[:7], saved[7], saved[8:11], saved[11]
        grad, needs = grad_TD.resolve_neg().contiguous(), ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needs[0] else None
        of_dense: list[Tensor | None] = [None] * 4
        of_experts = of_dense
        if ctx.beside and (needs[0] or any(needs[8:11])):
            operands = [None, None, None, _all_of(x), *dense]
            of_dense = _backward(x, operands, kept, grad, grad_x, any(needs[8:11]), ctx.narrow, adds=False)
        if needs[0] or needs[1] or any(needs[5:8]):
            of_experts = _backward(x, experts, inner, grad, grad_x, any(needs[5:8]), ctx.narrow, adds=ctx.beside)
        grad_weight, *matrices = of_experts
        return grad_x, grad_weight if needs[1] else None, None, None, None, *matrices, *of_dense[1:], None, None


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# Of one pass, `operands` are weight_TK, row_TK, token_R, load_E, gate, up and down. `adds`: to what is there.


def _forward(x: Tensor, operands: list[Any], out: Tensor, keeps: bool, narrow: bool, adds: bool) -> Tensor | None:
    """Fill `out`. Returns what backward needs of it, if it `keeps` that."""
    token, down = operands[2], operands[6]
    rows = len(x) if token is None else len(token)
    kept = torch.bfloat16 if narrow else torch.float32
    inner = x.new_empty(rows, 2 * down.shape[-1], dtype=kept) if keeps else None
    y = None if token is None else x.new_empty(rows, x.shape[1])
    _run(x, operands, inner, y, out, None, narrow, adds)
    return inner


def _backward(
    x: Tensor, operands: list[Any], inner: Tensor, grad: Tensor, grad_x: Tensor | None, needs_matrices: bool, narrow: bool,
    adds: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Fill `grad_x`, if wanted. Returns the gradients of weight, gate, up and down."""
    weight, _, token, _, *matrices = operands
    grad_weight = None if weight is None else torch.empty_like(weight)
    x_rows = x.new_empty(len(inner), x.shape[1]) if grad_x is not None and token is not None else None
    weight_rows = None if token is None else x.new_empty(2, len(inner))
    grads = [torch.empty_like(of) if needs_matrices and of is not None else None for of in matrices]
    _run(x, operands, inner, None, None, (grad, grad_x, grad_weight, *grads, x_rows, weight_rows), narrow, adds)
    return [grad_weight, *grads]


def _run(
    x: Tensor, operands: list[Any], inner: Tensor | None, y: Tensor | None, out: Tensor | None,
    gradient: tuple[Tensor | None, ...] | None, narrow: bool, adds: bool,
) -> None:  # fmt: skip
    """One pass of the kernel: forward, or with `gradient` (as `ExpertsGradient`, without up where gate holds both) backward."""
    weight, row, token, load, gate, up, down = operands
    hidden, width = down.shape[-2:]
    half = gate.element_size() * hidden * width
    tokens, rows = len(x), len(x) if token is None else len(token)
    native = ExpertsTraining(
        *(address(tensor) for tensor in (x, token, row, load, weight, gate)),
        gate.data_ptr() + half if up is None else address(up),
        address(down), None, None, *(address(tensor) for tensor in (inner, y, out)),
        tokens, rows, hidden, width, len(load), 1 if row is None else row.shape[1], 2 * hidden * width, narrow,
        gate.dtype == torch.bfloat16, adds, torch.get_num_threads(),
    )  # fmt: skip
    if gradient is None:
        kernels().cadre_experts_training(byref(native))
        return
    into = ExpertsGradient(*(address(tensor) for tensor in gradient))
    if up is None and into.gate:
        into.up = into.gate + half
    kernels().cadre_experts_training_gradient(byref(native), byref(into))
