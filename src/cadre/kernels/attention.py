"""Causal attention for query-key and value heads of unequal width, grouped heads, and the expanded heads of latent attention.
The queries are those of the last T of S positions: of all, or of a chunk that continues what was read before.

Letters in names: B batch, T position with a query, S position, H query head, G key-value head, K query-key width, V value
width; of latent attention N the part of K without position, R the rotary part, X = N + V what a latent expands to.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cadre.kernels.card import launches
from cadre.kernels.native.causal import GroupedCausalAttention, LatentCausalAttention, attention_kernel_takes, first_seen
from cadre.kernels.rotary import rotate_halves, rotate_pairs

# Queries per block in `largest_logits`: bounds the logits held at once.
_QUERIES = 512
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_mask(queries: int, positions: int, document_BS: Tensor | None, device: torch.device) -> Tensor:
    """What each of the last T of S positions may see: itself and earlier ones, of its own document if documents are given.
    bool [B|1, T, S]."""
    causal = torch.ones(queries, positions, dtype=torch.bool, device=device).tril(positions - queries)[None]
    if document_BS is None:
        return causal
    return causal & (document_BS[:, -queries:, None] == document_BS[:, None, :])


def _first_seen(q_BTHK: Tensor, document_BS: Tensor | None) -> Tensor | None:
    """What the kernel knows documents by: int32 [B, T]."""
    if document_BS is None:
        return None
    return first_seen(document_BS.expand(len(q_BTHK), -1))[:, -q_BTHK.shape[1] :].contiguous()


def causal_attention_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, document_BS: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T, causal) v written out; [B, T, H, V] in v's dtype, softmax in float32."""
    repeat = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK = k_BSGK.repeat_interleave(repeat, dim=2)
    v_BSHV = v_BSGV.repeat_interleave(repeat, dim=2)
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK).float() * scale
    mask = attention_mask(q_BTHK.shape[1], k_BSGK.shape[1], document_BS, q_BTHK.device)
    weight_BHTS = score_BHTS.masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshv->bthv", weight_BHTS.to(v_BSHV.dtype), v_BSHV)


