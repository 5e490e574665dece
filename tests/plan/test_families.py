"""Counts of shapes read from configs against the parameters of `transformers` models on the meta device."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.plan.count import count
from cadre.plan.families import read_config, read_shape
from cadre.plan.shape import Shape
from tests import published
from tests.shapes import configs

_PLAIN = dict(
    vocab_size=48, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_LATENT = dict(num_key_value_heads=4, q_lora_rank=9, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
_DEEPSEEK = dict(
    intermediate_size=20, first_k_dense_replace=1, n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=2,
    moe_intermediate_size=7, n_group=1, topk_group=1,
)  # fmt: skip
_LATENT_PLAIN = {k: v for k, v in _PLAIN.items() if k != "head_dim"}
SMALL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_LATENT_PLAIN, **_LATENT, **_DEEPSEEK},
    "deepseek_v2": {**_LATENT_PLAIN, **_LATENT, **_DEEPSEEK},
    "glm4_moe": {**_PLAIN, **_DEEPSEEK},
    "glm4_moe_lite": {
        **_LATENT_PLAIN,
        **_LATENT,
        **{k: v for k, v in _DEEPSEEK.items() if k != "first_k_dense_replace"},
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "youtu": {**_LATENT_PLAIN, **_LATENT, "intermediate_size": 20},
    "qwen3_moe": {**_PLAIN, "intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 7},
    "olmoe": {**_LATENT_PLAIN, "intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2},
    "mixtral": {**_PLAIN, "intermediate_size": 20, "num_local_experts": 6, "num_experts_per_tok": 2},
    "llama": {**_PLAIN, "intermediate_size": 20},
    "qwen2": {**_PLAIN, "intermediate_size": 20},
    "qwen3": {**_PLAIN, "intermediate_size": 20},
}


def built(kind: str, values: dict[str, Any]) -> tuple[Any, int]:
    """The transformers config, and the elements of that model's parameters and correction biases."""
    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    biases = [buffer for name, buffer in model.named_buffers() if "correction_bias" in name]
    return config, sum(tensor.numel() for tensor in [*model.parameters(), *biases])


def total(values: dict[str, Any]) -> int:
    return count(read_shape(values).shape.without_extra()).total_parameters


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in SMALL),
        *((kind, {"tie_word_embeddings": True}) for kind in ("olmoe", "llama", "qwen3", "deepseek_v3")),
        *((kind, {"attention_bias": True}) for kind in SMALL if kind not in ("mixtral", "qwen2")),
        ("llama", {"mlp_bias": True}),
        ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
        ("deepseek_v2", {"first_k_dense_replace": 0}),
        ("deepseek_v3", {"first_k_dense_replace": 4}),
        ("glm4_moe", {"use_qk_norm": True}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}),
        ("olmoe", {"num_key_value_heads": 4}),
    ],
)
def test_totals_are_those_of_transformers(kind, changes):
    """Both as transformers 5 writes the config (`to_dict`, and the shorter form it saves) and as it was given."""
    given_values = {**SMALL[kind], **changes}
    config, elements = built(kind, given_values)
    for values in ({"model_type": kind, **given_values}, config.to_dict(), json.loads(config.to_json_string(use_diff=True))):
        assert total(values) == elements
        assert read_shape(values).ignored == ()
    if kind == "deepseek_v3":
        assert total({**config.to_dict(), "model_type": "kimi_k2"}) == elements


@settings(max_examples=25)
@given(st.data())
def test_random_shapes_count_as_transformers_builds_them(data):
    kind = data.draw(st.sampled_from(sorted(SMALL)))
    values = dict(SMALL[kind])
    values["hidden_size"] = 4 * data.draw(st.integers(1, 9))
    values["vocab_size"] = data.draw(st.integers(8, 99))
    values["num_hidden_layers"] = data.draw(st.integers(1, 5))
    if "mlp_layer_types" in values:
        dense = data.draw(st.integers(0, values["num_hidden_layers"]))
        values["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (values["num_hidden_layers"] - dense)
    if "head_dim" in values:
        values["head_dim"] = 2 * data.draw(st.integers(1, 9))
    if "intermediate_size" in values:
        values["intermediate_size"] = data.draw(st.integers(1, 40))
    if kind == "qwen3_moe":
        values["decoder_sparse_step"] = data.draw(st.integers(1, 3))
    config, elements = built(kind, values)
    assert total(config.to_dict()) == elements


@given(configs())
def test_a_config_that_cadre_builds_has_one_shape_whichever_way_it_is_read(config: ModelConfig):
    direct, read = Shape.from_config(config), read_shape(config.to_hf()).shape
    assert count(read) == count(direct)
    assert (read.experts, read.blocks, read.extra) == (direct.experts, direct.blocks, direct.extra)


@pytest.mark.parametrize("name", sorted(published.ALL))
def test_published_files_are_understood_to_the_last_field(name):
    """Files as transformers 4 wrote them, rotary fields and all."""
    reading = read_shape(published.ALL[name])
    assert reading.ignored == (("quantization_config",) if name == "DeepSeek-V3" else ())
    assert count(reading.shape) == count(ModelConfig.from_hf(published.ALL[name]))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("num_experts", "num_local_experts", "n_routed_experts"), "qwen3_moe"),
        (("num_experts", "num_local_experts"), "olmoe"),
        (("num_local_experts", "num_experts"), "mixtral"),
        (("n_routed_experts", "num_local_experts"), "deepseek_v3"),
    ],
)
def test_both_spellings_of_the_number_of_experts(names, kind):
    values = {"model_type": kind, **SMALL[kind]}
    routed = values.pop(names[0])
    for name in names:
        assert total({**values, name: routed}) == total({"model_type": kind, **SMALL[kind]})
        assert read_shape({**values, name: routed}).ignored == ()
    with pytest.raises(UsageError, match=f"{names[0]} is 6 but {names[1]} is 5: they are one field"):
        total({**values, names[0]: 6, names[1]: 5})


