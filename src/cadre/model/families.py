"""What sets the model families apart: the corner of the grid, what a config may say, how Hugging Face spells it.

Arithmetic only; this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ModelType = Literal[
    "deepseek_v3", "deepseek_v2", "glm4_moe", "qwen3_moe", "mixtral", "olmoe", "llama", "qwen2", "qwen3"
]  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    architecture: the class in transformers. defaults: what transformers assumes where a config.json is silent (transformers
    5, configuration_*.py), by our names. latent: attention is latent, else grouped-query.
    bias: whether queries, keys and values have biases: as `attention_bias` says, always or never. output_bias: whether the
    output projection has one too where they have.
    qk_norm: whether queries and keys are normed: as `use_qk_norm` says, head by head, all heads at once, or never.
    scoring: the affinities of routers; None where no layer has experts. normed: what `norm_topk_prob` is, if it is not free.
    like_deepseek: experts may be shared and in groups, scaled, and followed by multi-token prediction. dense_layers: the
    first layers may be dense in what transformers builds. spelling: fields that a config.json has under another name.
    layer, expert: names of the feed-forward part of a layer and of an expert's gate, up and down matrices on disk.
    """

    architecture: str
    defaults: Mapping[str, Any]
    latent: bool = False
    bias: Literal["switch", "always", "never"] = "switch"
    output_bias: bool = True
    qk_norm: Literal["switch", "head", "all", "never"] = "never"
    scoring: Literal["sigmoid", "softmax"] | None = None
    normed: bool | None = None
    like_deepseek: bool = False
    dense_layers: bool = True
    spelling: Mapping[str, str] = field(default_factory=dict)
    layer: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        dict(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
            num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256,
            routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, v_head_dim=128,
            qk_nope_head_dim=128, n_group=8, topk_group=4, num_experts_per_tok=8, first_k_dense_replace=3,
            norm_topk_prob=True, max_position_embeddings=4096, rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1,
        ),
        latent=True, scoring="sigmoid", like_deepseek=True,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        dict(
            vocab_size=102400, hidden_size=4096, intermediate_size=11008, moe_intermediate_size=1407, num_hidden_layers=32,
            num_attention_heads=32, n_shared_experts=2, n_routed_experts=64, kv_lora_rank=512, q_lora_rank=1536,
            qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, first_k_dense_replace=0, topk_method="greedy",
            norm_topk_prob=False, max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
        ),
        latent=True, scoring="softmax", normed=False, like_deepseek=True,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        dict(
            vocab_size=151552, hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=46,
            num_attention_heads=96, num_key_value_heads=8, n_shared_experts=1, n_routed_experts=128, num_experts_per_tok=8,
            first_k_dense_replace=1, norm_topk_prob=True, max_position_embeddings=131072, rms_norm_eps=1e-5,
        ),
        output_bias=False, qk_norm="switch", scoring="sigmoid", like_deepseek=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=24,
            num_attention_heads=32, num_key_value_heads=4, n_routed_experts=128, num_experts_per_tok=8, norm_topk_prob=False,
            max_position_embeddings=32768, rms_norm_eps=1e-6,
        ),
        qk_norm="head", scoring="softmax", spelling={"n_routed_experts": "num_experts"},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        dict(
            vocab_size=32000, hidden_size=4096, moe_intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=131072,
            rms_norm_eps=1e-5, rope_theta=1e6, bos_token_id=1, eos_token_id=2,
        ),
        bias="never", scoring="softmax", normed=True, dense_layers=False,
        spelling={"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        layer="block_sparse_moe", expert=("w1", "w3", "w2"),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        dict(
            vocab_size=50304, hidden_size=2048, moe_intermediate_size=2048, num_hidden_layers=16, num_attention_heads=16,
            n_routed_experts=64, num_experts_per_tok=8, norm_topk_prob=False, max_position_embeddings=4096,
            rms_norm_eps=1e-5, pad_token_id=1, eos_token_id=50279,
        ),
        qk_norm="all", scoring="softmax", dense_layers=False,
        spelling={"n_routed_experts": "num_experts", "moe_intermediate_size": "intermediate_size"},
    ),
    "llama": Family(
        "LlamaForCausalLM",
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
        ),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=32768, rms_norm_eps=1e-6,
        ),
        bias="always", output_bias=False,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-6,
        ),
        qk_norm="head",
    ),
}  # fmt: skip

# Families that compute what one of those above does, and what transformers assumes of them where a config.json is silent.
OTHER_NAMES: dict[str, tuple[ModelType, Mapping[str, Any]]] = {
    "kimi_k2": ("deepseek_v3", {}),
    "glm4_moe_lite": (
        "deepseek_v3",
        dict(
            vocab_size=154880, hidden_size=2048, intermediate_size=10240, moe_intermediate_size=1536, num_hidden_layers=47,
            num_attention_heads=20, num_key_value_heads=20, n_routed_experts=64, routed_scaling_factor=1.8, q_lora_rank=768,
            v_head_dim=256, qk_nope_head_dim=192, n_group=1, topk_group=1, num_experts_per_tok=4, first_k_dense_replace=1,
            max_position_embeddings=202752, rms_norm_eps=1e-5,
        ),
    ),
    "youtu": (
        "deepseek_v3",
        dict(
            vocab_size=128256, hidden_size=2048, intermediate_size=6144, num_hidden_layers=32, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=131072, tie_word_embeddings=True, bos_token_id=128000,
            eos_token_id=128001,
        ),
    ),
}  # fmt: skip
