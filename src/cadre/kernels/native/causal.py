"""Causal attention with gradients through the C++ kernel (`causal_attention.cpp`): float32 on a CPU.

Letters in names: B batch, T position with a query, S position, H query head, G key-value head, K query-key width, N the part
of it without position, R rotary width, V value width, X = N + V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import is_plain, kernels, library
from cadre.kernels.native.structs import CausalAttention, CausalGradient, Heads, address


def attention_kernel_takes(*tensors: Tensor) -> bool:
    """Whether the kernel can be had for these."""
    return is_plain(*tensors) and library() is not None


def first_seen(document_BT: Tensor) -> Tensor:
    """The first position of each position's document, int32 [B, T]. A document is one stretch of equal numbers."""
    place_T = torch.arange(document_BT.shape[1], dtype=torch.int32, device=document_BT.device)
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return torch.where(begins_BT, place_T, 0).cummax(dim=1).values.to(torch.int32)


def _heads(x_BTHX: Tensor, begin: int = 0) -> Heads:
    return Heads(x_BTHX.data_ptr() + 4 * begin, x_BTHX.stride(1), x_BTHX.stride(2))


def _ready(x_BTHX: Tensor) -> Tensor:
    """The tensor itself if the kernel can walk it, else a copy."""
    even = x_BTHX.stride(3) == 1 and (x_BTHX.shape[0] == 1 or x_BTHX.stride(0) == x_BTHX.shape[1] * x_BTHX.stride(1))
    # `contiguous` leaves the strides of single positions as they are, whatever they say.
    return x_BTHX if even else x_BTHX.clone(memory_format=torch.contiguous_format)


def _check(q_BTHK: Tensor, k: Tensor, v: Tensor, seen: torch.Size, first_BT: Tensor | None) -> None:
    """What the kernel would otherwise find out by reading elsewhere."""
    (B, T), S = q_BTHK.shape[:2], seen[1]
    alike = k.shape[:2] == v.shape[:2] == seen and seen[0] == B and T <= S
    if not alike or (first_BT is not None and tuple(first_BT.shape) != (B, T)):
        raise ValueError(
            f"attention of queries {tuple(q_BTHK.shape)} to keys {tuple(k.shape)} and values {tuple(v.shape)}"
            + ("" if first_BT is None else f" with documents {tuple(first_BT.shape)}")
        )


@contextmanager
def _raised(peak_H: Tensor | None, batch: int) -> Iterator[Tensor | None]:
    """Where the kernel leaves each sequence's largest logits, to which the peaks are raised."""
    if peak_H is None or not batch:
        yield None
        return
    peak_BH = peak_H.new_empty(batch, len(peak_H))
    yield peak_BH
    torch.maximum(peak_H, peak_BH.amax(dim=0), out=peak_H)


