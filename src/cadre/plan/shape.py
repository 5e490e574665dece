"""The shape of a model as planning sees it: what decides its parameters, FLOPs and bytes, and nothing else.

`ModelConfig` is what Cadre builds, and refuses the rest; a shape also describes models that Cadre does not run, so that a
plan can compare them. `cadre.plan.families` reads one from any supported `config.json`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from cadre.model.config import ModelConfig


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1). The cache keeps `kv_lora_rank + qk_rope_head_dim`."""

    num_attention_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached(self) -> int:
        """Elements that one layer keeps of a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def decoding_width(self) -> int:
        """Elements multiplied per cached token when decoding absorbed: every head reads the whole latent, twice."""
        return self.num_attention_heads * (self.cached + self.kv_lora_rank)

    def matrices(self, hidden: int) -> list[tuple[int, int]]:
        """Rows and columns of one layer's projections."""
        queries, values = (self.num_attention_heads * width for width in (self.qk_head_dim, self.v_head_dim))
        rank = self.q_lora_rank
        expanded = self.num_attention_heads * self.qk_nope_head_dim + values
        query = [(queries, hidden)] if rank is None else [(rank, hidden), (queries, rank)]
        return [*query, (self.cached, hidden), (expanded, self.kv_lora_rank), (hidden, values)]

    def parameters(self, hidden: int) -> int:
        """One layer's projections and their biases; its norms are apart."""
        queries = self.num_attention_heads * self.qk_head_dim
        values = self.num_attention_heads * self.v_head_dim
        into = hidden + self.bias
        rank = self.q_lora_rank
        query = hidden * queries if rank is None else into * rank + rank * queries
        expand = self.kv_lora_rank * (self.num_attention_heads * self.qk_nope_head_dim + values)
        return query + into * self.cached + expand + (values + self.bias) * hidden

    @property
    def norms(self) -> int:
        return self.kv_lora_rank + (self.q_lora_rank or 0)


