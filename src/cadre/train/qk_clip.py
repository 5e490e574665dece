"""QK-Clip (Kimi K2 report, arXiv 2507.20534, section 2.1): after an update, heads whose logits grew beyond a bound get their
queries and keys scaled down. Muon drives them up, most where nothing norms queries and keys, as in latent attention.

Letters in names: L layer, H query head, N query-key width without position, R rotary width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cadre.model.attention import GroupedQueryAttention, LatentAttention
from cadre.model.transformer import Transformer
from cadre.train.parallel.group import Parallel


class QKClip:
    """Keeps logits below `most`. One optimizer step: `reset()`, all passes, the update, then `clip()`. Attention that norms its
    queries and keys is left alone."""

    def __init__(self, model: Transformer, most: float, parallel: Parallel | None = None) -> None:
        self.most, self.parallel, self.model = most, parallel or Parallel(), model
        self.attentions: dict[str, LatentAttention | GroupedQueryAttention] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LatentAttention) or (isinstance(module, GroupedQueryAttention) and module.q_norm is None)
        }
        heads = model.config.num_attention_heads
        self.peak_LH = torch.full((len(self.attentions), heads), float("-inf"), device=model.device)
        for peak_H, attention in zip(self.peak_LH, self.attentions.values(), strict=True):
            attention.peak_H = peak_H

    @classmethod
    def of(cls, model: Transformer, most: float | None, parallel: Parallel) -> QKClip | None:
        """None if there is no bound, or nothing that it would hold for."""
        made = None if most is None else cls(model, most, parallel)
        return made if made is not None and made.attentions else None

    def reset(self) -> None:
        self.peak_LH.fill_(float("-inf"))

    @torch.no_grad()
    def clip(self) -> float:
        """Scale down the query and key weights of heads whose largest logit exceeded the bound. Returns the largest
        logit of the step, over all processes."""
        self.parallel.most(self.peak_LH)
        held = self.parallel.held(self.model)
        # Of a number by itself torch makes its reciprocal times it, which need not be 1.
        factor_LH = torch.where(self.peak_LH > self.most, self.most / self.peak_LH, 1.0).float()
        for factor_H, (name, attention) in zip(factor_LH.cpu(), self.attentions.items(), strict=True):
            if bool((factor_H < 1).any()):
                for part, row_factor in _row_factors(attention, factor_H).items():
                    if (path := f"{name}.{part}") in held:
                        local = held[path]
                        own = row_factor[self.parallel.held_rows(path)].to(local.device)
                        local.mul_(own.view(-1, *(1,) * (local.ndim - 1)))
        return float(self.peak_LH.max())


def _row_factors(attention: LatentAttention | GroupedQueryAttention, factor_H: Tensor) -> dict[str, Tensor]:
    """What each row of which weight is multiplied by, so that head h's logits are by factor_H[h]. Of latent attention queries
    and keys share it, but for the rotary key, which all heads have in common: its queries take it all. So do those of grouped
    attention."""
    H = len(factor_H)
    if isinstance(attention, GroupedQueryAttention):
        row = factor_H.repeat_interleave(attention.q_proj.out_features // H)
        return {"q_proj.weight": row, "q_proj.bias": row}
    N, R, V = attention.nope, attention.rotary, attention.value
    root_H1, ones = factor_H.sqrt()[:, None], torch.ones(H, V)
    queries = torch.cat((root_H1.expand(H, N), factor_H[:, None].expand(H, R)), dim=1).flatten()
    keys = torch.cat((root_H1.expand(H, N), ones), dim=1).flatten()
    name = "q_b_proj" if attention.low_rank_query else "q_proj"
    return {f"{name}.weight": queries, "kv_b_proj.weight": keys}
