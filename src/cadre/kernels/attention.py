"""Causal attention over whole sequences, for query-key and value heads of unequal width and grouped heads.

Letters in names: B batch, T position, H query head, G key-value head, K query-key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """As the reference, through torch's fused attention.

    The fused CPU kernel takes equal widths only, so a narrower value is padded with zeros, which costs less than the
    unfused path torch would fall back to.
    """
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
