"""Hugging Face's `config.json` of the families that Cadre builds: what it leaves out, what it spells in two ways, what says
nothing about the model."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cadre.errors import UsageError, explain
from cadre.model.families import FAMILIES, OTHER_NAMES
from cadre.model.rope_parameters import ROPE_READS, RopeParameters

if TYPE_CHECKING:
    from cadre.model.config import ModelConfig

# Fields of a config.json that say nothing about the function the model computes; nor do those that begin with _.
IRRELEVANT = frozenset((
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "pretraining_tp", "ep_size", "attention_dropout", "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha",
    "seq_aux", "router_jitter_noise", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward", "tokenizer_class", "quantization_config",
    "keys_to_ignore_at_inference", "num_mtp_layers", "qk_head_dim", "mlp_layer_types",
    "unsloth_fixed", "unsloth_version", "embedding_initializer_range",
))  # fmt: skip

# The shape of a mixture of experts.
EXPERT_FIELDS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group",
                 "topk_group")  # fmt: skip
# Of these a family like DeepSeek's has more than the others.
_SHARING_FIELDS = ("n_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "num_nextn_predict_layers")


def our_spelling(values: dict[str, Any]) -> dict[str, Any]:
    """A model's fields by our names, where its family spells them otherwise. transformers knows the number of experts by three
    names, of which it writes now one and now another. Raises `UsageError` where two of them say different numbers."""
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None or family.scoring is None:
        return values
    values = dict(values)
    for ours, theirs in family.spelling.items():
        if theirs in values and ours not in values:
            values[ours] = values.pop(theirs)
    for name in ("num_experts", "num_local_experts"):
        count = values.pop(name, None)
        known = values.get("n_routed_experts")
        if count is not None and known is None:
            values["n_routed_experts"] = count
        elif count is not None and count != known:
            raise UsageError(f"{name} is {count!r} and n_routed_experts {known!r}: two names of one number: give one")
    return values


def fields_from_hf(values: dict[str, Any], where: str, known: Container[str]) -> dict[str, Any]:
    """The fields of a `ModelConfig`, whose names are `known`, from the content of a `config.json`. Raises `UsageError` for
    what Cadre cannot compute."""
    name = values.get("model_type")
    kind, defaults = OTHER_NAMES.get(str(name), (name, {}))
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UsageError(f"{where}: model_type is {name!r}; Cadre builds {', '.join((*FAMILIES, *OTHER_NAMES))}")
    family = FAMILIES[kind]
    try:
        values = {**defaults, **our_spelling({**values, "model_type": kind})}
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if name == "youtu":
        values["first_k_dense_replace"] = values["num_hidden_layers"]
    if name == "glm4_moe_lite":
        values["first_k_dense_replace"] = _first_dense(values, where)
    rope = _rope_from_hf(values, kind, where)
    if values.pop("moe_layer_freq", 1) != 1:
        raise UsageError(f"{where}: moe_layer_freq must be 1: experts in every layer after first_k_dense_replace")
    if values.pop("mlp_bias", False):
        raise UsageError(f"{where}: mlp_bias is true; Cadre's feed-forward layers have no bias")
    if "num_nextn_predict_layers" not in values and "num_mtp_layers" in values:
        values["num_nextn_predict_layers"] = values["num_mtp_layers"]
    if family.latent:
        values.pop("head_dim", None)  # transformers stores qk_rope_head_dim under this name
    if kind == "deepseek_v2":
        values.pop("rope_interleave", None)  # it always turns adjacent pairs, whatever a file says
    if kind.startswith("qwen"):
        _qwen(values, kind, where)
    if family.bias != "switch":
        values.pop("attention_bias", None)  # of no effect there
    if family.scoring is None:
        for name in ("n_routed_experts", "num_experts_per_tok", "num_local_experts"):
            values.pop(name, None)
    merged = {**family.defaults, **{k: v for k, v in values.items() if k not in IRRELEVANT and k[:1] != "_"}}
    merged.pop("rope_theta", None)
    merged["rope_parameters"] = rope
    if not merged.get("first_k_dense_replace") and family.scoring and "intermediate_size" not in values:
        merged.pop("intermediate_size", None)  # no layer is dense
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


def _first_dense(values: dict[str, Any], where: str) -> Any:
    """How many of the first layers of a glm4_moe_lite are dense, by the field that transformers reads or, in its absence, the
    publisher's, of which transformers knows one value."""
    types, dense = values.get("mlp_layer_types"), values.get("first_k_dense_replace")
    if types is None:
        if dense != 1:
            raise UsageError(f"{where}: first_k_dense_replace is {dense!r}; without mlp_layer_types it must be 1")
        return dense
    layers, first = values.get("num_hidden_layers"), types.count("dense") if isinstance(types, list) else 0
    if not isinstance(types, list) or types != ["dense"] * first + ["sparse"] * (len(types) - first) or len(types) != layers:
        raise UsageError(f"{where}: mlp_layer_types is {types!r}; it must be {layers} in all, dense ones first, then sparse")
    return first


