"""Turning pairs of dimensions by position: the two ways in which weights pair them.

Letters in names: B batch, T position, H head, K width of a head, R rotary dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import as_rows, kernels, threads_for, training_kernels_take


def rotate_pairs(x_BTHR: Tensor, turn_TR: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1), as DeepSeek's weights expect. The order within the result is the same for queries and
    keys, so scores equal transformers', which writes V3's pairs out de-interleaved. turn_TR: complex64 [T, R/2]."""
    # view_as_complex refuses the odd strides and the odd offset of a slice beside an odd latent width.
    wide_BTHR = x_BTHR.float().contiguous()
    if wide_BTHR.storage_offset() % 2:
        wide_BTHR = wide_BTHR.clone()
    pairs = torch.view_as_complex(wide_BTHR.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn_TR[:, None]).flatten(-2).to(x_BTHR.dtype)


def rotate_halves_reference(x_BTHK: Tensor, turn_TR: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2), as llama's weights and those of its like expect; what lies beyond R stays as it is.
    turn_TR: complex64 [T, R/2]."""
    rotary = 2 * turn_TR.shape[1]
    turning, still = x_BTHK.split((rotary, x_BTHK.shape[-1] - rotary), dim=-1)
    first, second = turning.float().chunk(2, dim=-1)
    cos, sin = turn_TR.real[:, None], turn_TR.imag[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(half.to(x_BTHK.dtype) for half in turned), still), dim=-1)


def rotate_halves(x_BTHK: Tensor, turn_TR: Tensor) -> Tensor:
    """As the reference; float32 on a CPU takes one pass over memory, and one back."""
    if x_BTHK.ndim == 4 and training_kernels_take(x_BTHK):
        return _RotateHalves.apply(x_BTHK, turn_TR)
    return rotate_halves_reference(x_BTHK, turn_TR)


class _RotateHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, turn_TR: Tensor) -> Tensor:
        ctx.turn_TR = turn_TR  # a table of the model's, which nothing changes
        return _rotated(x_BTHK, turn_TR, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor, None]:
        return _rotated(grad_BTHK.resolve_neg(), ctx.turn_TR, back=True), None


def _rotated(x_BTHK: Tensor, turn_TR: Tensor, back: bool) -> Tensor:
    _, positions, heads, width = x_BTHK.shape
    x_NX = as_rows(x_BTHK.flatten(2))
    turn = turn_TR.resolve_conj().contiguous()
    y_BTHK = x_NX.new_empty(x_BTHK.shape)
    kernels().cadre_rotary(
        x_NX.data_ptr(), x_NX.stride(0), turn.data_ptr(), len(x_NX), positions, heads, width, 2 * turn.shape[1], back,
        threads_for(x_BTHK), y_BTHK.data_ptr(),
    )  # fmt: skip
    return y_BTHK
