"""Count before you run: parameters, FLOPs and cache bytes of a model, from its shape alone.

Exact: `total_parameters` is the sum over the real tensors' elements (tests build them and compare), and the published
totals of DeepSeek-V2-Lite, V2 and V3 come out to the last digit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.plan.families import read_config, read_shape
from cadre.plan.shape import Block, Shape


@dataclass(frozen=True)
class Count:
    """What a model holds and costs. Parameters are elements, FLOPs count a multiply and an add as two.

    total_parameters: the elements of every tensor that a checkpoint of the model keeps, multi-token prediction modules
        included; the sum of `parts`. A tied head is the embedding and counts once. The router's correction bias counts
        though no gradient trains it: DeepSeek-V3's published 671,026,419,200 holds 58 layers x 256 of it. That total
        leaves out multi-token prediction: subtract `parts["multi_token_prediction"]` to compare.
    active_parameters: what one token passes to predict the next: embedding, head, and of the routed experts its top-k.
        Multi-token prediction modules are no part of that (nor of the two counts below).
    active_parameters_without_input_embedding: only what multiplies. A tied matrix stays, since it works as the head.
    active_parameters_without_embeddings: neither embedding nor head.
    forward_flops_per_token: one forward pass at `context`, causal, averaged over the positions; without multi-token
        prediction: 2 (active - input embedding) + layers heads (qk width + v width) context.
    training_flops_per_token: forward and backward, three times the above; every multi-token prediction module adds its
        own weights, its block's attention and one more application of the head. Recomputation is not counted.
    decode_flops_per_token: the next token after `context` cached ones. Latent attention decodes absorbed, so each head
        multiplies with the latent itself: kv_lora_rank + qk_rope_head_dim and kv_lora_rank wide.
    kv_cache_bytes_per_token: what the main model's layers keep of a token: latent and rotary key, or keys and values.
    kv_cache_bytes_per_token_mha: the same if every head kept its own key and value of the same widths.
    kv_cache_bytes_per_token_gqa8: the same if heads of these widths shared 8 keys and values (fewer heads: one each).
    parts: parameters by part; a module of multi-token prediction is one part with all that is in it.
    """

    context: int
    total_parameters: int
    active_parameters: int
    active_parameters_without_input_embedding: int
    active_parameters_without_embeddings: int
    forward_flops_per_token: int
    training_flops_per_token: int
    decode_flops_per_token: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes_per_token_mha: int
    kv_cache_bytes_per_token_gqa8: int
    parts: dict[str, int]

    def training_flops(self, mtp_share: float) -> float:
        """`training_flops_per_token` of a run that trains multi-token prediction on such a share of its sequences."""
        main = 3 * self.forward_flops_per_token
        return main + mtp_share * (self.training_flops_per_token - main)

    def trained(self, mtp_share: float) -> Count:
        """The same with `training_flops_per_token` of such a run."""
        return replace(self, training_flops_per_token=round(self.training_flops(mtp_share)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def count(config: ModelConfig | Shape | dict[str, Any] | str | Path, *, context: int = 4096, cache_bytes: int = 2) -> Count:
    """Count a model given as a config, a shape, the content of a `config.json`, its path, or the directory that holds it
    (by what that announces: of the weights beside it `cadre plan` sees whether multi-token prediction is among them).

    context: tokens of a sequence, for the attention's FLOPs. cache_bytes: bytes of one cached element, 2 for bfloat16.
    Raises `UsageError` for a config that is missing, unreadable or impossible; a family that Cadre builds is checked as
    strictly as when it is built. FLOPs are those of arXiv 2505.09343, table 2: 250.5 GFLOPs a token for V3 at 4096 without
    multi-token prediction, 155.3 for V2.
    """
    for name, value in (("context", context), ("cache_bytes", cache_bytes)):
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    shape = config if isinstance(config, Shape) else _shape(config)
    hidden, layers, sparse = shape.hidden_size, len(shape.blocks), shape.sparse_blocks
    parts = {
        "embedding": shape.matrix,
        "attention": layers * shape.attention.parameters(hidden),
        "dense_feed_forward": (layers - sparse) * shape.dense,
        "routed_experts": sparse * shape.routed,
        "shared_experts": sparse * shape.shared,
        "router": sparse * shape.router,
        "norms": layers * shape.norms + hidden,
        "head": 0 if shape.tie_word_embeddings else shape.matrix,
    }
    active = sum(parts.values()) - sparse * (shape.routed - shape.active_routed)
    multiplied = active if shape.tie_word_embeddings else active - shape.matrix
    parts["multi_token_prediction"] = sum(_module(shape, block, shape.routed) for block in shape.extra)
    extra_multiplied = sum(_module(shape, block, shape.active_routed) + shape.matrix for block in shape.extra)

    pair_width = shape.attention.num_attention_heads * (shape.attention.qk_head_dim + shape.attention.v_head_dim)
    pairs = round(sum(shape.reach(block, context) for block in shape.blocks) * pair_width)
    extra_pairs = round(sum(shape.reach(block, context) for block in shape.extra) * pair_width)
    seen = sum(min(block.window or context, context) for block in shape.blocks)
    groups = min(8, shape.attention.num_attention_heads)
    return Count(
        context=context,
        total_parameters=sum(parts.values()),
        active_parameters=active,
        active_parameters_without_input_embedding=multiplied,
        active_parameters_without_embeddings=multiplied - shape.matrix,
        forward_flops_per_token=2 * multiplied + pairs,
        training_flops_per_token=6 * (multiplied + extra_multiplied) + 3 * (pairs + extra_pairs),
        decode_flops_per_token=2 * multiplied + 2 * shape.attention.decoding_width * seen,
        kv_cache_bytes_per_token=layers * shape.attention.cached * cache_bytes,
        kv_cache_bytes_per_token_mha=layers * pair_width * cache_bytes,
        kv_cache_bytes_per_token_gqa8=layers * pair_width // shape.attention.num_attention_heads * groups * cache_bytes,
        parts=parts,
    )


def _shape(source: ModelConfig | dict[str, Any] | str | Path) -> Shape:
    if isinstance(source, ModelConfig):
        return Shape.from_config(source)
    where = "config"
    if not isinstance(source, dict):
        source, where = read_config(source)
    return read_shape(source, where).shape


def _module(shape: Shape, block: Block, routed: int) -> int:
    """Parameters of the multi-token prediction module around `block`, with `routed` ones in its routed experts. Embedding
    and head are the main model's."""
    return shape.joint() + shape.every_token(block) + (routed if block.sparse else 0)
