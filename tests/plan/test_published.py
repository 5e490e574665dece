"""What is published of models and their training, reproduced: every figure with where it stands."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cadre.plan import catalogue
from cadre.plan.count import Count, count
from cadre.plan.families import read_shape
from cadre.plan.hardware import hardware
from cadre.plan.layout import Layout, Workload, cut
from cadre.plan.planner import Request, make_plan
from cadre.plan.search import predict, search
from cadre.plan.shape import Block, Experts, Grouped, Shape


def main(name: str) -> Shape:
    return catalogue.lookup(name).shape.without_extra()


def counted(name: str, context: int = 4096) -> Count:
    return count(main(name), context=context)


# ------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", catalogue.names())
def test_every_model_of_the_catalogue_counts_as_transformers_builds_it(name):
    values = dict(catalogue._PUBLISHED[name][1])
    kind = values.pop("model_type")
    if kind == "glm4_moe_lite":
        dense = values["first_k_dense_replace"]
        values["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (values["num_hidden_layers"] - dense)
    config = AutoConfig.for_model("deepseek_v3" if kind == "kimi_k2" else kind, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    biases = [buffer for key, buffer in model.named_buffers() if "correction_bias" in key]
    assert counted(name).total_parameters == sum(tensor.numel() for tensor in [*model.parameters(), *biases])


@pytest.mark.parametrize(
    ("name", "total", "active_in_billions"),
    [
        ("deepseek-v3", 671_026_419_200, (37.552, 36.626, 35.699)),
        ("deepseek-v2", 235_741_434_880, (21.376, 20.852, 20.327)),
        ("deepseek-v2-lite", 15_706_484_224, (2.661, 2.451, 2.242)),
        ("olmoe-1b-7b", 6_919_161_856, (1.282, 1.179, 1.076)),
    ],
)
def test_totals_and_active_parameters(name, total, active_in_billions):
    """The table of the project's figures."""
    made = counted(name)
    assert made.total_parameters == total
    active = (
        made.active_parameters,
        made.active_parameters_without_input_embedding,
        made.active_parameters_without_embeddings,
    )
    assert tuple(round(value / 1e9, 3) for value in active) == active_in_billions