class LatentCausalAttention(torch.autograd.Function):
    """q_BTHK: queries of the last T of S positions. kv_BSHX: keys without position, then values. k_BSR: the rotary key.
    turn_SR: complex64 [S, R/2], by which queries and rotary key are to be turned; None if they are. first_BT: `first_seen`,
    or None. `narrow`: as in `kernels.linear`. peak_H: raised to each head's largest logit. Returns [B, T, H, V]."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, kv_BSHX: Tensor, k_BSR: Tensor, turn_SR: Tensor | None, scale: float, split: bool,
        first_BT: Tensor | None, narrow: bool, peak_H: Tensor | None,
    ) -> Tensor:  # fmt: skip
        B, T, H, K = q_BTHK.shape
        _check(q_BTHK, kv_BSHX[..., : K - k_BSR.shape[-1]], kv_BSHX, k_BSR.shape[:2], first_BT)
        if kv_BSHX.shape[2] != H or (turn_SR is not None and tuple(turn_SR.shape) != (k_BSR.shape[1], k_BSR.shape[2] // 2)):
            turns = None if turn_SR is None else tuple(turn_SR.shape)
            raise ValueError(f"queries have {H} heads, keys {kv_BSHX.shape[2]}; turns are {turns}")
        V = kv_BSHX.shape[-1] - (K - k_BSR.shape[-1])
        q, kv, k = _ready(q_BTHK), _ready(kv_BSHX), _ready(k_BSR[:, :, None])
        out, log_sum = q.new_empty(B, T, H, V), q.new_empty(B, H, T)
        turn = None if turn_SR is None else torch.view_as_real(turn_SR).contiguous()
        ctx.save_for_backward(q, kv, k, out, log_sum, turn, first_BT)
        ctx.scale, ctx.split, ctx.narrow = scale, split, narrow
        with _raised(peak_H, B) as peak_BH:
            kernels().cadre_causal_attention(byref(_latent(ctx, ctx.to_save, peak_BH)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputing activations allows no second look
        q, kv, k = saved[:3]
        B, S, H = kv.shape[:3]
        N, R = q.shape[-1] - k.shape[-1], k.shape[-1]
        grad = _ready(grad_BTHV.resolve_neg())
        grad_q, grad_kv, grad_k = q.new_empty(q.shape), q.new_empty(kv.shape), q.new_empty(B, S, H, R)
        gradient = CausalGradient(_heads(grad), _heads(grad_q), _heads(grad_kv), _heads(grad_kv, N), _heads(grad_k))
        kernels().cadre_causal_attention_gradient(byref(_latent(ctx, saved)), byref(gradient))
        return grad_q, grad_kv, grad_k.sum(dim=2), None, None, None, None, None, None


def _latent(ctx: Any, saved: Sequence[Any], peak: Tensor | None = None) -> CausalAttention:
    q, kv, k, out, log_sum, turn, first = saved
    (B, T, H, K), S, R, V = q.shape, kv.shape[1], k.shape[-1], out.shape[-1]
    return CausalAttention(
        _heads(q), _heads(kv), _heads(kv, K - R), _heads(k), _heads(out), log_sum.data_ptr(), address(turn), address(first),
        address(peak), ctx.scale, B, T, S, H, H, K - R, R, V, ctx.split, ctx.narrow,
        torch.get_num_threads(),
    )  # fmt: skip


class GroupedCausalAttention(torch.autograd.Function):
    """q_BTHK: queries of the last T of S positions; k_BSGK and v_BSGV: every H / G query heads share a key-value head.
    first_BT: `first_seen`, or None. `narrow`: as in `kernels.linear`. peak_H: raised to each head's largest logit. Returns
    [B, T, H, V]."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, first_BT: Tensor | None, narrow: bool,
        peak_H: Tensor | None,
    ) -> Tensor:  # fmt: skip
        B, T, H, K = q_BTHK.shape
        _check(q_BTHK, k_BSGK, v_BSGV, k_BSGK.shape[:2], first_BT)
        if k_BSGK.shape[3] != K or H % k_BSGK.shape[2] or v_BSGV.shape[2] != k_BSGK.shape[2]:
            shapes = [tuple(x.shape) for x in (q_BTHK, k_BSGK, v_BSGV)]
            raise ValueError("queries {}, keys {} and values {} do not fit".format(*shapes))
        q, k, v = _ready(q_BTHK), _ready(k_BSGK), _ready(v_BSGV)
        out, log_sum = q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T)
        ctx.save_for_backward(q, k, v, out, log_sum, first_BT)
        ctx.scale, ctx.narrow = scale, narrow
        with _raised(peak_H, B) as peak_BH:
            kernels().cadre_causal_attention(byref(_grouped(ctx, ctx.to_save, peak_BH)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        q, k, v = saved[:3]
        grad = _ready(grad_BTHV.resolve_neg())
        grad_q, grad_k, grad_v = q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)
        gradient = CausalGradient(_heads(grad), _heads(grad_q), _heads(grad_k), _heads(grad_v), Heads())
        kernels().cadre_causal_attention_gradient(byref(_grouped(ctx, saved)), byref(gradient))
        return grad_q, grad_k, grad_v, None, None, None, None


def _grouped(ctx: Any, saved: Sequence[Any], peak: Tensor | None = None) -> CausalAttention:
    q, k, v, out, log_sum, first = saved
    (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
    return CausalAttention(
        _heads(q), _heads(k), _heads(v), Heads(), _heads(out), log_sum.data_ptr(), None, address(first),
        address(peak), ctx.scale, B, T, S, H, G, K, 0, V, False, ctx.narrow, torch.get_num_threads(),
    )  # fmt: skip