def _qwen(values: dict[str, Any], kind: str, where: str) -> None:
    """What the qwen families say of sliding windows, which Cadre has not, and of dense layers among sparse ones, which may be
    the first ones: taken out of `values`, there as `first_k_dense_replace`."""
    window = values.pop("sliding_window", None)
    values.pop("max_window_layers", None)
    types = values.pop("layer_types", None) or []
    if values.pop("use_sliding_window", False) and window is not None:
        raise UsageError(f"{where}: use_sliding_window is true; Cadre's attention sees all positions: it must be false")
    if any(kind != "full_attention" for kind in types):
        raise UsageError(f"{where}: layer_types is {types}; Cadre's attention sees all positions: each must be full_attention")
    if kind == "qwen3_moe":
        values.pop("use_qk_norm", None)  # written by Qwen, always so in transformers
        only, step = values.pop("mlp_only_layers", None) or [], values.pop("decoder_sparse_step", None)
        if step not in (None, 1):
            raise UsageError(f"{where}: decoder_sparse_step is {step}; it must be 1: experts in every layer but the first ones")
        if not isinstance(only, list) or only != list(range(len(only))):
            raise UsageError(f"{where}: mlp_only_layers is {only}; it must be the first layers in order, such as [0, 1]")
        values.setdefault("first_k_dense_replace", len(only))


def fields_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a model's `config.json`."""
    rope, family = config.rope_parameters, FAMILIES[config.model_type]
    keep = {"rope_type", "rope_theta", *(k for k in ROPE_READS[rope.rope_type] if getattr(rope, k) is not None)}
    if config.model_type == "glm4_moe":
        keep.add("partial_rotary_factor")
    fields = config.model_dump(exclude={"rope_parameters"})
    if family.latent:
        dropped = {"head_dim"}
    else:
        dropped = {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                   "rope_interleave"}  # fmt: skip
    if family.qk_norm != "switch":
        dropped.add("use_qk_norm")
    if family.bias != "switch":
        dropped.add("attention_bias")
    if not family.like_deepseek:
        dropped |= {*_SHARING_FIELDS, "first_k_dense_replace", "scoring_func", "topk_method"}
    if family.scoring is None:
        dropped |= {*EXPERT_FIELDS, "norm_topk_prob"}
    elif family.normed and not family.like_deepseek:
        dropped.add("norm_topk_prob")
    if config.intermediate_size is None:
        dropped.add("intermediate_size")  # no layer is dense, and transformers wants a number or nothing
    result = {k: v for k, v in fields.items() if k not in dropped}
    if family.scoring is not None and not config.has_experts:
        # transformers reads these even where no layer holds experts.
        needed = dict(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=1)
        result.update({name: value for name, value in needed.items() if result[name] is None})
    if config.model_type == "qwen3_moe":
        result.update(mlp_only_layers=list(range(config.first_k_dense_replace)), decoder_sparse_step=1)
    for ours, theirs in family.spelling.items():
        result[theirs] = result.pop(ours)
    result["rope_parameters"] = rope.model_dump(include=keep)
    result["architectures"] = [family.architecture]
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
    theta = FAMILIES[kind].defaults.get("rope_theta") if theta is None else theta
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    partial = values.pop("partial_rotary_factor", 0.5 if kind == "glm4_moe" else None)
    if kind == "glm4_moe":
        rope.setdefault("partial_rotary_factor", 1.0 if partial is None else partial)  # null turns all of a head
    elif partial is not None:
        rope.setdefault("partial_rotary_factor", partial)
    longest = {**FAMILIES[kind].defaults, **values}
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
