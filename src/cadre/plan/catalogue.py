"""Published models by name: the fields of each one's `config.json` that decide a count, and where it is published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cadre.plan.families import read_shape
from cadre.plan.shape import Shape


@dataclass(frozen=True)
class Entry:
    """A published model: its shape, multi-token prediction included where it has it, and where its config is published."""

    name: str
    shape: Shape
    source: str


def names() -> list[str]:
    """The names of all models in the catalogue."""
    return list(_PUBLISHED)


def lookup(name: str) -> Entry | None:
    """The model of this name in any mix of cases, or None."""
    known = name.lower()
    if known not in _PUBLISHED:
        return None
    repository, values = _PUBLISHED[known]
    return Entry(known, read_shape(values, known).shape, f"https://huggingface.co/{repository}/blob/main/config.json")


# Repository on Hugging Face, and of its config.json what counts, spelled as there.
_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": ("deepseek-ai/DeepSeek-V3", dict(
        model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, num_hidden_layers=61,
        max_position_embeddings=163840, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=18432,
        first_k_dense_replace=3, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
        moe_intermediate_size=2048, n_group=8, topk_group=4, num_nextn_predict_layers=1,
    )),
    "deepseek-v2": ("deepseek-ai/DeepSeek-V2", dict(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=5120, num_hidden_layers=60,
        max_position_embeddings=163840, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=12288,
        first_k_dense_replace=1, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6,
        moe_intermediate_size=1536, topk_method="group_limited_greedy", n_group=8, topk_group=3,
    )),
    "deepseek-v2-lite": ("deepseek-ai/DeepSeek-V2-Lite", dict(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, num_hidden_layers=27,
        max_position_embeddings=163840, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=10944,
        first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        moe_intermediate_size=1408, topk_method="greedy", n_group=1, topk_group=1,
    )),
    "deepseek-67b": ("deepseek-ai/deepseek-llm-67b-base", dict(
        model_type="llama", vocab_size=102400, hidden_size=8192, num_hidden_layers=95, max_position_embeddings=4096,
        num_attention_heads=64, num_key_value_heads=8, intermediate_size=22016,
    )),
    "kimi-k2": ("moonshotai/Kimi-K2-Instruct", dict(
        model_type="kimi_k2", vocab_size=163840, hidden_size=7168, num_hidden_layers=61,
        max_position_embeddings=131072, num_attention_heads=64, num_key_value_heads=64, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=18432,
        first_k_dense_replace=1, n_routed_experts=384, n_shared_experts=1, num_experts_per_tok=8,
        moe_intermediate_size=2048, n_group=1, topk_group=1, num_nextn_predict_layers=0,
    )),
    "moonlight-16b-a3b": ("moonshotai/Moonlight-16B-A3B", dict(
        model_type="deepseek_v3", vocab_size=163840, hidden_size=2048, num_hidden_layers=27,
        max_position_embeddings=8192, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=11264,
        first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        moe_intermediate_size=1408, n_group=1, topk_group=1, num_nextn_predict_layers=0,
    )),
    "glm-4.5": ("zai-org/GLM-4.5", dict(
        model_type="glm4_moe", vocab_size=151552, hidden_size=5120, num_hidden_layers=92,
        max_position_embeddings=131072, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
        attention_bias=True, use_qk_norm=True, intermediate_size=12288, first_k_dense_replace=3,
        n_routed_experts=160, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1536, n_group=1,
        topk_group=1, num_nextn_predict_layers=1,
    )),
    "glm-4.5-air": ("zai-org/GLM-4.5-Air", dict(
        model_type="glm4_moe", vocab_size=151552, hidden_size=4096, num_hidden_layers=46,
        max_position_embeddings=131072, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
        attention_bias=True, use_qk_norm=False, intermediate_size=10944, first_k_dense_replace=1,
        n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1408, n_group=1,
        topk_group=1, num_nextn_predict_layers=1,
    )),
    "glm-4.7-flash": ("zai-org/GLM-4.7-Flash", dict(
        model_type="glm4_moe_lite", vocab_size=154880, hidden_size=2048, num_hidden_layers=47,
        max_position_embeddings=202752, num_attention_heads=20, num_key_value_heads=20, q_lora_rank=768,
        kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, intermediate_size=10240,
        first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=4,
        moe_intermediate_size=1536, n_group=1, topk_group=1, num_nextn_predict_layers=1,
    )),
    "youtu-llm-2b": ("tencent/Youtu-LLM-2B", dict(
        model_type="youtu", vocab_size=128256, hidden_size=2048, num_hidden_layers=32,
        max_position_embeddings=131072, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=6144,
        tie_word_embeddings=True,
    )),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B", dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=4096, num_hidden_layers=94,
        max_position_embeddings=40960, num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=1536,
    )),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, num_hidden_layers=48,
        max_position_embeddings=40960, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768,
    )),
    "olmoe-1b-7b": ("allenai/OLMoE-1B-7B-0924", dict(
        model_type="olmoe", vocab_size=50304, hidden_size=2048, num_hidden_layers=16, max_position_embeddings=4096,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        intermediate_size=1024,
    )),
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-v0.1", dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, num_hidden_layers=32,
        max_position_embeddings=32768, num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
        num_experts_per_tok=2, intermediate_size=14336,
    )),
    "mixtral-8x22b": ("mistral-community/Mixtral-8x22B-v0.1", dict(
        model_type="mixtral", vocab_size=32000, hidden_size=6144, num_hidden_layers=56,
        max_position_embeddings=65536, num_attention_heads=48, num_key_value_heads=8, num_local_experts=8,
        num_experts_per_tok=2, intermediate_size=16384,
    )),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, num_hidden_layers=32,
        max_position_embeddings=131072, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
    )),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", dict(
        model_type="llama", vocab_size=128256, hidden_size=8192, num_hidden_layers=80,
        max_position_embeddings=131072, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
    )),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", dict(
        model_type="llama", vocab_size=128256, hidden_size=16384, num_hidden_layers=126,
        max_position_embeddings=131072, num_attention_heads=128, num_key_value_heads=8, intermediate_size=53248,
    )),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", dict(
        model_type="qwen2", vocab_size=152064, hidden_size=8192, num_hidden_layers=80,
        max_position_embeddings=131072, num_attention_heads=64, num_key_value_heads=8, intermediate_size=29568,
    )),
    "qwen3-32b": ("Qwen/Qwen3-32B", dict(
        model_type="qwen3", vocab_size=151936, hidden_size=5120, num_hidden_layers=64,
        max_position_embeddings=40960, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
        intermediate_size=25600,
    )),
    "qwen3-8b": ("Qwen/Qwen3-8B", dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, num_hidden_layers=36,
        max_position_embeddings=40960, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288,
    )),
}  # fmt: skip
