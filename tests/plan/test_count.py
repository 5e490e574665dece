from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given

from cadre.errors import UsageError
from cadre.hub.names import skeleton
from cadre.model.attention import LayerCache
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from tests import published
from tests.shapes import configs, small


def without_mtp(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "num_nextn_predict_layers": 0}


@pytest.mark.parametrize(
    ("name", "total", "active_in_billions"),
    [
        ("DeepSeek-V3", 671_026_419_200, (37.552, 36.626, 35.699)),
        ("DeepSeek-V2", 235_741_434_880, (21.376, 20.852, 20.327)),
        ("DeepSeek-V2-Lite", 15_706_484_224, (2.661, 2.451, 2.242)),
    ],
)
def test_published_totals_and_active_parameters(name, total, active_in_billions):
    counted = count(without_mtp(published.ALL[name]))
    assert counted.total_parameters == total
    active = (
        counted.active_parameters,
        counted.active_parameters_without_input_embedding,
        counted.active_parameters_without_embeddings,
    )
    assert tuple(round(a / 1e9, 3) for a in active) == active_in_billions


def test_published_file_of_v3_counts_its_prediction_module_apart():
    """The file says one module; the published total, active parameters and cache are those of the main model."""
    with_module, without = count(published.DEEPSEEK_V3), count(without_mtp(published.DEEPSEEK_V3))
    module = with_module.parts["multi_token_prediction"]
    assert with_module.total_parameters - module == without.total_parameters == 671_026_419_200
    assert with_module.active_parameters == without.active_parameters
    assert with_module.kv_cache_bytes_per_token == 70_272
    assert with_module.forward_flops_per_token == without.forward_flops_per_token


def test_multi_token_prediction_trains_its_block_and_the_head_again():
    config = small("deepseek_v3", num_nextn_predict_layers=2)
    plain = count(config.model_copy(update={"num_nextn_predict_layers": 0}), context=100)
    idle = 4 * 3 * config.hidden_size * 7
    module = count(config, context=100).parts["multi_token_prediction"] // 2 - idle
    head = config.vocab_size * config.hidden_size
    extra = 6 * 2 * (module + head) + 3 * 2 * 3 * (10 + 5) * 100
    assert count(config, context=100).training_flops_per_token == plain.training_flops_per_token + extra


@pytest.mark.parametrize(
    ("name", "cache"),
    [("DeepSeek-V3", 70_272), ("DeepSeek-V2", 69_120), ("DeepSeek-V2-Lite", 31_104), ("Llama-3.1-405B", 516_096)],
)
def test_published_cache_bytes(name, cache):
    assert count(published.ALL[name]).kv_cache_bytes_per_token == cache
    assert count(published.ALL[name], cache_bytes=1).kv_cache_bytes_per_token * 2 == cache


def test_cache_bytes_if_it_were_multi_head_attention():
    assert count(published.DEEPSEEK_V3).kv_cache_bytes_per_token_mha == 61 * 2 * 128 * (192 + 128)
    grouped = count(small("llama"))
    assert grouped.kv_cache_bytes_per_token_mha == 2 * grouped.kv_cache_bytes_per_token


@pytest.mark.parametrize(("name", "gigaflops"), [("DeepSeek-V3", 250.5), ("DeepSeek-V2", 155.3)])
def test_published_training_flops(name, gigaflops):
    counted = count(without_mtp(published.ALL[name]))
    assert round(counted.training_flops_per_token / 1e9, 1) == gigaflops
    assert counted.training_flops_per_token == 3 * counted.forward_flops_per_token


def test_only_attention_grows_with_context():
    config = small("deepseek_v3")
    near, far = count(config, context=10), count(config, context=1010)
    assert far.training_flops_per_token - near.training_flops_per_token == 3 * 2 * 3 * (10 + 5) * 1000
    assert near.active_parameters == far.active_parameters


@pytest.mark.parametrize(
    ("name", "total"),
    [("Qwen3-30B-A3B", 30_532_122_624), ("Mixtral-8x7B", 46_702_792_704), ("OLMoE-1B-7B", 6_919_161_856)],
)
def test_published_totals_of_models_without_shared_experts(name, total):
    """The config that Cadre builds the model from, and the model on torch's meta device."""
    config = ModelConfig.from_hf(published.ALL[name])
    assert count(config).total_parameters == total
    assert sum(parameter.numel() for parameter in skeleton(config).parameters()) == total


def test_published_llama_total():
    assert count(published.LLAMA_3_1_405B).total_parameters == 405_853_388_800


@given(configs())
@example(small("deepseek_v3", num_nextn_predict_layers=2, first_k_dense_replace=3))
@example(small("deepseek_v3", num_hidden_layers=1, num_nextn_predict_layers=1, first_k_dense_replace=2))
@example(small("glm4_moe", attention_bias=True, tie_word_embeddings=True, num_nextn_predict_layers=1))
@example(small("llama", attention_bias=True, tie_word_embeddings=True))
def test_total_is_the_sum_over_real_tensors(config: ModelConfig):
    with torch.device("meta"):
        model = Transformer(config)
    stored = {id(tensor): tensor.numel() for tensor in [*model.parameters(), *model.buffers()]}
    counted = count(config)
    assert counted.total_parameters == sum(stored.values()) == sum(counted.parts.values())
    assert counted.parts["multi_token_prediction"] == elements(model.mtp)
    routed = [moe.experts for layer, moe in model.sparse_layers() if layer < config.num_hidden_layers]
    assert counted.parts["routed_experts"] == sum(elements(experts) for experts in routed)


