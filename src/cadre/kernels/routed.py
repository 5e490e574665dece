"""Tokens to their experts and back in one step, with gradients, through the C++ kernel (`experts_training.cpp`): float32 on a
CPU. Rows are moved, multiplied and activated while they lie in the processor's cache; only gate and up are kept for backward,
in bfloat16 where that is what is multiplied.

Letters in names: T token, D hidden, E expert, K choices of a token, R = T*K routed rows, F expert width, N gate and up.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import training_library
from cadre.kernels.native.structs import ExpertsGradient, ExpertsTraining


def routed_swiglu(
    x_TD: Tensor, weight_TK: Tensor, row_TK: Tensor, token_R: Tensor, load_E: Tensor, gate_up_END: Tensor, down_EDF: Tensor,
    narrow: bool = False,
) -> Tensor:  # fmt: skip
    """sum_k weight_TK[t, k] * expert_swiglu(x_TD[token_R])[row_TK[t, k]], [T, D], where `feeds` takes them all. Rows of one
    expert are adjacent, experts in order; load_E: rows per expert. Rows beyond their sum,
    which is at most R, are nobody's: their choices add nothing and get no gradient.

    `narrow`, here and below: as in `kernels.linear`."""
    fits = gate_up_END.shape == (len(load_E), 2 * down_EDF.shape[2], x_TD.shape[1])
    fits &= weight_TK.shape == row_TK.shape and len(row_TK) == len(x_TD) and token_R.numel() == row_TK.numel()
    fits &= row_TK.dtype == token_R.dtype == torch.int64
    _check(x_TD, down_EDF, fits and (narrow or down_EDF.dtype == torch.float32), load_E)
    return _Experts.apply(
        x_TD, weight_TK, row_TK, token_R, load_E, gate_up_END, None, down_EDF, torch.is_grad_enabled(), narrow
    )


def rows_swiglu(x_RD: Tensor, load_E: Tensor, gate_up_END: Tensor, down_EDF: Tensor, narrow: bool = False) -> Tensor:
    """`expert_swiglu` of rows sorted by expert, where `feeds` takes them all. Raises `ValueError` if load_E does not sum to
    the number of rows."""
    if int(load_E.sum()) != len(x_RD):
        raise ValueError(f"load_E sums to {int(load_E.sum())}, but there are {len(x_RD)} rows")
    fits = gate_up_END.shape == (len(load_E), 2 * down_EDF.shape[2], x_RD.shape[1])
    _check(x_RD, down_EDF, fits and (narrow or down_EDF.dtype == torch.float32), load_E)
    return _Experts.apply(x_RD, None, None, None, load_E, gate_up_END, None, down_EDF, torch.is_grad_enabled(), narrow)


def dense_swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, narrow: bool = False) -> Tensor:
    """down(silu(gate x) * up x) of every position [..., D], where `feeds` takes them all."""
    x_TD = x.reshape(-1, x.shape[-1])
    if not narrow and down_DF.dtype != torch.float32:
        raise ValueError("matrices of bfloat16 have narrow products only")
    if gate_FD.shape != up_FD.shape or gate_FD.shape != down_DF.mT.shape or x_TD.shape[1] != gate_FD.shape[1]:
        raise ValueError(f"rows {tuple(x.shape)} do not fit gate and up {tuple(gate_FD.shape)} and down {tuple(down_DF.shape)}")
    load_E = torch.tensor([len(x_TD)], device="cpu")
    return _Experts.apply(x_TD, None, None, None, load_E, gate_FD, up_FD, down_DF, torch.is_grad_enabled(), narrow).view(
        x.shape
    )


def _check(x: Tensor, down_EDF: Tensor, fits: bool, load_E: Tensor) -> None:
    """What the kernel would otherwise find out by writing elsewhere."""
    if not fits or load_E.dtype != torch.int64 or down_EDF.shape[:2] != (len(load_E), x.shape[1]):
        raise ValueError(f"rows {tuple(x.shape)} do not fit {len(load_E)} experts of down {tuple(down_EDF.shape)}")


class _Experts(torch.autograd.Function):
    """With up None, gate is gate and up in one: [E, 2F, D]. With token_R None rows are tokens as they are."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor | None, row_TK: Tensor | None, token_R: Tensor | None, load_E: Tensor,
        gate: Tensor, up: Tensor | None, down: Tensor, keeps: bool, narrow: bool,
    ) -> Tensor:  # fmt: skip
        x, gate, up, down = x_TD.contiguous(), gate.contiguous(), up if up is None else up.contiguous(), down.contiguous()
        load, weight = load_E.contiguous(), None if weight_TK is None else weight_TK.contiguous()
        row, token = (None if index is None else index.contiguous() for index in (row_TK, token_R))
        rows = len(x) if token is None else len(token)
        kept = torch.bfloat16 if narrow else torch.float32
        inner = x.new_empty(rows, 2 * down.shape[-1], dtype=kept) if keeps and any(ctx.needs_input_grad) else None
        y = None if token is None else x.new_empty(rows, x.shape[1])
        out = torch.empty_like(x)
        ctx.narrow = narrow
        _run(narrow, x, weight, row, token, load, gate, up, down, inner, y, out)
        ctx.save_for_backward(x, weight, row, token, load, gate, up, down, inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, row, token, load, gate, up, down, inner = ctx.saved_tensors
        grad = grad_TD.contiguous()
        needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        needs_matrices = any(ctx.needs_input_grad[5:8])
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = None if weight is None else torch.empty_like(weight)
        rows = len(inner)
        x_rows = x.new_empty(rows, x.shape[1]) if needs_x and token is not None else None
        weight_rows = None if token is None else x.new_empty(2, rows)
        grad_gate, grad_up, grad_down = (
            torch.empty_like(of) if needs_matrices and of is not None else None for of in (gate, up, down)
        )
        _run(
            ctx.narrow, x, weight, row, token, load, gate, up, down, inner, None, None,
            (grad, grad_x, grad_weight, grad_gate, grad_up, grad_down, x_rows, weight_rows),
        )  # fmt: skip
        return grad_x, grad_weight if needs_weight else None, None, None, None, grad_gate, grad_up, grad_down, None, None


def _run(
    narrow: bool, x: Tensor, weight: Tensor | None, row: Tensor | None, token: Tensor | None, load: Tensor, gate: Tensor,
    up: Tensor | None, down: Tensor, inner: Tensor | None, y: Tensor | None, out: Tensor | None,
    gradient: tuple[Tensor | None, ...] | None = None,
) -> None:  # fmt: skip
    """One pass of the kernel: forward, or with `gradient` (as `ExpertsGradient`, without up where gate holds both) backward."""
    hidden, width = down.shape[-2:]
    half = gate.element_size() * hidden * width
    tokens, rows = len(x), len(x) if token is None else len(token)
    experts = ExpertsTraining(
        *(_at(tensor) for tensor in (x, token, row, load, weight, gate)),
        gate.data_ptr() + half if up is None else _at(up),
        *(_at(tensor) for tensor in (down, inner, y, out)),
        tokens, rows, hidden, width, len(load), 1 if row is None else row.shape[1], 2 * hidden * width, narrow,
        gate.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    library = training_library()
    assert library is not None
    if gradient is None:
        library.cadre_experts_training(byref(experts))
        return
    into = ExpertsGradient(*(_at(tensor) for tensor in gradient))
    if up is None and into.gate:
        into.up = into.gate + half
    library.cadre_experts_training_gradient(byref(experts), byref(into))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
