"""Small model shapes for tests: one plain example per family, and a hypothesis strategy over all of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from cadre.model.config import ModelConfig
from cadre.model.families import FAMILIES as FAMILY

FAMILIES = ("deepseek_v3", "deepseek_v2", "glm4_moe", "qwen3_moe", "mixtral", "olmoe", "llama", "qwen2", "qwen3")

SPARSE = tuple(kind for kind in FAMILIES if FAMILY[kind].scoring is not None)

_COMMON = dict(vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=64)
_LATENT = dict(kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
_GROUPED = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
_EXPERTS = dict(
    intermediate_size=20, first_k_dense_replace=1, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=7
)
_ALL_SPARSE = dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=7)
_SMALL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_COMMON, **_LATENT, **_EXPERTS, "n_shared_experts": 1, "q_lora_rank": 9},
    "deepseek_v2": {**_COMMON, **_LATENT, **_EXPERTS, "n_shared_experts": 2},
    "glm4_moe": {**_COMMON, **_EXPERTS, **_GROUPED, "use_qk_norm": True, "rope_parameters": {"partial_rotary_factor": 0.5}},
    "qwen3_moe": {**_COMMON, **_EXPERTS, **_GROUPED, "norm_topk_prob": True},
    "mixtral": {**_COMMON, **_GROUPED, **_ALL_SPARSE},
    "olmoe": {**_COMMON, **_ALL_SPARSE, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama": {**_COMMON, **_GROUPED, "intermediate_size": 20},
    "qwen2": {**_COMMON, **_GROUPED, "intermediate_size": 20},
    "qwen3": {**_COMMON, **_GROUPED, "intermediate_size": 20},
}


def small(model_type: str, /, **changes: Any) -> ModelConfig:
    """A small valid model of a family, with changes."""
    return ModelConfig(**{"model_type": model_type, **_SMALL[model_type], **changes})


@st.composite
def configs(draw: DrawFn, families: tuple[str, ...] = FAMILIES) -> ModelConfig:
    """Any valid small model: every optional part present and absent, sizes that share no factors."""

    def whole(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def maybe() -> bool:
        return draw(st.booleans())

    kind = draw(st.sampled_from(families))
    heads = whole(1, 4)
    values: dict[str, Any] = dict(
        model_type=kind, vocab_size=whole(5, 40), hidden_size=whole(3, 24), num_hidden_layers=whole(1, 3),
        num_attention_heads=heads, tie_word_embeddings=maybe(),
        max_position_embeddings=whole(8, 99),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])), initializer_range=draw(st.sampled_from([0.006, 0.02])),
        bos_token_id=draw(st.sampled_from([None, 0])),
        eos_token_id=draw(st.sampled_from([None, 1, [1, 2]])),
    )  # fmt: skip
    family = FAMILY[kind]
    if family.bias == "switch":
        values["attention_bias"] = maybe()
    if family.latent:
        values.update(kv_lora_rank=whole(1, 12), qk_nope_head_dim=whole(1, 9), qk_rope_head_dim=2 * whole(1, 3))
        values.update(q_lora_rank=draw(st.sampled_from([None, 1, 7])), v_head_dim=whole(1, 9))
        values["rope_interleave"] = kind == "deepseek_v2" or maybe()  # no file says otherwise of deepseek_v2
    else:
        values.update(head_dim=4 * whole(1, 3), num_key_value_heads=heads // draw(st.sampled_from(_divisors(heads))))
    if family.qk_norm == "all":
        values["hidden_size"] = heads * values["head_dim"]
    if family.scoring is None:
        values.update(intermediate_size=whole(1, 20))
    else:
        values.update(_expert_shape(draw, kind, values["num_hidden_layers"]))
    if family.qk_norm == "switch":
        values.update(use_qk_norm=maybe())
    values["rope_parameters"] = _rope(draw, kind)
    return ModelConfig(**values)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _expert_shape(draw: DrawFn, kind: str, layers: int) -> dict[str, Any]:
    family = FAMILY[kind]
    if not family.like_deepseek:
        experts, dense = draw(st.integers(1, 8)), draw(st.integers(0, layers)) if family.dense_layers else 0
        plain: dict[str, Any] = dict(
            first_k_dense_replace=dense, n_routed_experts=experts, num_experts_per_tok=draw(st.integers(1, experts)),
            intermediate_size=draw(st.integers(1, 20)) if dense else None, moe_intermediate_size=draw(st.integers(1, 9)),
        )  # fmt: skip
        return plain | ({"norm_topk_prob": draw(st.booleans())} if family.normed is None else {})
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    chosen = draw(st.integers(1, groups))
    modules = draw(st.integers(0, 2))
    dense = draw(st.integers(0, layers + modules))
    values = dict(
        num_nextn_predict_layers=modules, first_k_dense_replace=dense, n_group=groups, topk_group=chosen,
        intermediate_size=draw(st.integers(1, 20)) if dense else draw(st.sampled_from([None, 5])),
        n_routed_experts=groups * per_group, num_experts_per_tok=draw(st.integers(1, chosen * per_group)),
        n_shared_experts=draw(st.integers(0, 2)), moe_intermediate_size=draw(st.integers(1, 9)),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip
    if kind != "deepseek_v2":
        values["norm_topk_prob"] = draw(st.booleans())
    return values


def _rope(draw: DrawFn, kind: str) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_theta": draw(st.sampled_from([100.0, 10000.0]))}
    scaling = draw(st.sampled_from(["default", "linear", "yarn", "llama3"]))
    if kind == "glm4_moe":
        values["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    values["rope_type"] = scaling
    if scaling != "default":
        values["factor"] = draw(st.sampled_from([1.0, 4.0, 40.0]))
    if scaling in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = draw(st.integers(4, 64))
    if scaling == "yarn":
        values["mscale"] = draw(st.sampled_from([None, 0.707, 1.0]))
        values["mscale_all_dim"] = draw(st.sampled_from([None, 0.707]))
        values["beta_fast"] = draw(st.sampled_from([32.0, 4.0]))
        values["truncate"] = draw(st.booleans())
    return values