def test_both_spellings_of_the_prediction_depth():
    values = {"model_type": "deepseek_v3", **SMALL["deepseek_v3"]}
    assert len(read_shape({**values, "num_nextn_predict_layers": 2}).shape.extra) == 2
    assert len(read_shape({**values, "num_mtp_layers": 2}).shape.extra) == 2
    assert read_shape(values).shape.extra == ()


def test_a_sliding_window_counts_where_it_is_switched_on():
    qwen = {"model_type": "qwen2", **SMALL["qwen2"], "sliding_window": 8, "max_window_layers": 3}

    def windows(**changes):
        return [block.window for block in read_shape({**qwen, **changes}).shape.blocks]

    assert windows() == windows(use_sliding_window=False) == [None] * 4
    assert windows(use_sliding_window=True) == [None, None, None, 8]
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, layer_types=types) == [8, None, 8, None]
    mixtral = read_shape({"model_type": "mixtral", **SMALL["mixtral"], "sliding_window": 16}).shape
    assert [block.window for block in mixtral.blocks] == [16] * 4
    config, _ = built("qwen2", {**SMALL["qwen2"], "sliding_window": 8, "max_window_layers": 3, "use_sliding_window": True})
    assert [8 if kind == "sliding_attention" else None for kind in config.layer_types] == windows(use_sliding_window=True)


def test_the_language_model_of_a_multimodal_config():
    inner = {"model_type": "kimi_k2", **SMALL["deepseek_v3"]}
    reading = read_shape({"model_type": "kimi_k25", "text_config": inner, "vision_config": {"hidden_size": 8}})
    assert reading.shape == read_shape(inner).shape
    assert reading.notes == (
        "only the language model of this kimi_k25 is planned: its text_config, a kimi_k2 (vision_config not counted)",
    )


@pytest.mark.parametrize("name", sorted(published.ALL))
def test_a_field_that_is_missing_is_refused_or_changes_nothing(name):
    """Nothing that a count needs is guessed where a published file says it and a copy of it does not."""
    values = published.ALL[name]
    whole = count(read_shape(values).shape)
    latent = "kv_lora_rank" in values
    # What these families have where the config is silent is part of what they are.
    off = {"num_nextn_predict_layers", "tie_word_embeddings", "attention_bias", "max_position_embeddings", "head_dim"}
    off |= {"use_qk_norm", "topk_method"} | ({"num_key_value_heads"} if values["model_type"] == "llama" else set())
    refused = set()
    for field in values.keys() - off:
        less = {other: value for other, value in values.items() if other != field}
        try:
            assert count(read_shape(less).shape) == whole, field
        except UsageError as error:
            assert "is missing" in str(error) and "\n" not in str(error)
            refused.add(field)
    assert refused >= {"hidden_size", "num_hidden_layers", "vocab_size", "model_type"}
    assert "q_lora_rank" in refused or not latent


def test_silence_of_the_others_is_no_multi_head_attention():
    for kind in ("glm4_moe", "mixtral", "qwen2", "qwen3", "qwen3_moe"):
        values = {"model_type": kind, **SMALL[kind]}
        del values["num_key_value_heads"]
        with pytest.raises(UsageError, match=f"num_key_value_heads is missing; {kind} needs it: null, or a whole number"):
            read_shape(values)
        assert read_shape({**values, "num_key_value_heads": None}).shape.attention.num_key_value_heads == 4


def test_fields_around_a_multimodal_config_are_named():
    inner = {"model_type": "kimi_k2", **SMALL["deepseek_v3"]}
    outer = {"model_type": "kimi_k25", "text_config": inner, "tie_word_embeddings": True, "num_nextn_predict_layers": 4}
    assert read_shape({**outer, "vocab_size": 48}).ignored == ("num_nextn_predict_layers", "tie_word_embeddings")


def test_a_head_width_that_latent_attention_has_not_is_named():
    values = {"model_type": "deepseek_v3", **SMALL["deepseek_v3"]}
    assert read_shape({**values, "head_dim": 999}).ignored == ("head_dim",)
    assert all(read_shape({**values, "head_dim": width}).ignored == () for width in (4, 5, 10))


def test_experts_of_a_dense_family_are_named():
    values = {"model_type": "llama", **SMALL["llama"], "num_local_experts": 8, "num_experts_per_tok": 2}
    assert read_shape(values).ignored == ("num_experts_per_tok", "num_local_experts")