@dataclass(frozen=True)
class Grouped:
    """Grouped-query attention; multi-head and multi-query attention are its ends.

    bias: on the query, key and value projections. output_bias: on the output projection. qk_norm: "head" norms queries
    and keys head by head with one weight, "all" norms all heads at once (OLMoE).
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        return self.head_dim

    @property
    def cached(self) -> int:
        """Elements that one layer keeps of a token."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def decoding_width(self) -> int:
        """Elements multiplied per cached token when decoding."""
        return 2 * self.num_attention_heads * self.head_dim

    def matrices(self, hidden: int) -> list[tuple[int, int]]:
        """Rows and columns of one layer's projections."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]

    def parameters(self, hidden: int) -> int:
        """One layer's projections and their biases; its norms are apart."""
        queries = self.num_attention_heads * self.head_dim
        return (hidden + self.bias) * (queries + self.cached) + (queries + self.output_bias) * hidden

    @property
    def norms(self) -> int:
        if self.qk_norm == "all":
            return (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return 2 * self.head_dim if self.qk_norm == "head" else 0


@dataclass(frozen=True)
class Experts:
    """The experts of one sparse block. `correction_bias`: the router holds one more number an expert (DeepSeek-V3).

    n_group and topk_group: a token's experts lie in topk_group of the n_group groups, which are what is spread over nodes.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 0
    correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1

    @property
    def node_limit(self) -> int:
        """The most nodes that a token's experts lie on when one group is on one node."""
        return min(self.num_experts_per_tok, self.topk_group) if self.n_group > 1 else self.num_experts_per_tok

    def touched(self, parts: int) -> float:
        """Of so many equal parts that the experts are spread over in order, how many hold some of a token's experts on average,
        if all choices are equally likely: P (1 - C(E - E/P, K) / C(E, K)), within the token's groups where they are limited."""
        groups, limit, chosen = self.n_group, self.topk_group, self.num_experts_per_tok
        size, group = self.n_routed_experts // parts, self.n_routed_experts // groups
        if max(size, group) % min(size, group):  # parts that cut across groups: as if there were none
            groups, limit, group = 1, 1, self.n_routed_experts
        reach = limit * group
        held = max(1, size // group)  # groups that a part has some experts of
        missed = 0.0
        for mine in range(max(0, held + limit - groups), min(held, limit) + 1):
            likely = math.comb(held, mine) * math.comb(groups - held, limit - mine) / math.comb(groups, limit)
            missed += likely * math.comb(reach - mine * min(size, group), chosen) / math.comb(reach, chosen)
        return parts * (1 - missed)


@dataclass(frozen=True)
class Block:
    """One decoder block: whether it holds experts, and how far back its attention sees (None: everything)."""

    sparse: bool
    window: int | None = None


@dataclass(frozen=True)
class Shape:
    """A model's shape. `blocks` are the main model's, `extra` those of its multi-token prediction modules."""

    model_type: str
    vocab_size: int
    hidden_size: int
    attention: Latent | Grouped
    blocks: tuple[Block, ...]
    extra: tuple[Block, ...] = ()
    intermediate_size: int | None = None
    experts: Experts | None = None
    tie_word_embeddings: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int | None = None

    @cached_property
    def sparse_blocks(self) -> int:
        return sum(block.sparse for block in self.blocks)

    @property
    def matrix(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.experts.moe_intermediate_size if self.experts else 0

    @property
    def routed(self) -> int:
        """Parameters of one sparse block's routed experts."""
        return self.experts.n_routed_experts * self.expert if self.experts else 0

    @property
    def active_routed(self) -> int:
        """Of those, the ones that a token passes."""
        return self.experts.num_experts_per_tok * self.expert if self.experts else 0

    @property
    def shared(self) -> int:
        return self.experts.n_shared_experts * self.expert if self.experts else 0

    @property
    def router(self) -> int:
        """One sparse block's router: its weight, and the correction bias where there is one."""
        return self.experts.n_routed_experts * (self.hidden_size + self.experts.correction_bias) if self.experts else 0

    @property
    def dense(self) -> int:
        """Parameters of one dense block's feed-forward."""
        width = self.intermediate_size or 0
        return 3 * self.hidden_size * width + self.mlp_bias * (2 * width + self.hidden_size)

    @property
    def norms(self) -> int:
        """One block's norm weights: two on the residual stream, and the attention's own."""
        return 2 * self.hidden_size + self.attention.norms

    def every_token(self, block: Block) -> int:
        """The parameters of a block that every token passes: all but its routed experts."""
        common = self.attention.parameters(self.hidden_size) + self.norms
        return common + (self.shared + self.router if block.sparse else self.dense)

    def matrices(self, block: Block) -> list[tuple[int, int]]:
        """Rows and columns of a block's matrices, routed experts and router apart: what Muon steps of `every_token`."""
        width = self.intermediate_size or 0
        if block.sparse and self.experts:
            width = self.experts.n_shared_experts * self.experts.moe_intermediate_size
        dense = [(width, self.hidden_size), (width, self.hidden_size), (self.hidden_size, width)] if width else []
        return [*self.attention.matrices(self.hidden_size), *dense]

    def joint(self) -> int:
        """What a multi-token prediction module holds beside its block: three norms and the projection that joins hidden
        state and embedding."""
        return 3 * self.hidden_size + 2 * self.hidden_size**2

    def reach(self, block: Block, context: int) -> float:
        """Twice the mean number of tokens that a causal attention over `context` positions sees."""
        seen = min(block.window or context, context)
        return 2 * seen - seen * seen / context

    def without_extra(self) -> Shape:
        """The main model, without multi-token prediction."""
        return replace(self, extra=())

    @classmethod
    def from_config(cls, config: ModelConfig) -> Shape:
        """The shape of a model that Cadre builds."""
        heads, bias = config.num_attention_heads, config.attention_bias
        attention: Latent | Grouped
        if config.attention == "latent":
            attention = Latent(
                heads, config.kv_lora_rank or 0, config.q_lora_rank, config.qk_nope_head_dim or 0,
                config.qk_rope_head_dim or 0, config.v_head_dim or 0, bias,
            )  # fmt: skip
        else:
            attention = Grouped(
                heads, config.num_key_value_heads or 0, config.head_dim or 0, bias, config.output_bias, config.qk_norm
            )
        experts = None
        if config.has_experts:
            experts = Experts(
                config.n_routed_experts or 0, config.num_experts_per_tok or 0, config.moe_intermediate_size or 0,
                config.n_shared_experts, config.scoring_func == "sigmoid", config.n_group, config.topk_group,
            )  # fmt: skip
        blocks = tuple(Block(config.is_sparse(layer)) for layer in range(config.total_layers))
        return cls(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            attention=attention,
            blocks=blocks[: config.num_hidden_layers],
            extra=blocks[config.num_hidden_layers :],
            intermediate_size=config.intermediate_size,
            experts=experts,
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.max_position_embeddings,
        )
