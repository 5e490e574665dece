"""Causal attention over whole sequences, for query-key and value heads of unequal width, grouped heads, and the expanded heads
of latent attention.

Letters in names: B batch, T position, H query head, G key-value head, K query-key width, V value width; of latent attention N
the part of K without position, R the rotary part, X = N + V what a latent expands to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.kernels.native.causal import GroupedCausalAttention, LatentCausalAttention, first_seen, takes
from cadre.kernels.rotary import rotate_halves, rotate_pairs


def attention_mask(length: int, document_BT: Tensor | None, device: torch.device) -> Tensor:
    """What each position may see: itself and earlier ones, of its own document if documents are given. bool [B|1, T, T]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
    if document_BT is None:
        return causal
    return causal & (document_BT[:, :, None] == document_BT[:, None, :])


def causal_attention_reference(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T, causal) v written out; [B, T, H, V] in v's dtype, softmax in float32."""
    repeat = q_BTHK.shape[2] // k_BTGK.shape[2]
    k_BTHK = k_BTGK.repeat_interleave(repeat, dim=2)
    v_BTHV = v_BTGV.repeat_interleave(repeat, dim=2)
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK).float() * scale
    mask = attention_mask(q_BTHK.shape[1], document_BT, q_BTHK.device)
    weight_BHTS = score_BHTS.masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshv->bthv", weight_BHTS.to(v_BTHV.dtype), v_BTHV)


def causal_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """As the reference: our kernel in float32 on a CPU, torch's fused attention elsewhere. Documents are stretches: positions
    of one are adjacent.

    torch's fused CPU kernel takes equal widths only, so a narrower value is padded with zeros, which costs less than the
    unfused path torch would fall back to.
    """
    if takes(q_BTHK, k_BTGK, v_BTGV):
        first_BT = None if document_BT is None else first_seen(document_BT)
        return GroupedCausalAttention.apply(q_BTHK, k_BTGK, v_BTGV, scale, first_BT)
    K, V = q_BTHK.shape[-1], v_BTGV.shape[-1]
    if V < K:
        v_BTGV = F.pad(v_BTGV, (0, K - V))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGV))
    grouped = q.shape[1] != k.shape[1]
    if document_BT is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        mask = attention_mask(q.shape[2], document_BT, q.device)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)[..., :V]


def latent_attention_reference(
    q_BTHK: Tensor, kv_BTHX: Tensor, k_BTR: Tensor, turn_TR: Tensor, scale: float, interleaved: bool,
    document_BT: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of latent attention's expanded heads (DeepSeek-V2 report, equations 14-18): [B, T, H, V].

    q_BTHK: queries, their last R columns still to be turned by position. kv_BTHX: a head's keys without position, then its
    values. k_BTR: the rotary key all heads share, still to be turned. turn_TR: complex64 [T, R/2] of `RotaryTable`.
    interleaved: pairs are (2i, 2i+1), not (i, i + R/2).
    """
    return causal_attention_reference(*_expanded(q_BTHK, kv_BTHX, k_BTR, turn_TR, interleaved), scale, document_BT)


def latent_attention(
    q_BTHK: Tensor, kv_BTHX: Tensor, k_BTR: Tensor, turn_TR: Tensor, scale: float, interleaved: bool,
    document_BT: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference. Our kernel turns and joins the parts as it reads them."""
    if takes(q_BTHK, kv_BTHX, k_BTR):
        first_BT = None if document_BT is None else first_seen(document_BT)
        return LatentCausalAttention.apply(q_BTHK, kv_BTHX, k_BTR, turn_TR, scale, not interleaved, first_BT)
    return causal_attention(*_expanded(q_BTHK, kv_BTHX, k_BTR, turn_TR, interleaved), scale, document_BT)


def _expanded(
    q_BTHK: Tensor, kv_BTHX: Tensor, k_BTR: Tensor, turn_TR: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every head."""
    rotate = rotate_pairs if interleaved else rotate_halves
    R = k_BTR.shape[-1]
    N = q_BTHK.shape[-1] - R
    q_BTHN, q_BTHR = q_BTHK.split((N, R), dim=-1)
    k_BTHN, v_BTHV = kv_BTHX.split((N, kv_BTHX.shape[-1] - N), dim=-1)
    k_BTHR = rotate(k_BTR[:, :, None], turn_TR).expand(-1, -1, q_BTHK.shape[2], -1)
    return torch.cat((q_BTHN, rotate(q_BTHR, turn_TR)), dim=-1), torch.cat((k_BTHN, k_BTHR), dim=-1), v_BTHV