def test_what_is_not_understood_is_named():
    strange = {"sparse_attention": {"top": 4}, "loops": 3, "nothing": None, "off": False}
    values = {"model_type": "llama", **SMALL["llama"], **strange}
    assert read_shape(values).ignored == ("loops", "sparse_attention")


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("gpt2", {}, "x: model_type is 'gpt2'; cadre plan knows deepseek_v2, deepseek_v3, glm4_moe, glm4_moe_lite, "),
        ("glm4_moe_lite", {"mlp_layer_types": "dense"}, 'mlp_layer_types is "dense"; it must be 4 times dense or sparse'),
        ("glm4_moe_lite", {"mlp_layer_types": None}, "mlp_layer_types is missing, and first_k_dense_replace"),
        ("llama", {"hidden_size": None}, "x: hidden_size is missing; llama needs it: a whole number, at least 1"),
        ("llama", {"vocab_size": "many"}, 'x: vocab_size is "many"; it must be a whole number, at least 1'),
        ("llama", {"num_hidden_layers": 10**9}, "x: num_hidden_layers is 1000000000; it must be at most 10,000"),
        ("llama", {"num_hidden_layers": 0}, "x: num_hidden_layers is 0; it must be a whole number, at least 1"),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads is 3; it must be a divisor of num_attention_heads \(4\)"),
        ("llama", {"attention_bias": 1}, "x: attention_bias is 1; it must be true or false"),
        ("llama", {"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "must be a divisor of hidden_size"),
        ("mixtral", {"num_experts_per_tok": 7}, r"x: num_experts_per_tok is 7; it must be 1 to num_local_experts \(6\)"),
        ("qwen3_moe", {"num_experts": None}, "x: num_experts is missing; qwen3_moe needs it"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "x: mlp_only_layers is .0.; it must be a list of layer numbers, 0 to 3"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, r"x: mlp_only_layers is \[4\]; it must be a list of layer numbers, 0 to 3"),
        ("qwen3_moe", {"layer_types": ["linear_attention"] * 4}, "it must be 4 times full_attention or sliding_attention"),
        ("deepseek_v3", {"mlp_layer_types": ["dense"] * 4}, "it must be what the other fields say: 1 dense, 3 sparse"),
        ("deepseek_v3", {"qk_head_dim": 99}, "x: qk_head_dim is 99; it must be 10, by the widths of the heads' parts"),
        ("qwen2", {"use_sliding_window": True}, "x: sliding_window is missing"),
        ("deepseek_v3", {"kv_lora_rank": None}, "x: kv_lora_rank is missing; deepseek_v3 needs it"),
        ("deepseek_v3", {"moe_intermediate_size": None}, "x: moe_intermediate_size is missing"),
        ("deepseek_v3", {"first_k_dense_replace": None}, "x: first_k_dense_replace is missing"),
        ("deepseek_v3", {"n_group": 4}, r"x: n_group is 4; it must be a divisor of n_routed_experts \(6\)"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 3}, r"x: topk_group is 3; it must be 1 to n_group \(2\)"),
        ("deepseek_v3", {"n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}, "1 to 2: 1 of 3 groups of 2 experts"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "x: num_key_value_heads is 2; it must be 4, the number of heads"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "x: moe_layer_freq is 2; it must be 1"),
    ],
)  # fmt: skip
def test_bad_configs_end_in_one_line(kind, changes, line):
    values = {"model_type": kind, **SMALL.get(kind, {}), **changes}
    with pytest.raises(UsageError, match=line) as raised:
        read_shape(values, "x")
    assert "\n" not in str(raised.value)


_ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(), st.text(max_size=4), st.sampled_from([[], {}, [[1]]])
)


@settings(max_examples=300)
@given(st.data())
def test_whatever_stands_in_a_field_it_is_read_or_refused(data):
    kind = data.draw(st.sampled_from(sorted(SMALL)))
    values = {"model_type": kind, **SMALL[kind], "layer_types": None, "mlp_only_layers": None, "text_config": None}
    values.update({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "decoder_sparse_step": 1})
    for name in data.draw(st.sets(st.sampled_from(sorted(values)), min_size=1, max_size=2)):
        values[name] = data.draw(_ODD)
    try:
        count(read_shape(values).shape)
    except UsageError as error:
        assert "\n" not in str(error)


def test_greedy_routing_knows_no_groups():
    values = {"model_type": "deepseek_v2", **SMALL["deepseek_v2"], "n_group": 3, "topk_group": 1}
    assert read_shape({**values, "topk_method": "greedy"}).shape.experts.node_limit == 2
    assert read_shape({**values, "topk_method": "group_limited_greedy"}).shape.experts.node_limit == 1


@pytest.mark.parametrize(
    ("content", "line"), [("{", "cannot be read as JSON"), ("[1]", "holds list, not a JSON object"), ("\xff", "cannot be read")]
)
def test_files_that_are_no_config(tmp_path, content, line):
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=rf"config\.json: {line}"):
        read_config(tmp_path)
