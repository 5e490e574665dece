"""Latent attention and its baseline, grouped-query attention.

Letters in names: B batch, T new position, S position seen (cached ones and new ones), D hidden, H query head, G key-value
head, N query-key width without position, R rotary width, K = N + R, V value width, C latent width, X the width of what a
cache keeps, one or two dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from cadre.kernels.attention import causal_attention, latent_attention
from cadre.kernels.rotary import rotate_halves, rotate_pairs
from cadre.model.config import ModelConfig
from cadre.model.layers import Linear, RMSNorm
from cadre.model.rope import softmax_scale

# q_a_layernorm and kv_a_layernorm ignore rms_norm_eps in transformers and in DeepSeek's code.
LATENT_NORM_EPS = 1e-6

# Averages of latents [T, H, C] from folded queries [T, H, C], turned ones [T, H, R] and a scale.
Averages = Callable[[Tensor, Tensor, float], Tensor]


class LayerCache(Protocol):
    """What attention asks of a cache: keep two tensors per position of one layer. The T new positions are those of one or
    several sequences, one after the other; with a cache the batch is 1."""

    def append(self, first_TX: Tensor, second_TX: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Keep the new positions. For each sequence in turn: its own among the T, and all it has seen: [S, X] twice."""

    def averages(self, latent_TC: Tensor, key_TR: Tensor) -> Averages | None:
        """Where one kernel attends for the few new positions of all sequences: keep these, and give what it makes of queries.
        Else None, and nothing is kept."""
        return None


class _Watched(nn.Module):
    """peak_H: raised to each head's largest logit whenever the module is trained; None: nobody asks (train/qk_clip.py)."""

    peak_H: Tensor | None = None

    @property
    def watched_peak_H(self) -> Tensor | None:
        return self.peak_H if self.training else None


