from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from transformers import Glm4MoeLiteConfig, YoutuConfig

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from tests import published
from tests.shapes import FAMILIES, configs, small

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}

# family, changes, what the message must say: the field, its value and what is allowed.
REFUSED = [
    *(
        ("deepseek_v3", {name: 0}, f"{name} is 0; it must be at least 1")
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("max_position_embeddings", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"),
            *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
        )
    ),
    *(
        ("deepseek_v3", {name: -1}, f"{name} is -1; it must be at least 0")
        for name in ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace")
    ),
    *(
        ("deepseek_v3", {name: None}, f"{name} is missing; deepseek_v3 needs it")
        for name in (
            *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size"),
            *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        )
    ),
    ("llama", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; it must be at most 10,000"),
    *(
        ("deepseek_v3", {name: value}, f"{name} is {value}; it must be at most {most:,}")
        for names, most in (
            (("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"), 2**20),
            (("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 2**20),
            (("n_routed_experts", "n_shared_experts"), 2**16),
            (("vocab_size",), 2**24),
            (("max_position_embeddings",), 2**40),
        )
        for name in names
        for value in (most + 1, 2**63, 10**30)
    ),
    ("llama", {"num_attention_heads": 2**63, "head_dim": 8}, "num_attention_heads is 9223372036854775808; it must be at most"),
    ("llama", {"head_dim": 2**63}, "head_dim is 9223372036854775808; it must be at most 1,048,576"),
    (
        "llama",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 10**400}},
        "rope_parameters.original_max_position_embeddings is 10",
    ),
    ("llama", {"intermediate_size": None}, "intermediate_size is missing; llama needs it"),
    ("llama", {"intermediate_size": 0}, "intermediate_size is 0; it must be at least 1"),
    ("llama", {"head_dim": 0}, "head_dim is 0; it must be at least 1"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be at least 1"),
    # Types.
    ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2'; input should be 'deepseek_v3', 'deepseek_v2', 'glm4_moe', "),
    ("llama", {"vocab_size": "31"}, "vocab_size is '31'; input should be a valid integer"),
    ("llama", {"vocab_size": True}, "vocab_size is True; input should be a valid integer"),
    ("llama", {"hidden_size": 24.0}, "hidden_size is 24.0; input should be a valid integer"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; input should be a valid boolean"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; input should be 'silu'"),
    ("llama", {"rope_parameters": 3}, "rope_parameters is 3; input should be"),
    # Numbers.
    ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be a number between 0 and 1"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number between 0 and 1"),
    ("llama", {"initializer_range": 1.5}, "initializer_range is 1.5; it must be a number between 0 and 1"),
    ("deepseek_v3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0; it must be a number above 0"),
    ("deepseek_v3", {"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf; it must be a number above 0"),
    *(
        ("llama", {name: value}, f"{name} is {wrong}; it must be a token id from 0 to 30")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        for value, wrong in ((31, 31), (-1, -1), *(([[1, 31], 31],) if name == "eos_token_id" else ()))
    ),
    # Heads.
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads is 1; it must be 3, the number of heads"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3; it must be a divisor of num_attention_heads (4)"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm is True; it must be false: llama has no query-key norm"),
    ("deepseek_v3", {"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; it must be an even number, at least 2"),
    ("deepseek_v3", {"qk_rope_head_dim": -2}, "qk_rope_head_dim is -2; it must be at least 1"),
    ("llama", {"head_dim": 7}, "head_dim x partial_rotary_factor is 7; it must be an even number, at least 2"),
    ("glm4_moe", {"head_dim": 6}, "head_dim x partial_rotary_factor is 3; it must be an even number, at least 2"),
    # Fields without meaning in the family.
    ("deepseek_v3", {"head_dim": 8}, "head_dim is 8, but it has no meaning in latent attention: leave it out"),
    ("deepseek_v2", {"use_qk_norm": True}, "use_qk_norm is True, but it has no meaning in latent attention"),
    *(
        ("llama", {name: 4}, f"{name} is 4, but it has no meaning in grouped-query attention")
        for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    ),
    ("glm4_moe", {"rope_interleave": False}, "rope_interleave is False, but it has no meaning in grouped-query"),
    *(
        ("llama", {name: value}, f"{name} is {value}, but it has no meaning in llama, which is dense")
        for name, value in (
            *(("n_routed_experts", 4), ("n_shared_experts", 1), ("num_experts_per_tok", 2), ("moe_intermediate_size", 8)),
            *(("first_k_dense_replace", 1), ("num_nextn_predict_layers", 1), ("scoring_func", "sigmoid"), ("n_group", 2)),
            *(("topk_group", 2), ("norm_topk_prob", False), ("routed_scaling_factor", 2.0), ("topk_method", "noaux_tc")),
        )
    ),
    # Experts.
    ("deepseek_v3", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3; it must be 0 to 2, the number of blocks"),
    ("deepseek_v2", {"n_group": "2"}, "n_group is '2'; input should be a valid integer"),
    ("deepseek_v3", {"n_group": 4}, "n_group is 4; it must be a divisor of n_routed_experts (6), such as 1, 2, 3, 6"),
    ("deepseek_v3", {"n_group": 6, "topk_group": 2}, "n_group is 6; it must be at most 3: a group is scored by its two"),
    ("glm4_moe", {"n_group": 2, "topk_group": 3}, "topk_group is 3; it must be 1 to n_group (2)"),
    ("deepseek_v3", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7; it must be 1 to 6"),
    (
        "deepseek_v2",
        {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 5},
        "num_experts_per_tok is 5; it must be 1 to 4: topk_group (2) groups of 2 experts each",
    ),
    ("deepseek_v3", {"n_routed_experts": 1, "num_experts_per_tok": 1}, "n_routed_experts is 1; it must be at least 2"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is softmax; it must be sigmoid in deepseek_v3"),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func is softmax; it must be sigmoid in glm4_moe"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is sigmoid; it must be softmax in deepseek_v2"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True; it must be false"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is noaux_tc; it must be greedy or group_limited_greedy"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is greedy; it must be noaux_tc in deepseek_v3"),
    *(
        (kind, {name: 2}, f"{name} is 2, but it has no meaning in {kind}")
        for kind in ("qwen3_moe", "mixtral", "olmoe")
        for name in ("n_shared_experts", "n_group", "topk_group", "num_nextn_predict_layers")
    ),
    ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5, but it has no meaning in qwen3_moe"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is False; it must be true: mixtral always normalises"),
    ("olmoe", {"intermediate_size": 5}, "intermediate_size is 5, but it has no meaning in olmoe, whose layers are all sparse"),
    ("olmoe", {"head_dim": 8}, "head_dim is 8; it must be hidden_size (24) by num_attention_heads (4) in olmoe"),
    ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm is False; it must be true: qwen3_moe always norms queries and keys"),
    ("qwen2", {"use_qk_norm": True}, "use_qk_norm is True; it must be false: qwen2 has no query-key norm"),
    ("qwen2", {"attention_bias": False}, "attention_bias is False; it must be true in qwen2"),
    ("mixtral", {"attention_bias": True}, "attention_bias is True; it must be false in mixtral"),
    (
        "qwen3_moe",
        {"topk_method": "group_limited_greedy"},
        "topk_method is group_limited_greedy; it must be greedy in qwen3_moe",
    ),
    (
        "deepseek_v2",
        {"topk_method": "greedy", "n_group": 2},
        "topk_method is greedy; it must be group_limited_greedy, since n_group is 2",
    ),
    # Rotary embedding.
    *(
        (family, {"rope_parameters": rope}, f"rope_parameters.{message}")
        for family, rope, message in (
            ("llama", {"rope_theta": 1.0}, "rope_theta is 1.0; it must be a number above 1"),
            ("llama", {"rope_theta": float("nan")}, "rope_theta is nan; it must be a finite number"),
            ("llama", {"rope_theta": "big"}, "rope_theta is 'big'; input should be a valid number"),
            ("llama", {"theta": 5}, "theta is not a known field"),
            ("llama", {"rope_type": "dynamic"}, "rope_type is 'dynamic'; input should be 'default', 'linear', 'yarn' or"),
            ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1 in llama"),
            ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1 in deepseek_v3"),
            ("glm4_moe", {"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0; it must be above 0 and at most 1"),
            ("llama", {"factor": 4.0}, "factor is 4.0, but rope_type default does not read it: leave it out, or set"),
            ("llama", {**LLAMA3, "beta_fast": 8.0}, "beta_fast is 8.0, but rope_type llama3 does not read it"),
            ("llama", {"rope_type": "linear", "factor": 0.5}, "factor is 0.5; it must be a number of at least 1"),
            ("llama", {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings is None; it must be the"),
            ("llama", {**LLAMA3, "original_max_position_embeddings": -8}, "original_max_position_embeddings is -8; it"),
            ("llama", {**YARN, "beta_slow": 0.0}, "beta_slow is 0.0; it must be above 0 and at most beta_fast (32.0)"),
            ("llama", {**YARN, "beta_slow": 40.0}, "beta_slow is 40.0; it must be above 0 and at most beta_fast (32.0)"),
            ("llama", {**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor is 4.0; it must be above 0 and below high"),
            ("deepseek_v3", {**YARN, "mscale": -1.0}, "mscale is -1.0; it must be at least 0"),
            ("deepseek_v3", {**YARN, "attention_factor": 0.0}, "attention_factor is 0.0; it must be a number above 0"),
        )
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=[f"{f}-{c}" for f, c, _ in REFUSED])
def test_impossible_values_are_refused_by_name(family, changes, message):
    with pytest.raises(UsageError) as refused:
        small(family, **changes)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_unknown_fields_are_named_with_the_nearest_known_one():
    with pytest.raises(UsageError, match=r"^hiden_size is not a field of a model; did you mean hidden_size\?$"):
        small("llama", hiden_size=3)
    with pytest.raises(UsageError, match=r"^zzz is not a field of a model$"):
        small("llama", zzz=3)


def test_the_class_itself_refuses_in_one_line():
    values = small("llama").model_dump(exclude_none=True)
    for changes, message in (
        ({"hiden_size": 3}, "hiden_size is not a field of a model; did you mean hidden_size?"),
        ({"hidden_size": "3"}, "hidden_size is '3'; input should be a valid integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ):
        with pytest.raises(UsageError) as refused:
            ModelConfig(**{**values, **changes})
        assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert ModelConfig(**values) == small("llama")


def test_missing_fields_are_named():
    with pytest.raises(UsageError, match=r"^vocab_size is missing$"):
        ModelConfig(model_type="llama")


@given(configs())
def test_any_valid_config_survives_hugging_face_json(config: ModelConfig):
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_older_rotary_spelling_parses_equal(family):
    older = small(family, rope_parameters={**small(family).rope_parameters.model_dump(include={"partial_rotary_factor"})})
    newer = older.to_hf()
    newer["rope_parameters"].update(YARN, rope_theta=500.0, beta_fast=16)
    older = {k: v for k, v in newer.items() if k != "rope_parameters"}
    scaling = dict(newer["rope_parameters"])
    older["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    if family == "glm4_moe":
        older["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    older["rope_scaling"] = scaling
    parsed = ModelConfig.from_hf(older)
    assert parsed == ModelConfig.from_hf(newer)
    assert parsed.rope_parameters.beta_fast == 16
    assert parsed.rope_parameters.rope_theta == 500


def test_older_spelling_without_scaling():
    newer = small("llama").to_hf()
    older = {k: v for k, v in newer.items() if k != "rope_parameters"}
    assert ModelConfig.from_hf({**older, "rope_theta": 10000, "rope_scaling": None}) == small("llama")
    assert ModelConfig.from_hf(older) == small("llama")


def test_yarn_takes_what_it_lacks_from_the_context_length():
    values = small("deepseek_v3", max_position_embeddings=64).to_hf()
    values["rope_parameters"] = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    assert ModelConfig.from_hf(values).rope_parameters.factor == 4
    values["rope_parameters"] = {"rope_type": "yarn", "factor": 2.0}
    assert ModelConfig.from_hf(values).rope_parameters.original_max_position_embeddings == 64
    del values["max_position_embeddings"]
    values["rope_parameters"] = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    assert ModelConfig.from_hf(values).rope_parameters.factor == 4, "transformers' default context is 4096"


def test_rotary_fields_that_the_scaling_does_not_read_are_passed_over_as_transformers_does():
    values = small("deepseek_v3").to_hf()
    values["rope_parameters"].update(factor=40.0, beta_fast=8, original_max_position_embeddings=16, mscale_all_dim=1.0)
    assert ModelConfig.from_hf(values) == small("deepseek_v3")


def test_other_spellings_of_transformers():
    values = small("deepseek_v3", num_nextn_predict_layers=1).to_hf()
    renamed = {k: v for k, v in values.items() if k not in ("num_nextn_predict_layers", "n_routed_experts")}
    renamed.update(num_mtp_layers=1, num_local_experts=6, head_dim=4, qk_head_dim=10)
    assert ModelConfig.from_hf(renamed) == ModelConfig.from_hf(values)
    values.update(n_group=None, topk_group=None, num_key_value_heads=None)
    assert ModelConfig.from_hf(values) == ModelConfig.from_hf(renamed)


def test_a_context_beyond_all_numbers_is_refused():
    values = {**small("llama").to_hf(), "max_position_embeddings": 10**400}
    values["rope_parameters"] = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    with pytest.raises(UsageError, match="max_position_embeddings is 10"):
        ModelConfig.from_hf(values)


def test_the_largest_dimensions_can_be_built():
    """No tensor's bytes overflow."""
    wide = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"), 2**20)
    wide |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"), 2**20)
    wide |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_routed_experts", "n_shared_experts"), 2**16)
    with torch.device("meta"):
        Transformer(small("deepseek_v3", vocab_size=2**24, **wide))


def test_greedy_choice_never_looks_at_groups():
    values = {**published.DEEPSEEK_V2, "topk_method": "greedy"}
    assert ModelConfig.from_hf(values).n_group == 1


def test_published_deepseek_v3():
    config = ModelConfig.from_hf(published.DEEPSEEK_V3)
    assert (config.attention, config.qk_head_dim, config.value_head_dim, config.rotary_dim) == ("latent", 192, 128, 64)
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (8, 4, 8)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    assert config.routed_scaling_factor == 2.5
    assert config.rope_parameters.model_dump(include={"rope_type", "factor", "mscale", "mscale_all_dim"}) == {
        "rope_type": "yarn",
        "factor": 40,
        "mscale": 1,
        "mscale_all_dim": 1,
    }
    assert [config.is_sparse(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert config.total_layers == 62


def test_published_deepseek_v2():
    config = ModelConfig.from_hf(published.DEEPSEEK_V2)
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (8, 3, 6)
    assert (config.scoring_func, config.topk_method) == ("softmax", "group_limited_greedy")
    assert (config.norm_topk_prob, config.routed_scaling_factor) == (False, 16)
    assert config.rope_parameters.mscale == config.rope_parameters.mscale_all_dim == 0.707


def test_published_deepseek_v2_lite():
    config = ModelConfig.from_hf(published.DEEPSEEK_V2_LITE)
    assert (config.q_lora_rank, config.n_group, config.topk_method) == (None, 1, "greedy")
    assert config.num_nextn_predict_layers == 0


def test_published_glm_and_llama():
    glm = ModelConfig.from_hf(published.GLM_4_5_AIR)
    assert (glm.attention, glm.rotary_dim, glm.head_dim, glm.attention_bias) == ("grouped", 64, 128, True)
    assert (glm.scoring_func, glm.rope_parameters.rope_theta) == ("sigmoid", 1000000)
    llama = ModelConfig.from_hf(published.LLAMA_3_1_405B)
    assert (llama.head_dim, llama.num_key_value_heads, llama.has_experts) == (128, 8, False)
    assert (llama.rope_parameters.rope_type, llama.rope_parameters.low_freq_factor) == ("llama3", 1)


def test_published_models_without_shared_experts():
    qwen = ModelConfig.from_hf(published.QWEN3_30B_A3B)
    assert (qwen.n_routed_experts, qwen.norm_topk_prob, qwen.qk_norm, qwen.first_k_dense_replace) == (128, True, "head", 0)
    assert (qwen.head_dim, qwen.scoring_func, qwen.topk_method) == (128, "softmax", "greedy")
    mixtral = ModelConfig.from_hf(published.MIXTRAL_8X7B)
    assert (mixtral.n_routed_experts, mixtral.moe_intermediate_size, mixtral.norm_topk_prob) == (8, 14336, True)
    assert (mixtral.qk_norm, mixtral.attention_bias, mixtral.intermediate_size) == (None, False, None)
    olmoe = ModelConfig.from_hf(published.OLMOE_1B_7B)
    assert (olmoe.moe_intermediate_size, olmoe.norm_topk_prob, olmoe.qk_norm) == (1024, False, "all")


def test_kimi_k2_is_a_deepseek_v3():
    rope = {**published.DEEPSEEK_V3["rope_scaling"], "beta_fast": 1.0, "factor": 64.0}  # Kimi-K2-Instruct-0905's
    values = {**published.DEEPSEEK_V3, "rope_theta": 50000.0, "rope_scaling": rope}
    kimi = ModelConfig.from_hf({**values, "model_type": "kimi_k2"})
    assert kimi == ModelConfig.from_hf(values)
    assert (kimi.model_type, kimi.rope_parameters.beta_fast, kimi.rope_parameters.beta_slow) == ("deepseek_v3", 1.0, 1.0)


@pytest.mark.parametrize(("kind", "theirs"), [("glm4_moe_lite", Glm4MoeLiteConfig()), ("youtu", YoutuConfig())])
def test_what_other_names_leave_out_is_what_transformers_takes(kind, theirs):
    ours = ModelConfig.from_hf({"model_type": kind})
    assert ours.model_type == "deepseek_v3" and ours.has_experts == (kind == "glm4_moe_lite")
    same = (ModelConfig.model_fields.keys() & theirs.to_dict().keys()) - {"model_type", "rope_parameters", "head_dim"}
    assert {"kv_lora_rank", "eos_token_id", "tie_word_embeddings"} < same
    if ours.has_experts:
        assert {"n_routed_experts", "routed_scaling_factor"} < same
        assert ours.first_k_dense_replace == theirs.mlp_layer_types.count("dense") == 1
    for name in same - {"initializer_range"}:  # trained weights do not tell
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("types", [["sparse", "dense"], ["dense", "other"], "dense", 5, [], ["dense"] * 3])
def test_dense_layers_of_glm4_moe_lite_come_first(types):
    values = {"model_type": "glm4_moe_lite", "num_hidden_layers": 2, "mlp_layer_types": types}
    with pytest.raises(UsageError, match=r"^config: mlp_layer_types is .*; it must be 2 in all, dense ones first"):
        ModelConfig.from_hf(values, "config")


def test_glm4_moe_lite_is_read_in_the_spellings_of_deepseek_v3():
    values = {"model_type": "glm4_moe_lite", "num_hidden_layers": 2, "num_local_experts": 8, "first_k_dense_replace": 1}
    assert ModelConfig.from_hf(values).n_routed_experts == 8
    with pytest.raises(UsageError, match=r"first_k_dense_replace is 2; without mlp_layer_types it must be 1"):
        ModelConfig.from_hf({**values, "first_k_dense_replace": 2})


@pytest.mark.parametrize("name", ["_attn_implementation_autoset", "_commit_hash", "unsloth_fixed", "unsloth_version"])
def test_notes_of_the_programs_that_wrote_a_config_are_passed_over(name):
    assert ModelConfig.from_hf({**published.QWEN3_30B_A3B, name: "any"}) == ModelConfig.from_hf(published.QWEN3_30B_A3B)


def test_what_transformers_takes_where_a_mixtral_is_silent():
    values = {name: value for name, value in published.MIXTRAL_8X7B.items() if name != "rope_theta"}
    assert ModelConfig.from_hf(values).rope_parameters.rope_theta == 1e6


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe", "mixtral", "olmoe"])
@pytest.mark.parametrize("others", [{"num_experts": 4}, {"num_local_experts": 4}])
def test_numbers_of_experts_that_differ_by_name_are_refused(kind, others):
    values = small(kind).to_hf()
    file = {**values, "n_routed_experts": values.get("n_routed_experts", 6), **others}
    message = r"num_(local_)?experts is 4 and n_routed_experts 6: two names of one number: give one$"
    with pytest.raises(UsageError, match=f"^f: {message}"):
        ModelConfig.from_hf(file, where="f")
    with pytest.raises(UsageError, match=f"^{message}"):
        small(kind, **others)
    assert small(kind, **dict.fromkeys(others, 6)) == small(kind)


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts", "n_routed_experts"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_the_number_of_experts_has_three_names(family, spelling):
    values = small(family).to_hf()
    (own,) = values.keys() & {"num_experts", "num_local_experts"}
    values[spelling] = values.pop(own)
    assert ModelConfig.from_hf(values) == small(family)


def test_a_recipe_may_spell_a_model_as_its_family_does():
    olmoe = dict(model_type="olmoe", vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_experts=6,
                 num_experts_per_tok=2, intermediate_size=7, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    assert ModelConfig(**olmoe) == small("olmoe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [1]}, "mlp_only_layers is [1]; it must be the first layers in order, such as [0, 1]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; it must be 1"),
        ({"use_sliding_window": True, "sliding_window": 9}, "use_sliding_window is true; Cadre's attention sees all positions"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types is ['sliding_attention', "),
    ],
)
def test_what_only_some_qwens_have_is_refused_by_name(changes, message):
    with pytest.raises(UsageError) as refused:
        ModelConfig.from_hf({**published.QWEN3_30B_A3B, **changes}, where="here")
    assert str(refused.value).startswith(f"here: {message}")


def test_sliding_windows_that_are_off_and_first_layers_that_are_dense_are_understood():
    values = {**published.QWEN3_30B_A3B, "sliding_window": 4096, "layer_types": ["full_attention"] * 48}
    assert ModelConfig.from_hf(values) == ModelConfig.from_hf(published.QWEN3_30B_A3B)
    assert ModelConfig.from_hf({**values, "mlp_only_layers": [0, 1]}).first_k_dense_replace == 2
    with pytest.raises(UsageError, match="sliding_window = 512 is not something Cadre's mixtral knows"):
        ModelConfig.from_hf({**published.MIXTRAL_8X7B, "sliding_window": 512})


@pytest.mark.parametrize("name", published.ALL)
def test_published_configs_survive_a_round_trip(name):
    config = ModelConfig.from_hf(published.ALL[name])
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; Cadre builds deepseek_v3, deepseek_v2, glm4_moe, qwen3_moe, "),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"mlp_bias": True}, "mlp_bias is true; Cadre's feed-forward layers have no bias"),
        ({"sliding_window": 512}, "sliding_window = 512 is not something Cadre's deepseek_v3 knows"),
        ({"n_group": 7}, "n_group is 7; it must be a divisor of n_routed_experts (256)"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; input should be 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func is softmax; it must be sigmoid in deepseek_v3"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_parameters: rope_type is 'longrope'; input should be"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "foo": 1}}, "rope_parameters: foo is not a known field"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]; it must be an object"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'; it must be an object"),
    ],
)
def test_what_a_file_asks_in_vain_is_refused_by_name(changes, message):
    with pytest.raises(UsageError) as refused:
        ModelConfig.from_hf({**published.DEEPSEEK_V3, **changes}, where="here")
    assert str(refused.value).startswith(f"here: {message}")
    assert "\n" not in str(refused.value)


def test_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UsageError, match=r"config\.json: no such file"):
        ModelConfig.from_file(path)
    for content, message in (("{", "cannot be read as JSON"), ("[]", "holds list, not a JSON object")):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            ModelConfig.from_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        ModelConfig.from_file(path)
    path.write_text(json.dumps(published.DEEPSEEK_V3))
    assert ModelConfig.from_file(path) == ModelConfig.from_hf(published.DEEPSEEK_V3)


def test_what_no_layer_reads_is_dropped():
    """`deepseek_v3` with every layer dense: transformers' file still holds experts, so they say nothing."""
    dense = small("deepseek_v3", first_k_dense_replace=2)
    assert not dense.has_experts
    assert dense == small("deepseek_v3", first_k_dense_replace=2, n_routed_experts=99, n_group=7)
    assert dense.n_routed_experts is None
    assert dense.to_hf()["n_routed_experts"] == 2
    with_module = small("deepseek_v3", first_k_dense_replace=2, num_nextn_predict_layers=1)
    assert with_module.has_experts
    assert with_module.n_routed_experts == 6


def test_values_that_follow_from_others():
    assert small("llama", num_key_value_heads=None, head_dim=None).num_key_value_heads == 4
    assert small("llama", head_dim=None).head_dim == 24 // 4
    assert small("deepseek_v3", num_key_value_heads=None).num_key_value_heads == 3
    assert small("deepseek_v2", n_group=2, topk_group=1).topk_method == "group_limited_greedy"


@given(configs())
@example(small("deepseek_v3", first_k_dense_replace=0, intermediate_size=None))
def test_transformers_reads_every_file_alike(config: ModelConfig):
    """The library accepts the file, and what it writes of it is understood the same."""
    from transformers import AutoConfig

    if config.hidden_size % config.num_attention_heads and config.model_type in ("llama", "deepseek_v2"):
        return  # refused when saving: transformers builds no such model
    values = config.to_hf()
    theirs = AutoConfig.for_model(**values)
    again = ModelConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    if config.intermediate_size is None:
        again = again.model_copy(update={"intermediate_size": None})
    assert again == config


def test_needs_no_torch():
    code = "import sys, cadre.model.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
