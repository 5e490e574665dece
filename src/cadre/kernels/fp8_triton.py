"""The products of `kernels.fp8` in Triton. Operands are rounded once, each in the layouts that its products read: tensor cores
take FP8 only with what is added up over adjacent in memory, so weights are kept both ways, and rows turned for the gradient of
weights. Each 128 of a sum are multiplied in the tensor core and added in float32 under their scales, which DeepSeek-V3 promotes
for the same reason (its report, section 3.3.2): the core's own sums keep 14 bits.

Nothing here waits for the card: which rows a tile takes is worked out on it.

Letters in names: R row, rows sorted by expert; E expert; I tile, up to 128 rows of one expert; K width of a row, N of what its
expert makes of it; P padded row, 128 a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cadre.kernels.fp8 import ELEMENT, RUN

_WARPS, _STAGES = 8, 3
# Of a product: rows a program makes, and its warps. By registers two of these fit on a multiprocessor, so that one's sums can
# be added up in float32 while the other multiplies, and one of 128 rows and 8 warps. Counted, not measured.
_PART, _PART_WARPS = 64, 4


@dataclass(frozen=True)
class Tiles:
    """int32. first_I, stop_I: a tile's rows; of the tiles at the end, none. expert_I: whose. tile_E1: an expert's first tile,
    and after the last expert how many there are."""

    first_I: Tensor
    stop_I: Tensor
    expert_I: Tensor
    tile_E1: Tensor

    @classmethod
    def of(cls, rows: int, load_E: Tensor) -> Tiles:
        """As many as any load of so many rows could need."""
        count = rows // RUN + len(load_E)
        stop_E = load_E.cumsum(0)
        tiles_E = (load_E + RUN - 1) // RUN
        end_E = tiles_E.cumsum(0)
        index_I = torch.arange(count, device=load_E.device)
        expert_I = torch.searchsorted(end_E, index_I, right=True)
        real_I = expert_I < len(load_E)
        expert_I = expert_I.clamp(max=len(load_E) - 1)
        first_I = (stop_E - load_E)[expert_I] + (index_I - (end_E - tiles_E)[expert_I]) * RUN
        stop_I = torch.where(real_I, stop_E[expert_I], 0)
        tile_E1 = torch.cat((end_E.new_zeros(1), end_E))
        return cls(*(x.to(torch.int32) for x in (first_I, stop_I, expert_I, tile_E1)))

    def __len__(self) -> int:
        return len(self.first_I)


class Products:
    """The three products with one layer's weights."""

    def __init__(self, w_ENK: Tensor) -> None:
        E, N, K = w_ENK.shape
        runs_n, runs_k = triton.cdiv(N, RUN), triton.cdiv(K, RUN)
        w_ENK = w_ENK.contiguous()
        self.w_ENK = torch.empty_like(w_ENK, dtype=ELEMENT)
        self.w_EKN = self.w_ENK.new_empty(E, K, N)
        self.scale_ENK = w_ENK.new_empty(E, runs_n, runs_k, dtype=torch.float32)
        _round_blocks[(E, runs_n, runs_k)](
            w_ENK, self.w_ENK, self.w_EKN, self.scale_ENK, N, K, runs_n, runs_k, RUN=RUN, num_warps=_WARPS
        )
        self.scale_EKN = self.scale_ENK.transpose(1, 2).contiguous()
        # Of the rows of one pass, the same for all three: working them out takes two dozen launches.
        self.tiles: Tiles | None = None

    def forward(self, x_RK: Tensor, load_E: Tensor) -> Tensor:
        self.tiles = Tiles.of(len(x_RK), load_E)
        return _rows_by_experts(x_RK, self.tiles, self.w_ENK, self.scale_ENK)

    def input_gradient(self, grad_RN: Tensor, load_E: Tensor) -> Tensor:
        return _rows_by_experts(grad_RN, self.tiles or Tiles.of(len(grad_RN), load_E), self.w_EKN, self.scale_EKN)

    def weight_gradient(self, grad_RN: Tensor, x_RK: Tensor, load_E: Tensor) -> Tensor:
        tiles = self.tiles or Tiles.of(len(x_RK), load_E)
        grad_NP, grad_scale_NI = _rounded_turned(grad_RN, tiles)
        x_KP, x_scale_KI = _rounded_turned(x_RK, tiles)
        E, N, K = len(load_E), len(grad_NP), len(x_KP)
        out_ENK = x_RK.new_empty(E, N, K, dtype=torch.float32)
        _multiply_turned[(E, triton.cdiv(N, _PART), triton.cdiv(K, RUN))](
            grad_NP, grad_scale_NI, x_KP, x_scale_KI, tiles.tile_E1, out_ENK, N, K, len(tiles), RUN=RUN, **_launch()
        )
        return out_ENK


