import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.plan.count import count
from cadre.train.bench import worker
from cadre.train.bench.tax import active_width, bench_tax, dense_twin, variant, with_experts
from tests.shapes import SPARSE, configs, small
from tests.workers import Here, Scripted


@given(configs(SPARSE), st.sampled_from([16, 64, 128]), st.sampled_from([2, 4, 8]))
def test_a_variant_and_its_twin_have_equal_active_flops_but_for_the_router(config, experts, top_k):
    assume(config.has_experts)
    sparse = variant(config, experts, top_k)
    twin = dense_twin(sparse)
    here, there = count(sparse, context=32), count(twin, context=32)
    routers = here.parts["router"]
    assert here.forward_flops_per_token - there.forward_flops_per_token == 2 * routers
    assert here.active_parameters - there.active_parameters == routers
    modules = sum(sparse.is_sparse(layer) for layer in range(sparse.num_hidden_layers, sparse.total_layers))
    in_modules = modules * experts * (sparse.hidden_size + (sparse.scoring_func == "sigmoid"))
    assert here.training_flops_per_token - there.training_flops_per_token == 6 * (routers + in_modules)
    assert here.parts["attention"] == there.parts["attention"] == count(config).parts["attention"]
    assert not twin.has_experts and sparse.has_experts


@pytest.mark.parametrize("top_k, width", [(2, 216), (4, 128), (8, 72)])
def test_experts_are_narrower_the_more_of_them_a_token_takes(top_k, width):
    config = small(
        "deepseek_v3",
        first_k_dense_replace=1,
        moe_intermediate_size=128,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=1,
    )
    sparse = variant(config, 64, top_k)
    assert (sparse.n_routed_experts, sparse.num_experts_per_tok, sparse.moe_intermediate_size) == (64, top_k, width)
    assert width % 8 == 0 and abs(active_width(sparse) - active_width(config)) <= 4 * (top_k + 1)
    assert sparse.intermediate_size == active_width(sparse) == dense_twin(sparse).intermediate_size


def test_groups_stay_where_they_can():
    config = small("deepseek_v3", n_routed_experts=32, n_group=8, topk_group=4)
    kept = with_experts(config, 64, 8, 16)
    assert (kept.n_group, kept.topk_group) == (8, 4)
    for experts, top_k in ((12, 2), (8, 2), (16, 9)):
        dropped = with_experts(config, experts, top_k, 16)
        assert (dropped.n_group, dropped.topk_group) == (1, 1)
    greedy = small("deepseek_v2", n_routed_experts=32, n_group=8, topk_group=2, topk_method="group_limited_greedy")
    assert with_experts(greedy, 12, 2, 8).n_group == 1


def bench(config, **changes):
    given = {"batch": 2, "seq_len": 8, "steps": 2, "dtype": torch.float32, "note": lambda text: None}
    return bench_tax(config, **{**given, **changes})


def test_every_variant_is_timed_in_turn_with_its_own_twin(monkeypatch):
    seen, notes = [], []

    def seconds(build):
        config = build.args[0]
        seen.append(config)
        return [9.0, 9.0, 3.0, 5.0] if config.has_experts else [9.0, 9.0, 2.0, 2.0]

    monkeypatch.setattr(worker, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "seconds", staticmethod(seconds))
    monkeypatch.setattr(Here, "turns", [])
    config = small("deepseek_v3")
    found = bench(config, note=notes.append)
    shapes = [(experts, top_k) for top_k in (2, 4, 8) for experts in (16, 64, 128)]
    assert [(row["experts"], row["top_k"]) for row in found["rows"]] == shapes
    assert Here.turns == ["experts", "dense"] * 4 * 9
    assert seen == [shape for pair in shapes for shape in (variant(config, *pair), dense_twin(variant(config, *pair)))]
    assert {row["ratio"] for row in found["rows"]} == {2.0}
    assert notes[0].startswith("16 experts, top 2: 0 of 9") and notes[-1].startswith("128 experts, top 8: 8 of 9")


def test_quick_is_one_number_of_experts(monkeypatch):
    monkeypatch.setattr(worker, "Worker", Here)
    monkeypatch.setattr(Here, "turns", [])
    found = bench(small("glm4_moe"), steps=1, quick=True)
    assert [(row["experts"], row["top_k"]) for row in found["rows"]] == [(64, 2), (64, 4), (64, 8)]
    for row in found["rows"]:
        assert row["ratio"] == row["sparse"]["step_seconds_median"] / row["dense"]["step_seconds_median"] > 0
        assert row["total_parameters"] > row["dense_total_parameters"]


def test_a_dense_model_pays_no_tax():
    with pytest.raises(UsageError, match="--tax: the config has no experts"):
        bench(small("llama"))
    with pytest.raises(UsageError, match="--seq 65: the model's context is 64"):
        bench(small("deepseek_v3"), seq_len=65)
