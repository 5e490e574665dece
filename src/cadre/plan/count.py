"""Count before you run: parameters, FLOPs and cache bytes of a model, from its config alone.

Exact: `total_parameters` is the sum over the real tensors' elements (tests build them and compare), and the published
totals of DeepSeek-V2-Lite, V2 and V3 come out to the last digit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cadre.errors import UsageError
from cadre.model.config import ModelConfig


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
    kv_cache_bytes_per_token: what the main model's layers keep of a token: latent and rotary key, or keys and values.
    kv_cache_bytes_per_token_mha: the same if every head kept its own key and value of the same widths.
    parts: parameters by part; a module of multi-token prediction is one part with all that is in it.
    """

    context: int
    total_parameters: int
    active_parameters: int
    active_parameters_without_input_embedding: int
    active_parameters_without_embeddings: int
    forward_flops_per_token: int
    training_flops_per_token: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes_per_token_mha: int
    parts: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def count(config: ModelConfig | dict[str, Any] | str | Path, *, context: int = 4096, cache_bytes: int = 2) -> Count:
    """Count a model given as a config, the content of a `config.json`, its path, or the directory that holds it.

    context: tokens of a sequence, for the attention's FLOPs. cache_bytes: bytes of one cached element, 2 for bfloat16.
    Raises `UsageError` for a config that is missing, unreadable or impossible. FLOPs are those of arXiv
    2505.09343, table 2: 250.5 GFLOPs a token for V3 at 4096 without multi-token prediction, 155.3 for V2.
    """
    for name, value in (("context", context), ("cache_bytes", cache_bytes)):
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    if not isinstance(config, ModelConfig):
        config = _read(config)
    matrix = config.vocab_size * config.hidden_size
    layers = range(config.num_hidden_layers)
    sparse = sum(config.is_sparse(layer) for layer in layers)
    parts = {
        "embedding": matrix,
        "attention": len(layers) * _attention(config),
        "dense_feed_forward": (len(layers) - sparse) * _feed_forward(config, config.intermediate_size),
        "routed_experts": sparse * (config.n_routed_experts or 0) * _expert(config),
        "shared_experts": sparse * config.n_shared_experts * _expert(config),
        "router": sparse * _router(config),
        "norms": len(layers) * _norms(config) + config.hidden_size,
        "head": 0 if config.tie_word_embeddings else matrix,
    }
    active = sum(parts.values()) - sparse * _idle(config)
    multiplied = active if config.tie_word_embeddings else active - matrix
    extra = [_module(config, layer) for layer in range(config.num_hidden_layers, config.total_layers)]
    parts["multi_token_prediction"] = sum(total for total, _ in extra)

    pair_width = config.num_attention_heads * (config.qk_head_dim + config.value_head_dim)
    extra_multiplied = sum(active_of_module + matrix for _, active_of_module in extra)
    kept = _cached_elements(config)
    return Count(
        context=context,
        total_parameters=sum(parts.values()),
        active_parameters=active,
        active_parameters_without_input_embedding=multiplied,
        active_parameters_without_embeddings=multiplied - matrix,
        forward_flops_per_token=2 * multiplied + len(layers) * pair_width * context,
        training_flops_per_token=6 * (multiplied + extra_multiplied) + 3 * config.total_layers * pair_width * context,
        kv_cache_bytes_per_token=len(layers) * kept * cache_bytes,
        kv_cache_bytes_per_token_mha=len(layers) * pair_width * cache_bytes,
        parts=parts,
    )


def _read(source: dict[str, Any] | str | Path) -> ModelConfig:
    if isinstance(source, dict):
        return ModelConfig.from_hf(source, where="config")
    path = Path(source)
    if path.is_dir():
        homes = (path / "config.json", path / "model" / "config.json")
        path = next((home for home in homes if home.exists()), homes[0])
    return ModelConfig.from_file(path)


def _attention(config: ModelConfig) -> int:
    """One layer's projections and their biases."""
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, int(config.attention_bias)
    query = heads * config.qk_head_dim
    if config.attention == "grouped":
        key_value = 2 * (config.num_key_value_heads or 0) * config.qk_head_dim
        into = (hidden + bias) * (query + key_value)
        return into + hidden * (query + bias * (config.model_type == "llama"))
    latent, rotary = config.kv_lora_rank or 0, config.qk_rope_head_dim or 0
    value = heads * config.value_head_dim
    if config.q_lora_rank is None:
        queries = hidden * query
    else:
        queries = (hidden + bias) * config.q_lora_rank + config.q_lora_rank * query
    compress = (hidden + bias) * (latent + rotary)
    expand = latent * (heads * (config.qk_nope_head_dim or 0) + value)
    return queries + compress + expand + (value + bias) * hidden


def _norms(config: ModelConfig) -> int:
    """One layer's norm weights: two on the residual stream, and the attention's own."""
    if config.attention == "latent":
        return 2 * config.hidden_size + (config.q_lora_rank or 0) + (config.kv_lora_rank or 0)
    return 2 * config.hidden_size + (2 * config.qk_head_dim if config.use_qk_norm else 0)


def _feed_forward(config: ModelConfig, width: int | None) -> int:
    return 3 * config.hidden_size * (width or 0)


def _expert(config: ModelConfig) -> int:
    return _feed_forward(config, config.moe_intermediate_size)


def _router(config: ModelConfig) -> int:
    """One sparse layer's router: its weight, and with sigmoid scores the correction bias."""
    return (config.n_routed_experts or 0) * (config.hidden_size + (config.scoring_func == "sigmoid"))


def _idle(config: ModelConfig) -> int:
    """One sparse layer's parameters that a token does not meet: the routed experts it did not choose."""
    return ((config.n_routed_experts or 0) - (config.num_experts_per_tok or 0)) * _expert(config)


def _module(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Total and active parameters of the multi-token prediction module whose block is number `layer`: two norms and a
    projection that join hidden state and embedding, the block, a last norm. Embedding and head are the main model's."""
    hidden = config.hidden_size
    total = 2 * hidden + 2 * hidden * hidden + _attention(config) + _norms(config) + hidden
    if not config.is_sparse(layer):
        total += _feed_forward(config, config.intermediate_size)
        return total, total
    total += _router(config) + ((config.n_routed_experts or 0) + config.n_shared_experts) * _expert(config)
    return total, total - _idle(config)


def _cached_elements(config: ModelConfig) -> int:
    """What one layer's cache keeps of one token."""
    if config.attention == "latent":
        return (config.kv_lora_rank or 0) + (config.qk_rope_head_dim or 0)
    return (config.num_key_value_heads or 0) * (config.qk_head_dim + config.value_head_dim)
