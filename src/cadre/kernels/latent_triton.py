"""Absorbed latent attention of a few tokens over the pool's pages, whichever sequences they are of (V2 report, section 2.1.2).

Letters in names: T token, H head, C latent width, R rotary width, N page, P position in a page, B sequence, I part of a
sequence, S position of a block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a program works on: heads, and positions at a time, of which the next are on their way.
HEADS, POSITIONS = 16, 32
LAUNCH = {"num_warps": 4, "num_stages": 2}
# Programs that are to run at least, two for each multiprocessor of a large card: few tokens are cut into parts of their
# positions, each of so many at least, whose averages are joined at last, so many at a time.
_PROGRAMS, _LEAST_PART, JOINED = 264, 64, 16


def latent_decode(
    q_THC: Tensor, q_THR: Tensor, latent_NPC: Tensor, key_NPR: Tensor, page_BP: Tensor, row_T: Tensor, seen_T: Tensor,
    scale: float, stop: int,
) -> Tensor:  # fmt: skip
    """Each head's average of the latents that its token sees, weighted by the softmax of its scores: [T, H, C] in their dtype.

    q_THC: folded queries, q_THR: turned ones, both contiguous and of the latents' dtype, in which they are multiplied and
    summed in float32 (of 512 in float32 a program would not hold so many). page_BP: int32, the pages of each sequence. row_T:
    int32, whose a token is. seen_T: int32, how many positions it sees, itself included, at least 1 and at most `stop`. What
    pages hold beyond that may be anything.
    """
    (T, H, C), R = q_THC.shape, q_THR.shape[-1]
    groups = triton.cdiv(H, HEADS)
    parts = max(1, min(_PROGRAMS // (T * groups), triton.cdiv(stop, _LEAST_PART)))
    average_THIC = torch.empty(T, H, parts, C, dtype=torch.float32, device=q_THC.device)
    lse_THI = torch.empty(T, H, parts, dtype=torch.float32, device=q_THC.device)
    out_THC = torch.empty_like(q_THC)
    block_c, block_r = (max(16, triton.next_power_of_2(width)) for width in (C, R))  # the least that a tensor core multiplies
    _attend[(T, groups, parts)](
        q_THC, q_THR, latent_NPC, key_NPR, page_BP, row_T, seen_T, average_THIC, lse_THI, scale / math.log(2), H,
        page_BP.stride(0), parts, C=C, R=R, P=latent_NPC.shape[1], BH=HEADS, BS=POSITIONS, BC=block_c, BR=block_r,
        **LAUNCH,
    )  # fmt: skip
    _join[(T * H,)](average_THIC, lse_THI, out_THC, parts, C=C, BI=JOINED, BC=block_c, num_warps=4)
    return out_THC


# What grows as sequences do is not compiled for anew.
@triton.jit(do_not_specialize=["pages_stride", "parts"])
def _attend(
    q, qr, latent, key, pages, row, seen, average, lse, scale, H, pages_stride, parts,
    C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    t, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    c, r, s = tl.arange(0, BC), tl.arange(0, BR), tl.arange(0, BS)
    own_h = h < H
    count = tl.load(seen + t)
    table = pages + tl.load(row + t).to(tl.int64) * pages_stride
    each = tl.cdiv(tl.cdiv(count, parts), BS) * BS
    begin = part * each
    end = tl.minimum(begin + each, count)
    q_HC = tl.load(q + (t * H + h)[:, None] * C + c[None, :], mask=own_h[:, None] & (c < C)[None, :], other=0.0)
    q_HR = tl.load(qr + (t * H + h)[:, None] * R + r[None, :], mask=own_h[:, None] & (r < R)[None, :], other=0.0)
    most = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    sum_HC = tl.zeros((BH, BC), tl.float32)
    for start in range(begin, end, BS):
        at = start + s
        real = at < end
        slot = tl.load(table + at // P, mask=real, other=0).to(tl.int64) * P + at % P
        k_SC = tl.load(latent + slot[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
        k_SR = tl.load(key + slot[:, None] * R + r[None, :], mask=real[:, None] & (r < R)[None, :], other=0.0)
        score = tl.dot(q_HC, tl.trans(k_SC), input_precision="ieee")
        score = tl.dot(q_HR, tl.trans(k_SR), score, input_precision="ieee") * scale
        score = tl.where(real[None, :], score, float("-inf"))
        new = tl.maximum(most, tl.max(score, axis=1))
        shrink, p = tl.exp2(most - new), tl.exp2(score - new[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        sum_HC = tl.dot(p.to(k_SC.dtype), k_SC, sum_HC * shrink[:, None], input_precision="ieee")
        most = new
    place = (t * H + h) * parts + part
    # A part without positions counts for nothing.
    tl.store(lse + place, tl.where(begin < end, most + tl.log2(total), float("-inf")), mask=own_h)
    sum_HC = sum_HC / tl.where(begin < end, total, 1.0)[:, None]
    tl.store(average + place[:, None] * C + c[None, :], sum_HC, mask=own_h[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _join(average, lse, out, parts, C: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    i, c = tl.arange(0, BI), tl.arange(0, BC)
    most = tl.load(lse + head * parts)  # of the first part, which is never without positions
    total = 0.0
    sum_C = tl.zeros((BC,), tl.float32)
    for start in range(0, parts, BI):
        inside = start + i < parts
        own = tl.load(lse + head * parts + start + i, mask=inside, other=float("-inf"))
        new = tl.maximum(most, tl.max(own, axis=0))
        shrink, weight = tl.exp2(most - new), tl.exp2(own - new)
        at = average + (head * parts + start + i)[:, None] * C + c[None, :]
        x = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        sum_C = sum_C * shrink + tl.sum(x * weight[:, None], axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        most = new
    tl.store(out + head * C + c, (sum_C / total).to(out.dtype.element_ty), mask=c < C)