@torch.no_grad()
def largest_logits(q_BTHK: Tensor, k_BSGK: Tensor, scale: float, document_BS: Tensor | None = None) -> Tensor:
    """Each head's largest logit, scaled and of what its query may see: float32 [H]. A head and some queries at a time."""
    (_, T, H), S = q_BTHK.shape[:3], k_BSGK.shape[1]
    peak_H = q_BTHK.new_full((H,), float("-inf"), dtype=torch.float32)
    for begin in range(0, T, _QUERIES):
        end = min(begin + _QUERIES, T)
        stop = S - T + end  # none of them sees further
        unseen = ~attention_mask(end - begin, stop, None if document_BS is None else document_BS[:, :stop], q_BTHK.device)
        for head in range(H):
            key_BSK = k_BSGK[:, :stop, head // (H // k_BSGK.shape[2])].float()
            logit = q_BTHK[:, begin:end, head].float() @ key_BSK.transpose(1, 2)
            peak_H[head] = torch.maximum(peak_H[head], logit.masked_fill_(unseen, float("-inf")).amax() * scale)
    return peak_H


def causal_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, document_BS: Tensor | None = None, narrow: bool = False,
    peak_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference: our kernel in float32 on a CPU, torch's fused attention elsewhere. Documents are stretches: positions
    of one are adjacent. `narrow`, for our kernel: as in `kernels.linear`. peak_H: raised to each head's `largest_logits`, which
    our kernel has at hand and torch's would not tell.

    torch's fused CPU kernel takes equal widths only, so a narrower value is padded with zeros, which costs less than the
    unfused path torch would fall back to.
    """
    if attention_kernel_takes(q_BTHK, k_BSGK, v_BSGV):
        first_BT = _first_seen(q_BTHK, document_BS)
        return GroupedCausalAttention.apply(q_BTHK, k_BSGK, v_BSGV, scale, first_BT, narrow, peak_H)
    if peak_H is not None and len(q_BTHK):
        torch.maximum(peak_H, largest_logits(q_BTHK, k_BSGK, scale, document_BS), out=peak_H)
    K, V = q_BTHK.shape[-1], v_BSGV.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    grouped = q.shape[1] != k.shape[1]
    whole = document_BS is None and q.shape[2] == k.shape[2]
    # cuDNN makes a plan for each shape it meets, and every prompt is a new one; and under a mask its gradients of queries may
    # be NaN (pytorch/pytorch#196678).
    cudnn = whole and torch.is_grad_enabled()
    if V < K and not (cudnn and _takes_narrow_values(q, k, v, grouped)):
        v = F.pad(v, (0, K - V))
    with nullcontext() if cudnn or not q.is_cuda else sdpa_kernel(_WITHOUT_CUDNN):
        if whole:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        else:
            mask = attention_mask(q.shape[2], k.shape[2], document_BS, q.device)[:, None]
            if grouped and q.is_cuda:  # the kernel that takes a mask takes no groups
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
                grouped = False
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)[..., :V]


def _takes_narrow_values(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """Whether torch may take its cuDNN kernel, Hopper's first choice, which wants no padding. Padded, 192 and 128 of DeepSeek's
    heads would be 192 and 192, whose gradient not every cuDNN has."""
    if not (launches(q, k, v) and torch.backends.cuda.cudnn_sdp_enabled()):
        return False
    return torch.backends.cuda.can_use_cudnn_attention(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, grouped))


def latent_attention_reference(
    q_BTHK: Tensor, kv_BSHX: Tensor, k_BSR: Tensor, turn_SR: Tensor | None, scale: float, interleaved: bool,
    document_BS: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of latent attention's expanded heads (DeepSeek-V2 report, equations 14-18): [B, T, H, V].

    kv_BSHX: a head's keys without position, then its values. k_BSR: the rotary key that all heads share. turn_SR: complex64
    [S, R/2] of `RotaryTable`, by which it and the last R columns of q_BTHK are to be turned; None if they are. interleaved:
    pairs are (2i, 2i+1), not (i, i + R/2).
    """
    return causal_attention_reference(*_joined(q_BTHK, kv_BSHX, k_BSR, turn_SR, interleaved), scale, document_BS)


def latent_attention(
    q_BTHK: Tensor, kv_BSHX: Tensor, k_BSR: Tensor, turn_SR: Tensor | None, scale: float, interleaved: bool,
    document_BS: Tensor | None = None, narrow: bool = False, peak_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference; peak_H as in `causal_attention`. Our kernel turns and joins the parts as it reads them."""
    if attention_kernel_takes(q_BTHK, kv_BSHX, k_BSR):
        first_BT = _first_seen(q_BTHK, document_BS)
        return LatentCausalAttention.apply(q_BTHK, kv_BSHX, k_BSR, turn_SR, scale, not interleaved, first_BT, narrow, peak_H)
    joined = _joined(q_BTHK, kv_BSHX, k_BSR, turn_SR, interleaved)
    return causal_attention(*joined, scale, document_BS, peak_H=peak_H)


def _joined(
    q_BTHK: Tensor, kv_BSHX: Tensor, k_BSR: Tensor, turn_SR: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every head."""
    R = k_BSR.shape[-1]
    N = q_BTHK.shape[-1] - R
    k_BSGR = k_BSR[:, :, None]
    if turn_SR is not None:
        rotate = rotate_pairs if interleaved else rotate_halves
        q_BTHN, q_BTHR = q_BTHK.split((N, R), dim=-1)
        q_BTHK = torch.cat((q_BTHN, rotate(q_BTHR, turn_SR[-q_BTHK.shape[1] :])), dim=-1)
        k_BSGR = rotate(k_BSGR, turn_SR)
    k_BSHN, v_BSHV = kv_BSHX.split((N, kv_BSHX.shape[-1] - N), dim=-1)
    return q_BTHK, torch.cat((k_BSHN, k_BSGR.expand(-1, -1, q_BTHK.shape[2], -1)), dim=-1), v_BSHV
