"""The decoder-only transformer: blocks of attention and feed-forward around a residual stream.

Letters in names: B batch, T position, D hidden, W vocabulary (words).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadre.errors import UsageError
from cadre.kernels.native.library import own_products_faster
from cadre.model.attention import GroupedQueryAttention, LatentAttention, LayerCache
from cadre.model.config import ModelConfig
from cadre.model.experts import Experts, MixtureOfExperts, Router
from cadre.model.layers import Linear, RMSNorm, SwiGLU
from cadre.model.rope import RotaryTable

# Which positions of its sequences a process computes: int64 numbers, where others compute the rest (train/parallel/context.py).
Positions = Tensor | slice
EVERY = slice(None)


class Cache(Protocol):
    """What the model asks of a cache for one forward pass over new tokens [1, T] of one or several sequences, one after
    the other: each token's position in its own sequence (int64 [T]), a bound above them all, and its part for one layer."""

    @property
    def position_T(self) -> Tensor: ...

    @property
    def stop(self) -> int: ...

    def layer(self, index: int) -> LayerCache: ...


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward is experts or dense by layer number."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config) if config.attention == "latent" else GroupedQueryAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MixtureOfExperts | SwiGLU
        if config.is_sparse(index):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size or 0)

    def forward(self, x_BTD: Tensor, turn_TR: Tensor, cache: Cache | None, document_BT: Tensor | None) -> Tensor:
        layer_cache = None if cache is None else cache.layer(self.index)
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), turn_TR, layer_cache, document_BT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class MultiTokenPredictor(nn.Module):
    """Predicts one token further than the stage before it (DeepSeek-V3 report, section 2.2): joins that stage's hidden
    state with the embedding of the next token, and runs one block. Embedding and head are the main model's.

    The stage before hands over its normed output, as transformers, vLLM and the published weights have it.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, index)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_BTD: Tensor, next_BTD: Tensor, turn_TR: Tensor, cache: Cache | None, document_BT: Tensor | None
    ) -> Tensor:
        """hidden_BTD: the stage before; next_BTD: embeddings of the tokens one further. Returns normed hidden states."""
        joined = self.eh_proj(torch.cat((self.enorm(next_BTD), self.hnorm(hidden_BTD)), dim=-1))
        return self.norm(self.block(joined, turn_TR, cache, document_BT))


class Transformer(nn.Module):
    """A language model of any corner of the grid. Parameters are created empty: `initialize` or a checkpoint fills them.

    `model(ids)` with int64 ids [B, T] gives logits [B, T, vocab] in the compute dtype, which is the weights' dtype unless
    `compute_dtype` is set (float32 masters under bfloat16 compute).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=empty)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(config, index) for index in range(config.num_hidden_layers, config.total_layers)
        )
        self.rotary = RotaryTable(config)

    def forward(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        if ids_BT.dim() != 2:
            raise UsageError(f"the ids have shape {list(ids_BT.shape)}; it must be [batch, seq]: one sequence is ids[None]")
        return self.lm_head(self.hidden(ids_BT, cache))

    @property
    def device(self) -> torch.device:
        """Where its parameters are, but for those without storage."""
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("meta"))

    def compute_in(self, dtype: torch.dtype, fp8_experts: bool = False) -> None:
        """Compute in bfloat16 or float32, with weights of float32 (or, without gradients, of bfloat16). On a CPU with our own
        products of bfloat16, bfloat16 means those: what lies between products stays float32. `fp8_experts`: routed experts
        multiply in FP8."""
        narrow = dtype == torch.bfloat16 and self.device.type == "cpu" and own_products_faster(narrow=True)
        self.compute_dtype = torch.float32 if narrow else dtype
        self.round_factors(narrow)
        for module in self.modules():
            if isinstance(module, Experts):
                module.fp8 = fp8_experts

    def round_factors(self, narrow: bool) -> None:
        """Whether products of float32 on a CPU are made of factors rounded to bfloat16; weights may then be bfloat16 themselves
        where no gradient is asked for."""
        for module in self.modules():
            if hasattr(module, "narrow"):
                module.narrow = narrow  # type: ignore[assignment]

    def embed(self, ids_BT: Tensor) -> Tensor:
        embedded = F.embedding(ids_BT, self.embed_tokens.weight)
        return embedded if self.compute_dtype is None else embedded.to(self.compute_dtype)

    def hidden(
        self, ids_BT: Tensor, cache: Cache | None = None, document_BT: Tensor | None = None, own_T: Positions = EVERY
    ) -> Tensor:
        """Normed hidden states [B, T, D], what the head reads. With a cache, ids [1, T] continue the sequences it holds.
        With documents (int [B, T]), attention stays within equal numbers. `own_T`: the positions to compute, if other
        processes compute the rest."""
        turn_TR = self._turn(ids_BT, cache)
        x_BTD = self.embed(ids_BT[:, own_T])
        for block in self.layers:
            x_BTD = block(x_BTD, turn_TR, cache, document_BT)
        return self.norm(x_BTD)

    def mtp_hidden(
        self, hidden_BTD: Tensor, ids_BT: Tensor, depth: int, cache: Cache | None = None, document_BT: Tensor | None = None,
        own_T: Positions = EVERY,
    ) -> Tensor:  # fmt: skip
        """Hidden states of multi-token prediction module `depth` (from 0), given those of the stage before at positions
        t and the ids at positions t + depth + 1. Position t then predicts the token at t + depth + 2. `own_T`: the
        positions that `hidden_BTD` holds, as in `hidden`."""
        return self.mtp[depth](hidden_BTD, self.embed(ids_BT[:, own_T]), self._turn(ids_BT, cache), cache, document_BT)

    def _turn(self, ids_BT: Tensor, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.rotary(ids_BT.shape[1], ids_BT.device)
        return self.rotary.at(cache.position_T, cache.stop)

    @torch.no_grad()
    def initialize(self, seed: int, device: torch.device | str = "cpu") -> Transformer:
        """Fill every weight from one seed: matrices normal with std `initializer_range`, norms 1, biases 0. `device`: what
        draws the numbers; a card is faster at many, but only a CPU's are the same everywhere."""
        state = dict((*self.named_parameters(remove_duplicate=False), *self.named_buffers()))
        for name, value in self.initial_values(seed, device):
            state[name].copy_(value)
        return self

    def initial_values(self, seed: int, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """What `initialize` fills parameters and router biases with, by name, in order and on `device`; the model itself may
        be without storage. Of a head tied to the embedding, which come one after the other, the head's value holds."""
        generator = torch.Generator(device).manual_seed(seed)
        for path, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                if isinstance(module, RMSNorm):
                    value.fill_(1.0)
                elif name != "bias":
                    value.normal_(std=self.config.initializer_range, generator=generator)
                yield f"{path}.{name}", value
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                yield f"{path}.e_score_correction_bias", torch.zeros(module.e_score_correction_bias.shape, device=device)

    def sparse_layers(self) -> list[tuple[int, MixtureOfExperts]]:
        """Every mixture of experts with its layer number, multi-token prediction blocks included."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [(block.index, block.mlp) for block in blocks if isinstance(block.mlp, MixtureOfExperts)]
