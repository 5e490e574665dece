"""What decoding keeps of the positions read so far, so that each new token costs only its own work.

Letters in names: B batch, T new position, S position so far, C latent width, R rotary width, G key-value head, K its
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cadre.errors import UsageError
from cadre.model.config import ModelConfig


class DecodingCache:
    """A cache of fixed capacity for the main model's layers, filled in place: nothing is copied or grown while decoding.

    Latent attention keeps one latent [B, S, C] and one rotary key [B, S, R] a position, shared by all heads (DeepSeek-V2
    report, section 2.1); grouped-query attention keeps keys and values [B, S, G, K]. The model advances `length` once a
    forward pass, after all layers have appended. Raises `UsageError` if `max_length` is below 1 or beyond the context.
    """

    def __init__(
        self, config: ModelConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        context = config.max_position_embeddings
        if not 1 <= max_length <= context:
            raise UsageError(f"a cache of {max_length:,} tokens: must hold 1 to {context:,}, the model's context")
        self.length = 0
        self.max_length = max_length
        first, second = _widths(config)
        self._layers = [
            CachedLayer(
                self,
                torch.empty(batch, max_length, *first, dtype=dtype, device=device),
                torch.empty(batch, max_length, *second, dtype=dtype, device=device),
            )
            for _ in range(config.num_hidden_layers)
        ]

    def layer(self, index: int) -> CachedLayer:
        return self._layers[index]

    def advance(self, positions: int) -> None:
        self.length += positions

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position of one sequence takes over all layers."""
        return sum(part[0, 0].numel() * part.element_size() for layer in self._layers for part in layer.parts)


class CachedLayer:
    """One layer's two tensors, of which the first `length` positions are filled."""

    def __init__(self, cache: DecodingCache, first: Tensor, second: Tensor) -> None:
        self.cache = cache
        self.parts = (first, second)

    def append(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, T, ...] after what is kept and return views of all [B, S, ...]. Raises `UsageError` when full."""
        start, new = self.cache.length, first.shape[1]
        stop = start + new
        if stop > self.cache.max_length:
            raise UsageError(
                f"the cache is full: it holds {start:,} of {self.cache.max_length:,} tokens and cannot take {new:,} more"
            )
        for kept, part in zip(self.parts, (first, second), strict=True):
            kept[:, start:stop] = part
        return self.parts[0][:, :stop], self.parts[1][:, :stop]


def _widths(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors that a layer keeps of one position."""
    if config.attention == "latent":
        return (config.kv_lora_rank or 0,), (config.qk_rope_head_dim or 0,)
    heads = config.num_key_value_heads or 0
    return (heads, config.head_dim or 0), (heads, config.head_dim or 0)
