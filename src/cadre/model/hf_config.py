"""Hugging Face's `config.json` of the families that Cadre builds: what it leaves out, what it spells in two ways, what says
nothing about the model."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cadre.errors import UsageError, explain
from cadre.model.rope_parameters import ROPE_READS, RopeParameters

if TYPE_CHECKING:
    from cadre.model.config import ModelConfig

# What transformers assumes where a family's config.json is silent (transformers 5, configuration_*.py).
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": dict(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256,
        routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, v_head_dim=128,
        qk_nope_head_dim=128, n_group=8, topk_group=4, num_experts_per_tok=8, first_k_dense_replace=3,
        norm_topk_prob=True, max_position_embeddings=4096, rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1,
    ),
    "deepseek_v2": dict(
        vocab_size=102400, hidden_size=4096, intermediate_size=11008, moe_intermediate_size=1407, num_hidden_layers=32,
        num_attention_heads=32, n_shared_experts=2, n_routed_experts=64, kv_lora_rank=512, q_lora_rank=1536,
        qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, first_k_dense_replace=0, topk_method="greedy",
        norm_topk_prob=False, max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
    ),
    "glm4_moe": dict(
        vocab_size=151552, hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=46,
        num_attention_heads=96, num_key_value_heads=8, n_shared_experts=1, n_routed_experts=128, num_experts_per_tok=8,
        first_k_dense_replace=1, norm_topk_prob=True, max_position_embeddings=131072, rms_norm_eps=1e-5,
    ),
    "llama": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip

# Fields of a config.json that say nothing about the function the model computes.
IRRELEVANT = frozenset((
    "_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "pretraining_tp", "ep_size", "attention_dropout", "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha",
    "seq_aux", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type",
    "is_encoder_decoder", "chunk_size_feed_forward", "tokenizer_class", "quantization_config",
    "keys_to_ignore_at_inference", "num_mtp_layers", "qk_head_dim", "mlp_layer_types",
))  # fmt: skip

# The shape of a mixture of experts.
EXPERT_FIELDS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group",
                 "topk_group")  # fmt: skip

_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}


def fields_from_hf(values: dict[str, Any], where: str, known: Container[str]) -> dict[str, Any]:
    """The fields of a `ModelConfig`, whose names are `known`, from the content of a `config.json`. Raises `UsageError` for
    what Cadre cannot compute."""
    values = dict(values)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise UsageError(f"{where}: model_type is {kind!r}; Cadre builds {', '.join(DEFAULTS)}")
    rope = _rope_from_hf(values, kind, where)
    if values.pop("moe_layer_freq", 1) != 1:
        raise UsageError(f"{where}: moe_layer_freq must be 1: experts in every layer after first_k_dense_replace")
    if values.pop("mlp_bias", False):
        raise UsageError(f"{where}: mlp_bias is true; Cadre's feed-forward layers have no bias")
    if "num_nextn_predict_layers" not in values and "num_mtp_layers" in values:
        values["num_nextn_predict_layers"] = values["num_mtp_layers"]
    if "n_routed_experts" not in values and "num_local_experts" in values:
        values["n_routed_experts"] = values.pop("num_local_experts")
    values.pop("num_local_experts", None)
    if kind.startswith("deepseek"):
        values.pop("head_dim", None)  # transformers stores qk_rope_head_dim under this name
    if kind == "deepseek_v2":
        values.pop("rope_interleave", None)  # it always turns adjacent pairs, whatever a file says
    if kind == "llama":
        for name in ("n_routed_experts", "num_experts_per_tok"):
            values.pop(name, None)
    merged = {**DEFAULTS[kind], **{k: v for k, v in values.items() if k not in IRRELEVANT}}
    merged["rope_parameters"] = rope
    if not merged.get("first_k_dense_replace") and kind != "llama" and "intermediate_size" not in values:
        del merged["intermediate_size"]  # no layer is dense
    for name in ("n_group", "topk_group"):
        if merged.get(name) is None and name in merged:
            merged[name] = 1
    unknown = [k for k, v in merged.items() if k not in known and v not in (None, False)]
    if unknown:
        raise UsageError(f"{where}: {unknown[0]} = {merged[unknown[0]]!r} is not something Cadre's {kind} knows")
    merged = {k: v for k, v in merged.items() if k in known}
    if kind == "deepseek_v2" and isinstance(merged.get("n_group"), int) and merged.get("topk_method") == "greedy":
        merged["n_group"] = merged["topk_group"] = 1  # greedy never looks at groups
    return merged


def fields_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a model's `config.json`."""
    rope = config.rope_parameters
    keep = {"rope_type", "rope_theta", *(k for k in ROPE_READS[rope.rope_type] if getattr(rope, k) is not None)}
    if config.model_type == "glm4_moe":
        keep.add("partial_rotary_factor")
    fields = config.model_dump(exclude={"rope_parameters"})
    if config.attention == "latent":
        dropped = {"head_dim", "use_qk_norm"}
    else:
        dropped = {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                   "rope_interleave"}  # fmt: skip
    if config.model_type == "llama":
        dropped |= {*EXPERT_FIELDS, "first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor",
                    "scoring_func", "topk_method", "num_nextn_predict_layers", "use_qk_norm"}  # fmt: skip
    if config.intermediate_size is None:
        dropped.add("intermediate_size")  # no layer is dense, and transformers wants a number or nothing
    result = {k: v for k, v in fields.items() if k not in dropped}
    if config.model_type != "llama" and not config.has_experts:
        # transformers reads these even where no layer holds experts.
        needed = dict(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=1)
        result.update({name: value for name, value in needed.items() if result[name] is None})
    result["rope_parameters"] = rope.model_dump(include=keep)
    result["architectures"] = [_ARCHITECTURES[config.model_type]]
    return result