def elements(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])


class KeepEverything(LayerCache):
    """A cache that only remembers what it was given, for one sequence from its start."""

    def __init__(self, tokens: int) -> None:
        self.position_T, self.stop = torch.arange(tokens), tokens
        self.kept: list[torch.Tensor] = []

    def layer(self, index: int) -> KeepEverything:
        return self

    def append(self, first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        self.kept += [first, second]
        yield slice(0, len(first)), first, second


@given(configs())
def test_cache_bytes_are_those_of_what_attention_keeps(config: ModelConfig):
    tokens = 2
    cache = KeepEverything(tokens)
    Transformer(config).initialize(0)(torch.zeros(1, tokens, dtype=torch.int64), cache)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in cache.kept)
    assert count(config, cache_bytes=4).kv_cache_bytes_per_token * tokens == kept


def test_cache_bytes_in_eight_groups():
    assert count(published.DEEPSEEK_V3).kv_cache_bytes_per_token_gqa8 == 61 * 2 * 8 * (192 + 128)
    assert count(published.LLAMA_3_1_405B).kv_cache_bytes_per_token_gqa8 == 516_096
    few = count(small("llama"))
    assert few.kv_cache_bytes_per_token_gqa8 == few.kv_cache_bytes_per_token_mha


def test_decoding_flops_absorb_latent_attention():
    """One token reads `context` latents with every head: 512 + 64 wide for the scores, 512 for the values."""
    counted = count(without_mtp(published.DEEPSEEK_V3), context=4096)
    attention = counted.decode_flops_per_token - 2 * counted.active_parameters_without_input_embedding
    assert attention == 61 * 2 * 128 * (576 + 512) * 4096
    grouped = count(published.LLAMA_3_1_405B, context=1000)
    attention = grouped.decode_flops_per_token - 2 * grouped.active_parameters_without_input_embedding
    assert attention == 126 * 2 * 128 * (128 + 128) * 1000


def test_a_sliding_window_bounds_what_attention_costs():
    mistral = dict(
        model_type="mixtral", vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, num_experts_per_tok=1, intermediate_size=4, sliding_window=10,
    )  # fmt: skip
    tight, open_ = count(mistral, context=100), count({**mistral, "sliding_window": None}, context=100)
    # Positions see 1, 2, ... 10, 10, ... tokens; a mean over many of them is w - w^2 / 2T, half of T when w = T.
    mean = 10 - 10**2 / 200
    assert open_.forward_flops_per_token - tight.forward_flops_per_token == 2 * 2 * (2 * 2 * 4) * (50 - mean)
    assert tight.decode_flops_per_token - open_.decode_flops_per_token == 2 * 2 * (2 * 2 * 4) * (10 - 100)
    assert tight.total_parameters == open_.total_parameters
    assert count(mistral, context=10) == count({**mistral, "sliding_window": None}, context=10)


@given(configs())
def test_active_parameters_are_total_less_idle_experts(config: ModelConfig):
    counted = count(config)
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    one = 3 * config.hidden_size * (config.moe_intermediate_size or 0)
    idle = sparse * one * ((config.n_routed_experts or 0) - (config.num_experts_per_tok or 0))
    assert counted.total_parameters - counted.parts["multi_token_prediction"] - idle == counted.active_parameters
    matrix = config.vocab_size * config.hidden_size
    input_only = 0 if config.tie_word_embeddings else matrix
    assert counted.active_parameters - counted.active_parameters_without_input_embedding == input_only
    assert counted.active_parameters_without_input_embedding - counted.active_parameters_without_embeddings == matrix


def test_every_way_to_name_a_model_counts_equal(tmp_path):
    config = small("deepseek_v3", num_nextn_predict_layers=1)
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    file = run / "model" / "config.json"
    file.write_text(json.dumps(config.to_hf()))
    want = count(config)
    for source in (config.to_hf(), file, str(file), file.parent, run):
        assert count(source) == want


def test_as_dict_is_plain_json():
    counted = count(small("glm4_moe"), context=512)
    values = json.loads(json.dumps(counted.as_dict()))
    assert values["context"] == 512
    assert values["total_parameters"] == counted.total_parameters
    assert values["parts"] == counted.parts


@pytest.mark.parametrize(("argument", "value"), [("context", 0), ("context", -1), ("cache_bytes", 0)])
def test_impossible_arguments_are_refused_by_name(argument, value):
    with pytest.raises(UsageError, match=f"{argument} is {value}; it must be at least 1"):
        count(small("llama"), **{argument: value})


def test_missing_and_impossible_configs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        count(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match=r"config\.json: no such file"):
        count(tmp_path)
    with pytest.raises(UsageError, match="config: n_group is 7"):
        count({**published.DEEPSEEK_V3, "n_group": 7})


def test_counting_needs_no_torch():
    code = "import sys, cadre; cadre.count; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