# Each: total, active (None: dense), source.
OFFICIAL = {
    "kimi-k2": (1.0e12, 32e9, "github.com/moonshotai/Kimi-K2: 1T total, 32B activated"),
    "glm-4.5": (355e9, 32e9, "huggingface.co/docs/transformers/model_doc/glm4_moe: 355 billion total, 32 billion active"),
    "glm-4.5-air": (106e9, 12e9, "huggingface.co/docs/transformers/model_doc/glm4_moe: 106 billion total, 12 billion active"),
    "glm-4.7-flash": (30e9, 3e9, "huggingface.co/zai-org/GLM-4.7-Flash: 30B-A3B"),
    "youtu-llm-2b": (1.96e9, None, "huggingface.co/tencent/Youtu-LLM-2B: 1.96B"),
    "qwen3-235b-a22b": (235e9, 22e9, "huggingface.co/Qwen/Qwen3-235B-A22B: 235B in total and 22B activated"),
    "qwen3-30b-a3b": (30.5e9, 3.3e9, "huggingface.co/Qwen/Qwen3-30B-A3B-Instruct-2507: 30.5B in total and 3.3B activated"),
    "mixtral-8x7b": (46.7e9, 12.9e9, "arXiv 2401.04088 and huggingface.co/mistralai/Mixtral-8x7B-v0.1: 46.7B, 12.9B a token"),
    "mixtral-8x22b": (141e9, 39e9, "ollama.com/library/mixtral, after mistral.ai: 39B active parameters out of 141B"),
    "moonlight-16b-a3b": (16e9, 3e9, "docs.nvidia.com/nemo/automodel, Moonlight-16B-A3B: 16B total, 3B activated"),
    "qwen3-32b": (32.8e9, None, "huggingface.co/Qwen/Qwen3-32B: 32.8B"),
    "qwen2.5-72b": (72.7e9, None, "huggingface.co/Qwen/Qwen2.5-72B: 72.7B"),
    "llama-3.1-8b": (8.03e9, None, "huggingface.co/meta-llama/Llama-3.1-8B: 8.03B params"),
    "llama-3.1-70b": (70.6e9, None, "huggingface.co/meta-llama/Llama-3.1-70B: 70.6B params"),
    "deepseek-67b": (67e9, None, "arXiv 2401.02954: 67B"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_totals_and_active_parameters(name):
    """Totals within 1% (Kimi K2's "1T": 3%); active counts, rounded or cut off after the last digit stated, in one of the
    three conventions (GLM-4.5 counts neither embedding nor head)."""
    total, active, _ = OFFICIAL[name]
    made = counted(name)
    assert made.total_parameters == pytest.approx(total, rel=0.03 if name == "kimi-k2" else 0.01)
    if active:
        digit = 1e8 if active % 1e9 else 1e9
        three = (
            made.active_parameters,
            made.active_parameters_without_input_embedding,
            made.active_parameters_without_embeddings,
        )
        assert any(-digit / 2 <= value - active < digit for value in three)


# As `safetensors` metadata on Hugging Face counts them.
EXACT = {
    "mixtral-8x7b": 46_702_792_704,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-235b-a22b": 235_093_634_560,
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_published_totals(name):
    assert counted(name).total_parameters == EXACT[name]


@pytest.mark.parametrize(("name", "stated"), [("qwen3-30b-a3b", 29.9e9), ("qwen3-235b-a22b", 234e9), ("qwen3-32b", 31.2e9)])
def test_published_counts_without_embeddings(name, stated):
    """Qwen's model cards: "Number of Parameters (Non-Embedding)"."""
    made = counted(name)
    without = made.total_parameters - made.parts["embedding"] - made.parts["head"]
    assert without == pytest.approx(stated, rel=0.002)


# ------------------------------------------------------------------------------------------------- cache and FLOPs


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("deepseek-v3", 70_272),
        ("deepseek-v2", 69_120),
        ("deepseek-v2-lite", 31_104),
        ("deepseek-67b", 389_120),
        ("qwen2.5-72b", 327_680),
        ("llama-3.1-405b", 516_096),
    ],
)
def test_cache_bytes(name, cache):
    assert counted(name).kv_cache_bytes_per_token == cache


@pytest.mark.parametrize(("name", "gigaflops"), [("deepseek-v2", 155), ("deepseek-v3", 250)])
def test_training_flops(name, gigaflops):
    """arXiv 2505.09343, table 2, at 4,096 tokens."""
    assert counted(name).training_flops_per_token == pytest.approx(gigaflops * 1e9, rel=0.005)


# ------------------------------------------------------------------------------------------------- hours and money


def planned(name: str, **choices: object) -> dict:
    request = dict(name=name, source="", shape=main(name), device=hardware("h800"), context=4096, devices=2048)
    return make_plan(Request(**{**request, **choices}))


V3_TOKENS_A_SECOND = 1543


def test_v3_hours_from_its_throughput():
    """2,664K H800-hours for 14.8T tokens; with 124K more, $5.576M at $2 (arXiv 2412.19437, table 1)."""
    mfu = V3_TOKENS_A_SECOND * counted("deepseek-v3").training_flops_per_token / hardware("h800").flops["bf16"]
    made = planned("deepseek-v3", tokens=14.8e12, mfu=mfu)
    assert made["device_hours"] == pytest.approx(2_664_000, rel=0.001)
    assert made["cost_usd"] == pytest.approx(2 * 2_664_000, rel=0.001)
    assert made["days"] == pytest.approx(2_664_000 / 2048 / 24, rel=0.001)
    assert made["energy_kwh"] == pytest.approx(2_664_000 * 0.7, rel=0.001)
    assert made["cost_usd"] + 2 * 124_000 == pytest.approx(5_576_000, rel=0.001)


def test_v3_hours_as_the_layout_model_predicts_them():
    made = planned("deepseek-v3", tokens=14.8e12, precision="fp8", batch=15360, optimizer="adamw-bf16")
    assert made["device_hours"] == pytest.approx(2_664_000, rel=0.02)


def test_v2_saves_hours_over_the_dense_67b():
    """172.8K against 300.6K H800-hours a trillion tokens: 42.5% less (arXiv 2405.04434, section 3.2.3).

    Counted FLOPs save 63%; what each reached of the hardware, which the hours imply, gives the rest back.
    """
    sparse, dense = counted("deepseek-v2"), counted("deepseek-67b")
    saved = 1 - sparse.training_flops_per_token / dense.training_flops_per_token
    assert saved == pytest.approx(0.629, abs=0.001)
    peak = hardware("h800").flops["bf16"]
    reached = {
        name: 1e12 * made.training_flops_per_token / (hours * 3600 * peak)
        for name, made, hours in (("deepseek-v2", sparse, 172_800), ("deepseek-67b", dense, 300_600))
    }
    assert reached["deepseek-v2"] == pytest.approx(0.252, abs=0.001)
    assert reached["deepseek-67b"] == pytest.approx(0.391, abs=0.001)
    hours = {name: planned(name, tokens=1e12, mfu=mfu)["device_hours"] for name, mfu in reached.items()}
    assert 1 - hours["deepseek-v2"] / hours["deepseek-67b"] == pytest.approx(0.425, abs=0.001)


def test_that_saving_as_the_layout_model_predicts_it():
    """By the fastest layouts it finds, where DeepSeek used its own: both models' hours come out a fifth lower."""
    hours = {name: planned(name, tokens=1e12, devices=1024)["device_hours"] for name in ("deepseek-v2", "deepseek-67b")}
    assert 1 - hours["deepseek-v2"] / hours["deepseek-67b"] == pytest.approx(0.425, abs=0.02)
    assert hours["deepseek-v2"] == pytest.approx(172_800 * 0.78, rel=0.02)
    assert hours["deepseek-67b"] == pytest.approx(300_600 * 0.77, rel=0.02)


# ------------------------------------------------------------------------------------------------- the step model

# Qwen2-57B-A14B (a qwen2_moe, which is not read from files): huggingface.co/Qwen/Qwen2-57B-A14B, config.json.
QWEN2_57B = Shape(
    "qwen2_moe", 151936, 3584, Grouped(28, 4, 128, bias=True), (Block(True),) * 28, experts=Experts(64, 8, 2560, 8)
)


def mfu_of(work: Workload, speed: float, devices: int) -> float:
    """Against the bf16 peak, whatever the precision: how papers compare."""
    flops = count(work.shape, context=work.context).training_flops_per_token
    return speed * flops / devices / work.device.flops["bf16"]


@pytest.mark.parametrize(
    ("name", "device", "precision", "context", "batch", "layout", "reached"),
    [
        # arXiv 2407.21783, table 4: 430 and 400 TFLOP/s a GPU.
        ("llama-3.1-405b", "h100", "bf16", 8192, 2048, Layout(64, 1, 16, 8, "interleaved", 8, 1, "selective", False), 0.43),
        ("llama-3.1-405b", "h100", "bf16", 8192, 2048, Layout(128, 1, 16, 8, "interleaved", 8, 1, "selective", False), 0.41),
        # arXiv 2405.04434, section 3.2.3, with its 16-way pipeline and 8-way expert parallelism (section 3.1.3).
        ("deepseek-v2", "h800", "bf16", 4096, 9216, Layout(64, 8, 16, 1, "1f1b", 1, 1, "selective", False), 0.252),
        # arXiv 2412.19437, table 1 and section 3.2: 16-way pipeline, 64-way expert parallelism, DualPipe.
        ("deepseek-v3", "h800", "fp8", 4096, 15360, Layout(128, 64, 16, 1, "dualpipe", 1, 1, "selective", False), 0.391),
    ],
)  # fmt: skip
def test_published_throughputs_with_published_layouts(name, device, precision, context, batch, layout, reached):
    work = Workload(main(name), hardware(device), precision, context, batch, "adamw-bf16" if precision == "fp8" else "adamw")
    made = predict(cut(work, layout.pipeline), layout)
    assert mfu_of(work, made.tokens_per_second, layout.devices) == pytest.approx(reached, rel=0.02)
    assert made.memory.total < work.device.memory_bytes


@pytest.mark.parametrize(
    ("shape", "precision", "batch", "devices", "reached"),
    [
        # What was not fitted. arXiv 2504.14960, abstract: 128 H100, bf16.
        (QWEN2_57B, "bf16", 256, 128, 0.390),
        (main("mixtral-8x22b"), "bf16", 256, 128, 0.493),
        # arXiv 2603.07685, table 11: DeepSeek-V3 on 1,024 H100, 368 TFLOP/s a GPU in block-wise fp8.
        (main("deepseek-v3"), "fp8", 8192, 1024, 0.372),
    ],
)
def test_other_published_throughputs_come_out_within_a_sixth(shape, precision, batch, devices, reached):
    work = Workload(shape, hardware("h100"), precision, 4096, batch)
    best = search(work, devices, keep=1)[0]
    assert mfu_of(work, best.tokens_per_second, devices) == pytest.approx(reached, rel=1 / 6)


def test_v3s_own_layout_is_among_the_best_on_2048_h800():
    """16-way pipeline, 64-way expert parallelism, DualPipe, no tensor parallelism: within 1% of the fastest found."""
    work = Workload(main("deepseek-v3"), hardware("h800"), "fp8", 4096, 15360, "adamw-bf16")
    found = search(work, 2048)
    own = [
        made
        for made in found
        if (made.layout.pipeline, made.layout.expert, made.layout.tensor, made.layout.schedule) == (16, 64, 1, "dualpipe")
    ]
    assert own and own[0].seconds < 1.01 * found[0].seconds


def test_v3_read_from_its_file_with_its_prediction_module():
    from tests import published

    shape = read_shape(published.DEEPSEEK_V3).shape
    assert shape == catalogue.lookup("deepseek-v3").shape
    assert count(shape).parts["multi_token_prediction"] == 11_610_068_224