def _rope_from_hf(values: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Take both spellings of the rotary fields out of `values` and return the newer one. Where both are filled the older one
    counts, whole, as it does for transformers: somebody has added it."""
    rope: dict[str, Any] = {}
    for spelling in ("rope_parameters", "rope_scaling"):
        given = values.pop(spelling, None) or {}
        if not isinstance(given, dict):
            raise UsageError(f"{where}: {spelling} is {given!r}; it must be an object of rope_type and its fields")
        rope = dict(given) or rope
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
        del rope["type"]
    theta = values.pop("rope_theta", None)
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    partial = values.pop("partial_rotary_factor", 0.5 if kind == "glm4_moe" else None)
    if kind == "glm4_moe":
        rope.setdefault("partial_rotary_factor", 1.0 if partial is None else partial)  # null turns all of a head
    elif partial is not None:
        rope.setdefault("partial_rotary_factor", partial)
    longest = {**DEFAULTS[kind], **values}
    if rope.get("rope_type") in ("yarn", "llama3"):
        rope.setdefault("original_max_position_embeddings", longest["max_position_embeddings"])
    lengths = (rope.get("original_max_position_embeddings"), longest.get("max_position_embeddings"))
    known = all(isinstance(length, int) and 0 < length < 2**63 for length in lengths)
    if rope.get("rope_type") == "yarn" and rope.get("factor") is None and known:
        rope["factor"] = longest["max_position_embeddings"] / rope["original_max_position_embeddings"]
    if rope.get("truncate", True) is None:
        rope["truncate"] = False
    # What the scaling does not read, transformers passes over too.
    idle = RopeParameters.model_fields.keys() - ROPE_READS.get(str(rope.get("rope_type", "default")), ())
    idle -= {"rope_type", "rope_theta", "partial_rotary_factor"}
    given = {k: v for k, v in rope.items() if (v is not None or k == "rope_type") and k not in idle}
    try:
        RopeParameters(**given)
    except ValidationError as error:
        raise UsageError(f"{where}: rope_parameters: {explain(error.errors()[0])}") from None
    return given