class LatentAttention(_Watched):
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1): all that the cache ever keeps of a token is one
    latent of `kv_lora_rank` and one rotary key of `qk_rope_head_dim`, shared by all heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope = config.qk_nope_head_dim or 0
        self.rotary = config.qk_rope_head_dim or 0
        self.value = config.v_head_dim or 0
        self.latent = config.kv_lora_rank or 0
        self.scale = softmax_scale(config)
        self.interleaved = config.rope_interleave
        self.narrow = False
        hidden, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, self.heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.qk_head_dim)
        self.low_rank_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.rotary, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, hidden, bias=bias)

    def compress(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The latent [B, T, C] and the rotary key [B, T, R] of each token (equations 9 and 15), the key not yet turned."""
        latent_BTC, k_BTR = self.kv_a_proj_with_mqa(x_BTD).split((self.latent, self.rotary), dim=-1)
        return self.kv_a_layernorm(latent_BTC), k_BTR

    def queries(self, x_BTD: Tensor) -> Tensor:
        """Queries [B, T, H, N + R] (equations 12-14), their last R columns not yet turned."""
        if self.low_rank_query:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        else:
            q = self.q_proj(x_BTD)
        return q.unflatten(-1, (self.heads, -1))

    def rotate(self, x_BTHR: Tensor, turn_TR: Tensor) -> Tensor:
        return rotate_pairs(x_BTHR, turn_TR) if self.interleaved else rotate_halves(x_BTHR, turn_TR)

    def forward(
        self, x_BTD: Tensor, turn_TR: Tensor, cache: LayerCache | None = None, document_BT: Tensor | None = None
    ) -> Tensor:
        latent_BTC, k_BTR = self.compress(x_BTD)
        q_BTHK = self.queries(x_BTD)
        if cache is None:
            kv_BTHX = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1))
            out_BTHV = latent_attention(
                q_BTHK, kv_BTHX, k_BTR, turn_TR, self.scale, self.interleaved, document_BT, self.narrow, self.watched_peak_H
            )
        else:
            q_BTHN, q_BTHR = q_BTHK.split((self.nope, self.rotary), dim=-1)
            k_TR, q_BTHR = self.rotate(k_BTR[:, :, None], turn_TR)[0, :, 0], self.rotate(q_BTHR, turn_TR)
            averages = cache.averages(latent_BTC[0], k_TR)
            if averages is not None:
                out_BTHV = self.unfold(averages(self.fold(q_BTHN)[0], q_BTHR[0], self.scale)[None])
            else:
                out_BTHV = self.cached(q_BTHN, q_BTHR, cache.append(latent_BTC[0], k_TR))
        return self.o_proj(out_BTHV.flatten(-2))

    def cached(self, q_BTHN: Tensor, q_BTHR: Tensor, sequences: Iterator[tuple[slice, Tensor, Tensor]]) -> Tensor:
        """Each sequence the cheaper way. [1, T, H, V]."""
        parts = [(rows, latent_SC[None], k_SR[None]) for rows, latent_SC, k_SR in sequences]
        pays = [self.expanding_pays(rows.stop - rows.start, latent.shape[1]) for rows, latent, _ in parts]
        if not any(pays):
            # Folding for all sequences at once reads the weight once.
            q_BTHC = self.fold(q_BTHN)
            out_BTHC = [self.attend(q_BTHC[:, rows], q_BTHR[:, rows], latent, k) for rows, latent, k in parts]
            return self.unfold(torch.cat(out_BTHC, dim=1))
        ways = (self.expanded if expand else self.absorbed for expand in pays)
        out_BTHV = [way(q_BTHN[:, own], q_BTHR[:, own], latent, k) for way, (own, latent, k) in zip(ways, parts, strict=True)]
        return torch.cat(out_BTHV, dim=1)

    def expanding_pays(self, new: int, seen: int) -> bool:
        """Whether to expand what was seen rather than absorb into what is new: by multiply-adds of a head, and always for
        a sequence without a past, whose attention is fused."""
        expand = (seen - new) * self.latent * (self.nope + self.value)
        return expand + new * seen * (self.nope + self.value - 2 * self.latent) < 0 or new == seen

    def expanded(self, q_BTHN: Tensor, q_BTHR: Tensor, latent_BSC: Tensor, k_BSR: Tensor) -> Tensor:
        """Many tokens: expand the latents to keys and values of every head, then ordinary causal attention. The queries are
        those of the last positions."""
        kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.heads, -1))
        q_BTHK = torch.cat((q_BTHN, q_BTHR), dim=-1)
        return latent_attention(q_BTHK, kv_BSHX, k_BSR, None, self.scale, self.interleaved, narrow=self.narrow)

    def absorbed(self, q_BTHN: Tensor, q_BTHR: Tensor, latent_BSC: Tensor, k_BSR: Tensor) -> Tensor:
        """Few tokens: fold the expansion into the query and the output (V2 report, section 2.1.2), so that attention reads
        the latents as they are and never expands them. The last T of the S positions are the queries' own."""
        return self.unfold(self.attend(self.fold(q_BTHN), q_BTHR, latent_BSC, k_BSR))

    def _expansion(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What makes keys [H, N, C] and values [H, V, C] of latents."""
        weight_HNVC = self.kv_b_proj.weight.to(dtype).view(self.heads, self.nope + self.value, self.latent)
        k_HNC, v_HVC = weight_HNVC.split((self.nope, self.value), dim=1)
        return k_HNC, v_HVC

    def fold(self, q_BTHN: Tensor) -> Tensor:
        """Queries that meet latents instead of keys: [B, T, H, C]."""
        return torch.einsum("bthn,hnc->bthc", q_BTHN, self._expansion(q_BTHN.dtype)[0])

    def unfold(self, out_BTHC: Tensor) -> Tensor:
        """Values [B, T, H, V] from averages of latents."""
        return torch.einsum("bthc,hvc->bthv", out_BTHC, self._expansion(out_BTHC.dtype)[1])

    def attend(self, q_BTHC: Tensor, q_BTHR: Tensor, latent_BSC: Tensor, k_BSR: Tensor) -> Tensor:
        """Each head's average of the latents [B, T, H, C], weighted by the softmax of its scores."""
        # Two products into one score: joining the two parts of the keys would copy the whole cache at every token.
        latent_score = torch.bmm(q_BTHC.flatten(1, 2), latent_BSC.transpose(1, 2))
        score_BTHS = torch.baddbmm(latent_score, q_BTHR.flatten(1, 2), k_BSR.transpose(1, 2)).float().mul_(self.scale)
        new, seen = q_BTHC.shape[1], latent_BSC.shape[1]
        if new > 1:
            ahead_TS = torch.ones(new, seen, dtype=torch.bool, device=q_BTHC.device).triu_(seen - new + 1)
            score_BTHS.masked_fill_(ahead_TS.repeat_interleave(self.heads, dim=0), float("-inf"))
        out_BTHC = torch.bmm(score_BTHS.softmax(dim=-1).to(latent_BSC.dtype), latent_BSC)
        return out_BTHC.unflatten(1, (new, self.heads))


class GroupedQueryAttention(_Watched):
    """The baseline: every group of query heads shares one key-value head (arXiv 2305.13245). As many key-value heads as
    heads is MHA, one is MQA. The cache keeps keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads or 1
        self.rotary = config.rotary_dim
        self.scale = softmax_scale(config)
        self.narrow = False
        width, bias = config.head_dim or 0, config.attention_bias
        self.q_proj = Linear(config.hidden_size, self.heads * width, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.groups * width, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.groups * width, bias=bias)
        self.o_proj = Linear(self.heads * width, config.hidden_size, bias=config.output_bias)
        self.norms_together = config.qk_norm == "all"
        normed = [heads * width if self.norms_together else width for heads in (self.heads, self.groups)]
        self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) if config.use_qk_norm else None for size in normed)

    def forward(
        self, x_BTD: Tensor, turn_TR: Tensor, cache: LayerCache | None = None, document_BT: Tensor | None = None
    ) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = self.projected(x_BTD, turn_TR)
        if cache is None:
            out_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, self.scale, document_BT, self.narrow, self.watched_peak_H)
        else:
            sequences = cache.append(k_BTGK[0], v_BTGK[0])
            out_BTHK = torch.cat([self.continued(q_BTHK[:, rows], k[None], v[None]) for rows, k, v in sequences], dim=1)
        return self.o_proj(out_BTHK.flatten(-2))

    def projected(self, x_BTD: Tensor, turn_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, K] and keys [B, T, G, K], turned, and values [B, T, G, K]."""
        q_BTX, k_BTX = self.q_proj(x_BTD), self.k_proj(x_BTD)
        if self.q_norm is not None and self.k_norm is not None and self.norms_together:
            q_BTX, k_BTX = self.q_norm(q_BTX), self.k_norm(k_BTX)
        q_BTHK, k_BTGK = q_BTX.unflatten(-1, (self.heads, -1)), k_BTX.unflatten(-1, (self.groups, -1))
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (self.groups, -1))
        if self.q_norm is not None and self.k_norm is not None and not self.norms_together:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        return rotate_halves(q_BTHK, turn_TR), rotate_halves(k_BTGK, turn_TR), v_BTGK

    def continued(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """The T new positions attend to all S, themselves last. A single one's heads share the keys of their group without
        copying them, which the fused kernel is slower at."""
        if q_BTHK.shape[1] > 1:
            return causal_attention(q_BTHK, k_BSGK, v_BSGK, self.scale, narrow=self.narrow)
        q_BGXK = q_BTHK[:, 0].unflatten(1, (self.groups, -1))
        score_BGXS = (q_BGXK @ k_BSGK.permute(0, 2, 3, 1)).float().mul_(self.scale)
        out_BGXK = score_BGXS.softmax(dim=-1).to(v_BSGK.dtype) @ v_BSGK.transpose(1, 2)
        return out_BGXK.flatten(1, 2)[:, None]