def _launch() -> dict[str, Any]:
    return {"PART": _PART, "num_warps": _PART_WARPS, "num_stages": _STAGES}


def _rows_by_experts(x_RK: Tensor, tiles: Tiles, w_ENK: Tensor, scale_ENK: Tensor) -> Tensor:
    """[R, N] in x's dtype."""
    (R, K), N, runs = x_RK.shape, w_ENK.shape[1], scale_ENK.shape[2]
    rounded_RK = torch.empty_like(x_RK, dtype=ELEMENT)
    scale_RG = x_RK.new_empty(R, runs, dtype=torch.float32)
    out_RN = x_RK.new_empty(R, N)
    if R:
        _round_rows[(triton.cdiv(R, RUN), runs)](x_RK, rounded_RK, scale_RG, R, K, runs, RUN=RUN, num_warps=_WARPS)
        _multiply_rows[(len(tiles) * (RUN // _PART), triton.cdiv(N, RUN))](
            rounded_RK, scale_RG, w_ENK, scale_ENK, tiles.first_I, tiles.stop_I, tiles.expert_I, out_RN, N, K,
            triton.cdiv(N, RUN), runs, RUN=RUN, **_launch(),
        )  # fmt: skip
    return out_RN


def _rounded_turned(x_RC: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """[C, P] in FP8, each column of a tile under one scale, and the scales [C, I]."""
    C, count = x_RC.shape[1], len(tiles)
    rounded_CP = x_RC.new_empty(C, count * RUN, dtype=ELEMENT)
    scale_CI = x_RC.new_empty(C, count, dtype=torch.float32)
    _round_turned[(count, triton.cdiv(C, RUN))](
        x_RC, rounded_CP, scale_CI, tiles.first_I, tiles.stop_I, C, count, RUN=RUN, num_warps=_WARPS
    )
    return rounded_CP, scale_CI


@triton.jit
def _size(value):
    """The bits of |value|: integers in the order of sizes, infinity and NaN last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(most):
    """The scale that `kernels.fp8.exponent_of` gives a run, of whose sizes `most` is the largest: a float32 that is nothing but
    an exponent, 8 below that of `most`, or 7 where its first digits are beyond those of 448."""
    exponent = tl.maximum((most >> 23) - 8 + ((most & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    exponent = tl.where(most < 0x7F800000, exponent, 255)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(scale):
    """One over a scale, exactly, which a card's own division need not be; of an infinite one 0."""
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    return (tl.where(exponent < 255, 254 - exponent, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(value):
    """E4M3 of sizes up to 448, to nearest, ties to even. It is rounded to a multiple of its last place by a large number that
    is added and taken away, so that the cast has nothing left to round: Triton's interpreter forgets to carry there."""
    exponent = tl.maximum(_size(value) >> 23, 127 - 6)
    large = ((exponent - 3 + 23 << 23) | 0x400000).to(tl.float32, bitcast=True)
    return ((value + large) - large).to(tl.float8e4nv)


@triton.jit
def _round_rows(x, rounded, scale, R, K, runs, RUN: tl.constexpr):
    row = tl.program_id(0) * RUN + tl.arange(0, RUN)
    run = tl.program_id(1)
    column = run * RUN + tl.arange(0, RUN)
    inside = (row < R)[:, None] & (column < K)[None, :]
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    own = _scale(tl.max(_size(value), axis=1))
    tl.store(rounded + at, _narrow(value * _inverse(own)[:, None]), mask=inside)
    tl.store(scale + row.to(tl.int64) * runs + run, own, mask=row < R)


@triton.jit
def _round_turned(x, rounded, scale, first, stop, C, tiles, RUN: tl.constexpr):
    tile = tl.program_id(0)
    row = tl.load(first + tile) + tl.arange(0, RUN)
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)
    inside = (row < tl.load(stop + tile))[:, None] & (column < C)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
    own = _scale(tl.max(_size(value), axis=0))
    turned = tl.trans(_narrow(value * _inverse(own)[None, :]))
    padded = tile * RUN + tl.arange(0, RUN)
    at = column.to(tl.int64)[:, None] * (tiles * RUN) + padded[None, :]
    tl.store(rounded + at, turned, mask=(column < C)[:, None] & (padded < tiles * RUN)[None, :])
    tl.store(scale + column.to(tl.int64) * tiles + tile, own, mask=column < C)


@triton.jit
def _round_blocks(w, rounded, turned, scale, N, K, runs_n, runs_k, RUN: tl.constexpr):
    expert, over_n, over_k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    n = over_n * RUN + tl.arange(0, RUN)
    k = over_k * RUN + tl.arange(0, RUN)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = expert * N * K + n[:, None] * K + k[None, :]
    value = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    own = _scale(tl.max(tl.max(_size(value), axis=1), axis=0))
    narrow = _narrow(value * _inverse(own))
    tl.store(rounded + at, narrow, mask=inside)
    tl.store(turned + expert * N * K + k[:, None] * N + n[None, :], tl.trans(narrow), mask=tl.trans(inside))
    tl.store(scale + (expert * runs_n + over_n) * runs_k + over_k, own)


@triton.jit
def _multiply_rows(
    x, x_scale, w, w_scale, first, stop, experts, out, N, K, runs_n, runs_k, RUN: tl.constexpr, PART: tl.constexpr
):
    tile, over_n = tl.program_id(0) // (RUN // PART), tl.program_id(1)
    last = tl.load(stop + tile)
    begin = tl.load(first + tile) + tl.program_id(0) % (RUN // PART) * PART
    row = begin + tl.arange(0, PART)
    expert = tl.load(experts + tile).to(tl.int64)
    n = over_n * RUN + tl.arange(0, RUN)
    k = tl.arange(0, RUN)
    x_at = row.to(tl.int64)[:, None] * K + k[None, :]
    w_at = expert * N * K + n[:, None] * K + k[None, :]
    total = tl.zeros((PART, RUN), dtype=tl.float32)
    if begin < last:
        for run in range(0, runs_k):
            in_run = (run * RUN + k < K)[None, :]
            part_x = tl.load(x + x_at + run * RUN, mask=(row < last)[:, None] & in_run, other=0.0)
            part_w = tl.load(w + w_at + run * RUN, mask=(n < N)[:, None] & in_run, other=0.0)
            own_x = tl.load(x_scale + row.to(tl.int64) * runs_k + run, mask=row < last, other=0.0)
            own_w = tl.load(w_scale + (expert * runs_n + over_n) * runs_k + run)
            total += tl.dot(part_x, tl.trans(part_w), out_dtype=tl.float32) * (own_x * own_w)[:, None]
        inside = (row < last)[:, None] & (n < N)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_turned(y, y_scale, x, x_scale, tile_of, out, N, K, tiles, RUN: tl.constexpr, PART: tl.constexpr):
    expert, over_n, over_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = over_n * PART + tl.arange(0, PART)
    k = over_k * RUN + tl.arange(0, RUN)
    lane = tl.arange(0, RUN)
    begin = tl.load(tile_of + expert)
    y_at = y + n.to(tl.int64)[:, None] * (tiles * RUN) + (begin * RUN + lane)[None, :]
    x_at = x + k.to(tl.int64)[:, None] * (tiles * RUN) + (begin * RUN + lane)[None, :]
    total = tl.zeros((PART, RUN), dtype=tl.float32)
    for tile in range(begin, tl.load(tile_of + expert + 1)):
        part_y = tl.load(y_at, mask=(n < N)[:, None], other=0.0)
        part_x = tl.load(x_at, mask=(k < K)[:, None], other=0.0)
        y_at += RUN
        x_at += RUN
        own_y = tl.load(y_scale + n.to(tl.int64) * tiles + tile, mask=n < N, other=0.0)
        own_x = tl.load(x_scale + k.to(tl.int64) * tiles + tile, mask=k < K, other=0.0)
        total += tl.dot(part_y, tl.trans(part_x), out_dtype=tl.float32) * own_y[:, None] * own_x[None, :]
    at = expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(out + at, total, mask=(n < N)[:, None] & (k < K)[None, :])
