"""Causal attention with gradients through the C++ kernel (`causal_attention.cpp`): float32 on a CPU.

Letters in names: B batch, T position, H query head, G key-value head, K query-key width, N the part of it without position,
R rotary width, V value width, X = N + V.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadre.kernels.native.library import library


class _Heads(Structure):
    _fields_ = (("data", c_void_p), ("token", c_int64), ("head", c_int64))


class _CausalAttention(Structure):
    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "k_rotary", "out")),
        *((name, c_void_p) for name in ("log_sum", "turn", "first")),
        ("scale", c_float),
        *((name, c_int32) for name in ("batch", "length", "heads", "groups", "nope", "rotary", "value", "split", "threads")),
    )


class _CausalGradient(Structure):
    _fields_ = tuple((name, _Heads) for name in ("out", "q", "k", "v", "k_rotary"))


def takes(*tensors: Tensor) -> bool:
    """Whether the kernel can be had for these."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and library() is not None


def first_seen(document_BT: Tensor) -> Tensor:
    """The first position of each position's document, int32 [B, T]. A document is one stretch of equal numbers."""
    place_T = torch.arange(document_BT.shape[1], dtype=torch.int32)
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return torch.where(begins_BT, place_T, 0).cummax(dim=1).values.to(torch.int32)


def _heads(x_BTHX: Tensor, begin: int = 0) -> _Heads:
    return _Heads(x_BTHX.data_ptr() + 4 * begin, x_BTHX.stride(1), x_BTHX.stride(2))


def _ready(x_BTHX: Tensor) -> Tensor:
    """The tensor itself if the kernel can walk it, else a copy."""
    even = x_BTHX.stride(3) == 1 and (x_BTHX.shape[0] == 1 or x_BTHX.stride(0) == x_BTHX.shape[1] * x_BTHX.stride(1))
    return x_BTHX if even else x_BTHX.contiguous()


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    for name, types in (("", (_CausalAttention,)), ("_gradient", (_CausalAttention, _CausalGradient))):
        function = getattr(loaded, f"cadre_causal_attention{name}")
        function.argtypes, function.restype = tuple(POINTER(kind) for kind in types), None
    return loaded


class LatentCausalAttention(torch.autograd.Function):
    """q_BTHK: queries, their last R columns not yet turned. kv_BTHX: keys without position, then values. k_BTR: the rotary
    key, not yet turned. turn_TR: complex64 [T, R/2]. first_BT: `first_seen`, or None. Returns [B, T, H, V]."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, kv_BTHX: Tensor, k_BTR: Tensor, turn_TR: Tensor, scale: float, split: bool, first_BT: Tensor | None
    ) -> Tensor:
        B, T, H, K = q_BTHK.shape
        R = k_BTR.shape[-1]
        V = kv_BTHX.shape[-1] - (K - R)
        q, kv, k = _ready(q_BTHK), _ready(kv_BTHX), _ready(k_BTR[:, :, None])
        out, log_sum = q.new_empty(B, T, H, V), q.new_empty(B, H, T)
        turn = torch.view_as_real(turn_TR.resolve_conj()).contiguous()
        attention = _CausalAttention(
            _heads(q), _heads(kv), _heads(kv, K - R), _heads(k), _heads(out), log_sum.data_ptr(), turn.data_ptr(),
            None if first_BT is None else first_BT.data_ptr(), scale, B, T, H, H, K - R, R, V, split, torch.get_num_threads(),
        )  # fmt: skip
        _library().cadre_causal_attention(byref(attention))
        ctx.save_for_backward(q, kv, k, out, log_sum, turn, first_BT)
        ctx.numbers = scale, split
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, k, out, log_sum, turn, first_BT = ctx.saved_tensors
        (B, T, H, K), R, V = q.shape, k.shape[-1], out.shape[-1]
        grad = _ready(grad_BTHV)
        grad_q, grad_kv, grad_k = torch.empty(q.shape), torch.empty(kv.shape), torch.empty(B, T, H, R)
        attention = _CausalAttention(
            _heads(q), _heads(kv), _heads(kv, K - R), _heads(k), _heads(out), log_sum.data_ptr(), turn.data_ptr(),
            None if first_BT is None else first_BT.data_ptr(), ctx.numbers[0], B, T, H, H, K - R, R, V, ctx.numbers[1],
            torch.get_num_threads(),
        )  # fmt: skip
        gradient = _CausalGradient(_heads(grad), _heads(grad_q), _heads(grad_kv), _heads(grad_kv, K - R), _heads(grad_k))
        _library().cadre_causal_attention_gradient(byref(attention), byref(gradient))
        return grad_q, grad_kv, grad_k.sum(dim=2), None, None, None, None


class GroupedCausalAttention(torch.autograd.Function):
    """q_BTHK, k_BTGK and v_BTGV as they are; every H / G query heads share a key-value head. Returns [B, T, H, V]."""

    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, scale: float, first_BT: Tensor | None) -> Tensor:
        (B, T, H, K), (G, V) = q_BTHK.shape, v_BTGV.shape[2:]
        q, k, v = _ready(q_BTHK), _ready(k_BTGK), _ready(v_BTGV)
        out, log_sum = q.new_empty(B, T, H, V), q.new_empty(B, H, T)
        first = None if first_BT is None else first_BT.data_ptr()
        attention = _CausalAttention(
            _heads(q), _heads(k), _heads(v), _Heads(), _heads(out), log_sum.data_ptr(), None, first, scale,
            B, T, H, G, K, 0, V, False, torch.get_num_threads(),
        )  # fmt: skip
        _library().cadre_causal_attention(byref(attention))
        ctx.save_for_backward(q, k, v, out, log_sum, first_BT)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, first_BT = ctx.saved_tensors
        (B, T, H, K), (G, V) = q.shape, v.shape[2:]
        grad = _ready(grad_BTHV)
        grad_q, grad_k, grad_v = torch.empty(q.shape), torch.empty(k.shape), torch.empty(v.shape)
        first = None if first_BT is None else first_BT.data_ptr()
        attention = _CausalAttention(
            _heads(q), _heads(k), _heads(v), _Heads(), _heads(out), log_sum.data_ptr(), None, first, ctx.scale,
            B, T, H, G, K, 0, V, False, torch.get_num_threads(),
        )  # fmt: skip
        gradient = _CausalGradient(_heads(grad), _heads(grad_q), _heads(grad_k), _heads(grad_v), _Heads())
        _library().cadre_causal_attention_gradient(byref(attention), byref(gradient))
        return grad_q, grad_k, grad_v, None, None
