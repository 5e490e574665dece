"""What a model is: one validated object whose fields carry their Hugging Face names.

Arithmetic and checks only; this file imports no torch, so `cadre.plan` can count models that fit on no machine here.

`model_type` picks a corner of the grid, attention x feed-forward, and with it the Hugging Face architecture that a
saved model belongs to:

    deepseek_v3   latent attention, sigmoid-scored experts with a correction bias (DeepSeek-V3 report, sections 2.1-2.2)
    deepseek_v2   latent attention, softmax-scored experts (DeepSeek-V2 report, sections 2.1-2.2)
    glm4_moe      grouped-query attention, deepseek_v3's experts
    qwen3_moe     grouped-query attention with queries and keys normed, softmax-scored experts, none of them shared
    olmoe         the same, with all heads normed as one
    mixtral       the same without these norms, its experts' weights always summing to 1
    llama         grouped-query attention, dense feed-forward
    qwen2         the same with biases on queries, keys and values
    qwen3         the same with queries and keys normed

What else sets them apart is in families.py, with the names under which others are the same as one of them. Latent attention
with dense feed-forward is `deepseek_v3` with every layer dense (`first_k_dense_replace` = all layers).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cadre.errors import UsageError, did_you_mean, explain
from cadre.files import read_json_object
from cadre.model.families import FAMILIES, Family, ModelType
from cadre.model.hf_config import EXPERT_FIELDS, fields_from_hf, fields_to_hf, our_spelling
from cadre.model.rope_parameters import ROPE_READS, RopeParameters

# Far beyond any model: a config that asks for more is damaged, and building it would take hours.
MOST_LAYERS = 10_000
_MOST_WIDTH, _MOST_PARTS, _MOST_WORDS, _MOST_POSITIONS = 2**20, 2**16, 2**24, 2**40
# With these no tensor has so many elements that their bytes could not be counted in 63 bits.
_MOST = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank",
                     "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), _MOST_WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_routed_experts", "n_shared_experts"), _MOST_PARTS),
    **dict.fromkeys(("num_hidden_layers", "num_nextn_predict_layers"), MOST_LAYERS),
    "vocab_size": _MOST_WORDS,
    "max_position_embeddings": _MOST_POSITIONS,
}  # fmt: skip


class ModelConfig(BaseModel):
    """The shape of a model. Field names are Hugging Face's; every value is checked: a config that exists can be built.

    Raises `UsageError`, naming the field, its value and the allowed range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model_type: ModelType = "deepseek_v3"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_bias: bool = False
    rope_parameters: RopeParameters = RopeParameters()

    # Latent attention.
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool = True

    # Grouped-query attention; MHA has as many key-value heads as heads, MQA has one.
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    use_qk_norm: bool = False

    # Experts.
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid", "softmax"] | None = None
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] | None = None

    # Multi-token prediction modules (DeepSeek-V3 report, section 2.2).
    num_nextn_predict_layers: int = 0

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def attention(self) -> Literal["latent", "grouped"]:
        return "latent" if self.family.latent else "grouped"

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias and self.family.output_bias

    @property
    def qk_norm(self) -> Literal["head", "all"] | None:
        """Whether queries and keys are normed head by head with one weight, or all heads at once."""
        return None if not self.use_qk_norm else "all" if self.family.qk_norm == "all" else "head"

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        if self.attention == "latent":
            return _given(self.qk_nope_head_dim) + _given(self.qk_rope_head_dim)
        return _given(self.head_dim)

    @property
    def value_head_dim(self) -> int:
        return _given(self.v_head_dim if self.attention == "latent" else self.head_dim)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions turn with position."""
        if self.attention == "latent":
            return _given(self.qk_rope_head_dim)
        return int(_given(self.head_dim) * self.rope_parameters.partial_rotary_factor)

    @property
    def total_layers(self) -> int:
        """Decoder blocks with those of the multi-token prediction modules, which are numbered after the main ones."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_sparse(self, layer: int) -> bool:
        """Whether block `layer` holds experts. Multi-token prediction blocks follow the main ones in number."""
        return self.family.scoring is not None and layer >= self.first_k_dense_replace

    @property
    def has_experts(self) -> bool:
        return self.is_sparse(self.total_layers - 1)

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text, each of them by itself."""
        ends = self.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else ends

    # ------------------------------------------------------------------------------------------------- what is allowed

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Values that follow from others."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("eos_token_id") == []:
            values["eos_token_id"] = None
        kind = values.get("model_type", "deepseek_v3")
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values.get("num_attention_heads")
        family = FAMILIES.get(str(kind))
        if family is None:
            return values
        divisible = _int(values, "hidden_size") and _int(values, "num_attention_heads")
        if not family.latent and values.get("head_dim") is None and divisible:
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        if family.bias == "always":
            values.setdefault("attention_bias", True)
        if family.qk_norm in ("head", "all"):
            values.setdefault("use_qk_norm", True)
        if family.scoring is not None:
            values.setdefault("scoring_func", family.scoring)
            values.setdefault("norm_topk_prob", family.normed or family.scoring == "sigmoid")
            grouped = _int(values, "n_group") and values["n_group"] > 1
            softmax = "group_limited_greedy" if grouped and family.like_deepseek else "greedy"
            values.setdefault("topk_method", "noaux_tc" if family.scoring == "sigmoid" else softmax)
            blocks = [values.get(name, 0) for name in ("num_hidden_layers", "num_nextn_predict_layers")]
            dense = values.get("first_k_dense_replace")
            if all(isinstance(value, int) for value in (dense, *blocks)) and dense >= sum(blocks):
                for name in EXPERT_FIELDS:
                    values.pop(name, None)  # no layer would read it
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        _at_least(self, 1, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                  "max_position_embeddings")  # fmt: skip
        _at_least(self, 0, "num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                _refuse(name, getattr(self, name), f"at most {most:,}")
        if not 0 < self.rms_norm_eps < 1:
            _refuse("rms_norm_eps", self.rms_norm_eps, "a number between 0 and 1")
        if not 0 < self.initializer_range < 1:
            _refuse("initializer_range", self.initializer_range, "a number between 0 and 1")
        if not (math.isfinite(self.routed_scaling_factor) and self.routed_scaling_factor > 0):
            _refuse("routed_scaling_factor", self.routed_scaling_factor, "a number above 0")
        if self.attention == "latent":
            self._check_latent()
        else:
            self._check_grouped()
        if self.family.scoring is None:
            self._check_dense_only()
        else:
            self._check_experts()
        self._check_rope()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    _refuse(name, token, f"a token id from 0 to {self.vocab_size - 1}, below vocab_size")
        return self

    def _check_latent(self) -> None:
        _needed(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        _at_least(self, 1, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        _absent(self, "latent attention", "head_dim", "use_qk_norm")
        if self.num_key_value_heads != self.num_attention_heads:
            _refuse(
                "num_key_value_heads", self.num_key_value_heads,
                f"{self.num_attention_heads}, the number of heads: latent attention has no groups",
            )  # fmt: skip

    def _check_grouped(self) -> None:
        _absent(self, "grouped-query attention", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                "v_head_dim", "rope_interleave")  # fmt: skip
        _at_least(self, 1, "num_key_value_heads", "head_dim")
        if self.num_attention_heads % _given(self.num_key_value_heads):
            _refuse("num_key_value_heads", self.num_key_value_heads,
                    f"a divisor of num_attention_heads ({self.num_attention_heads})")  # fmt: skip
        kind, family = self.model_type, self.family
        if self.use_qk_norm and family.qk_norm == "never":
            _refuse("use_qk_norm", True, f"false: {kind} has no query-key norm (glm4_moe and the qwen3 families have)")
        if not self.use_qk_norm and family.qk_norm in ("head", "all"):
            _refuse("use_qk_norm", False, f"true: {kind} always norms queries and keys")
        if self.attention_bias != (family.bias == "always") and family.bias != "switch":
            _refuse("attention_bias", self.attention_bias, f"{str(not self.attention_bias).lower()} in {kind}")
        if family.qk_norm == "all" and _given(self.head_dim) * self.num_attention_heads != self.hidden_size:
            _refuse(
                "head_dim",
                self.head_dim,
                f"hidden_size ({self.hidden_size}) by num_attention_heads ({self.num_attention_heads}) in {kind}",
            )

    def _check_dense_only(self) -> None:
        _absent(self, f"{self.model_type}, which is dense", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
                "moe_intermediate_size", "first_k_dense_replace", "scoring_func", "topk_method",
                "num_nextn_predict_layers", "n_group", "topk_group", "norm_topk_prob",
                "routed_scaling_factor")  # fmt: skip
        _needed(self, "intermediate_size")

    def _check_experts(self) -> None:
        kind, family = self.model_type, self.family
        if not family.like_deepseek:
            _absent(self, kind, "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor",
                    "num_nextn_predict_layers")  # fmt: skip
        if not family.dense_layers and not self.first_k_dense_replace:
            _absent(self, f"{kind}, whose layers are all sparse", "intermediate_size")
        if self.first_k_dense_replace > self.total_layers:
            _refuse("first_k_dense_replace", self.first_k_dense_replace,
                    f"0 to {self.total_layers}, the number of blocks")  # fmt: skip
        if self.first_k_dense_replace > 0:
            _needed(self, "intermediate_size")
        if self.has_experts:
            _needed(self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
            _at_least(self, 1, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
            self._check_groups()
            self._check_router()

    def _check_groups(self) -> None:
        experts, top_k = _given(self.n_routed_experts), _given(self.num_experts_per_tok)
        if experts % self.n_group:
            divisors = ", ".join(str(d) for d in range(1, min(experts, 4096) + 1) if experts % d == 0)
            _refuse("n_group", self.n_group, f"a divisor of n_routed_experts ({experts}), such as {divisors}")
        if self.topk_group > self.n_group:
            _refuse("topk_group", self.topk_group, f"1 to n_group ({self.n_group})")
        per_group = experts // self.n_group
        reachable = self.topk_group * per_group
        if top_k > reachable:
            _refuse("num_experts_per_tok", top_k,
                    f"1 to {reachable}: topk_group ({self.topk_group}) groups of {per_group} experts each")  # fmt: skip

    def _check_router(self) -> None:
        kind, family, experts = self.model_type, self.family, _given(self.n_routed_experts)
        if self.scoring_func != family.scoring:
            _refuse("scoring_func", self.scoring_func, f"{family.scoring} in {kind}")
        if family.normed is not None and self.norm_topk_prob != family.normed:
            said = "never" if self.norm_topk_prob else "always"
            _refuse("norm_topk_prob", self.norm_topk_prob,
                    f"{str(family.normed).lower()}: {kind} {said} normalises in transformers, deepseek_v3 may")  # fmt: skip
        if family.scoring == "softmax":
            allowed = ("greedy", "group_limited_greedy") if family.like_deepseek else ("greedy",)
            if self.topk_method not in allowed:
                _refuse("topk_method", self.topk_method, f"{' or '.join(allowed)} in {kind}")
            if self.topk_method == "greedy" and self.n_group > 1:
                _refuse("topk_method", "greedy", f"group_limited_greedy, since n_group is {self.n_group}")
        else:
            if self.topk_method != "noaux_tc":
                _refuse("topk_method", self.topk_method, f"noaux_tc in {kind}")
            two = "a group is scored by its two best experts"
            if experts // self.n_group < 2 <= experts:
                _refuse("n_group", self.n_group, f"at most {experts // 2}: {two}, so it needs two")
            if experts < 2:
                _refuse("n_routed_experts", experts, f"at least 2 in {kind}: {two}")

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if not 0 < rope.partial_rotary_factor <= 1:
            _refuse("rope_parameters.partial_rotary_factor", rope.partial_rotary_factor, "above 0 and at most 1")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            name = "qk_rope_head_dim" if self.attention == "latent" else "head_dim x partial_rotary_factor"
            _refuse(name, self.rotary_dim, "an even number, at least 2: rotary dimensions turn in pairs")
        if self.model_type != "glm4_moe" and rope.partial_rotary_factor != 1:
            _refuse("rope_parameters.partial_rotary_factor", rope.partial_rotary_factor,
                    f"1 in {self.model_type} (glm4_moe turns part of a head)")  # fmt: skip
        for name, value in rope:
            if isinstance(value, float) and not math.isfinite(value):
                _refuse(f"rope_parameters.{name}", value, "a finite number")
        for name, field in RopeParameters.model_fields.items():
            idle = name not in ("rope_type", "rope_theta", "partial_rotary_factor", *ROPE_READS[rope.rope_type])
            if idle and getattr(rope, name) != field.default:
                readers = " or ".join(kind for kind, reads in ROPE_READS.items() if name in reads)
                raise ValueError(f"rope_parameters.{name} is {getattr(rope, name)}, but rope_type {rope.rope_type} "
                                 f"does not read it: leave it out, or set rope_type to {readers}")  # fmt: skip
        if not rope.rope_theta > 1:
            _refuse("rope_parameters.rope_theta", rope.rope_theta, "a number above 1")
        if rope.factor < 1:
            _refuse("rope_parameters.factor", rope.factor, "a number of at least 1")
        context = rope.original_max_position_embeddings
        if rope.rope_type in ("yarn", "llama3") and (context is None or context < 1):
            _refuse("rope_parameters.original_max_position_embeddings", context,
                    f"the context length before {rope.rope_type} scaling, at least 1")  # fmt: skip
        if context is not None and context > _MOST_POSITIONS:
            _refuse("rope_parameters.original_max_position_embeddings", context, f"at most {_MOST_POSITIONS:,}")
        if not 0 < rope.beta_slow <= rope.beta_fast:  # equal in Kimi K2
            _refuse("rope_parameters.beta_slow", rope.beta_slow, f"above 0 and at most beta_fast ({rope.beta_fast})")
        if not 0 < rope.low_freq_factor < rope.high_freq_factor:
            _refuse("rope_parameters.low_freq_factor", rope.low_freq_factor,
                    f"above 0 and below high_freq_factor ({rope.high_freq_factor})")  # fmt: skip
        for name in ("mscale", "mscale_all_dim"):
            if (getattr(rope, name) or 0) < 0:
                _refuse(f"rope_parameters.{name}", getattr(rope, name), "at least 0")
        if rope.attention_factor is not None and rope.attention_factor <= 0:
            _refuse("rope_parameters.attention_factor", rope.attention_factor, "a number above 0")

    # ------------------------------------------------------------------------------------------------- in and out

    if not TYPE_CHECKING:  # who completes or checks names sees those of the fields

        def __init__(self, **values: Any) -> None:
            values = our_spelling(values)
            for name in values:
                if name not in type(self).model_fields:
                    raise UsageError(f"{name} is not a field of a model{did_you_mean(name, type(self).model_fields)}")
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise UsageError(explain(error.errors()[0])) from None

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Build from the content of a Hugging Face `config.json`, of either spelling of the rotary fields.

        What the file leaves out takes transformers' default for the family; what Cadre cannot compute is refused by
        name.
        """
        fields = fields_from_hf(values, where, cls.model_fields)
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a `config.json`. Raises `UsageError` if it is missing, no JSON or no model Cadre knows."""
        path = Path(path)
        return cls.from_hf(read_json_object(path), where=str(path))

    def to_hf(self) -> dict[str, Any]:
        """The content of this model's `config.json`: every field its family has, no default left to the reader."""
        return fields_to_hf(self)


def _int(values: dict[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int) and values[name] > 0


def _given(value: int | None) -> int:
    if value is None:
        raise ValueError("a field this attention or feed-forward needs is not set")
    return value


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ValueError(f"{name} is {value}; it must be {allowed}")


def _at_least(config: ModelConfig, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            _refuse(name, value, f"at least {low}")


def _needed(config: ModelConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) is None:
            raise ValueError(f"{name} is missing; {config.model_type} needs it: a whole number, at least 1")


def _absent(config: ModelConfig, kind: str, *names: str) -> None:
    for name in names:
        value, default = getattr(config, name), ModelConfig.model_fields[name].default
        if value is not None and value != default and not (default is None and value == 0):
            raise ValueError(f"{name} is {value}, but it has no meaning in {kind}: leave it out")
