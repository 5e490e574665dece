from __future__ import annotations

import random

import pytest
from hypothesis import given

from cadre.model.config import ModelConfig
from cadre.plan import catalogue
from cadre.plan.shape import Block, Experts, Grouped, Latent, Shape
from tests.shapes import configs


@pytest.mark.parametrize(
    ("experts", "parts"),
    [
        (Experts(16, 3, 8), 4), (Experts(16, 3, 8), 16), (Experts(16, 4, 8, n_group=4, topk_group=2), 4),
        (Experts(16, 4, 8, n_group=4, topk_group=2), 8), (Experts(16, 4, 8, n_group=4, topk_group=2), 2),
        (Experts(16, 5, 8, n_group=8, topk_group=3), 2), (Experts(16, 2, 8), 1),
    ],
)  # fmt: skip
def test_parts_that_a_token_touches_against_a_draw(experts: Experts, parts: int):
    rng, seen, draws = random.Random(0), 0, 20_000
    group, size = 16 // experts.n_group, 16 // parts
    for _ in range(draws):
        groups = rng.sample(range(experts.n_group), experts.topk_group)
        reachable = [group * g + e for g in groups for e in range(group)]
        seen += len({expert // size for expert in rng.sample(reachable, experts.num_experts_per_tok)})
    assert experts.touched(parts) == pytest.approx(seen / draws, rel=0.01)


@given(configs())
def test_a_shape_takes_over_what_counts(config: ModelConfig):
    shape = Shape.from_config(config)
    sparse = [block.sparse for block in (*shape.blocks, *shape.extra)]
    assert sparse == [config.is_sparse(layer) for layer in range(config.total_layers)]
    assert len(shape.extra) == config.num_nextn_predict_layers
    assert isinstance(shape.attention, Latent) == (config.attention == "latent")
    assert (shape.experts is not None) == config.has_experts
    assert shape.without_extra().extra == () and shape.without_extra().blocks == shape.blocks


@pytest.mark.parametrize(("groups", "limit", "top_k", "nodes"), [(8, 4, 8, 4), (8, 4, 2, 2), (1, 1, 8, 8), (8, 3, 6, 3)])
def test_node_limit(groups, limit, top_k, nodes):
    """A token's experts lie on min(top-k, groups a token may use) nodes; without groups on as many as it has experts."""
    assert Experts(256, top_k, 1, n_group=groups, topk_group=limit).node_limit == nodes


def test_what_causal_attention_sees():
    shape = Shape("llama", 8, 4, Grouped(2, 1, 2), (Block(False), Block(False, window=10)))
    open_, tight = shape.blocks
    assert shape.reach(open_, 100) == 100  # half of them on average, twice
    assert shape.reach(tight, 100) == 2 * 10 - 10**2 / 100
    assert shape.reach(tight, 10) == shape.reach(tight, 5) * 2 == 10


def test_the_catalogue_has_what_it_promises():
    wanted = """deepseek-v3 deepseek-v2 deepseek-v2-lite deepseek-67b kimi-k2 glm-4.5 glm-4.5-air qwen3-235b-a22b qwen3-30b-a3b
        olmoe-1b-7b mixtral-8x7b mixtral-8x22b llama-3.1-8b llama-3.1-70b llama-3.1-405b qwen2.5-72b qwen3-32b"""
    assert set(wanted.split()) <= set(catalogue.names())
    for name in catalogue.names():
        entry = catalogue.lookup(name.upper())
        assert entry.name == name
        assert entry.source.startswith("https://huggingface.co/") and entry.source.endswith("/config.json")
    assert catalogue.lookup("deepseek-v9") is None
