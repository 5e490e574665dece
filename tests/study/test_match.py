"""Matching: solved widths make equal what is held equal, and what cannot be made equal is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.study.match import match
from cadre.study.spec import parse_study
from cadre.train.optimizer import Optimizer
from tests.study.studies import study_text


def matched(*replace):
    text = study_text()
    for what, by in replace:
        assert what in text
        text = text.replace(what, by)
    study = parse_study(text, "tiny.toml", "tiny")
    return {arm.name: arm for arm in match(study, study.base_recipe(), 300)}


@settings(max_examples=25, deadline=None)
@given(width=st.integers(60, 2000), experts=st.integers(2, 9), data=st.data())
def test_the_free_width_equals_active_flops(width, experts, data):
    top_k = data.draw(st.integers(1, experts))
    arms = matched(
        ("intermediate_size = 48", f"intermediate_size = {width}"), ("n_routed_experts = 4", f"n_routed_experts = {experts}"),
        ("num_experts_per_tok = 2", f"num_experts_per_tok = {top_k}"), ("num_nextn_predict_layers = 1", ""),
        ("tolerance = 0.05", "tolerance = 0.2"),
    )  # fmt: skip
    here, there = arms["experts"].flops_per_token, arms["dense"].flops_per_token
    assert here == pytest.approx(there, rel=0.2)
    # One width more or less would be no nearer, were the tolerance not met: the solution is the best whole number.
    field = arms["experts"].solved["moe_intermediate_size"]
    if abs(here / there - 1) > 0.1:
        for other in (field - 1, field + 1):
            model = {**arms["experts"].recipe.model, "moe_intermediate_size": other}
            if other >= 1:
                config = arms["experts"].recipe.model_copy(update={"model": model}).config(300)
                off = count(config, context=16).training_flops_per_token / there - 1
                assert abs(off) >= abs(here / there - 1) - 1e-9


def test_flops_count_multi_token_prediction_by_its_share_of_sequences():
    arm = matched()["experts"]
    main = 3 * arm.count.forward_flops_per_token
    assert arm.flops_per_token == pytest.approx(main + (arm.count.training_flops_per_token - main) / 4)


def test_two_quantities_are_matched_one_after_the_other():
    arms = matched(
        ('solve = { active_flops = "moe_intermediate_size" }',
         'held = ["active_flops", "cache_bytes"]\n'
         'solve = { active_flops = "intermediate_size", cache_bytes = "num_key_value_heads" }'),
        ("first_k_dense_replace = 1\nn_routed_experts = 4\nnum_experts_per_tok = 2\nnum_nextn_predict_layers = 1",
         'model_type = "llama"\nhidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 6\nhead_dim = 4\n'
         "intermediate_size = 1"),
    )  # fmt: skip
    # 16 + 8 cached elements a layer are 2 x 3 heads of 4; 4 and 5 do not divide 6.
    assert arms["experts"].solved["num_key_value_heads"] == 3
    assert arms["experts"].count.kv_cache_bytes_per_token == arms["dense"].count.kv_cache_bytes_per_token
    assert arms["experts"].flops_per_token == pytest.approx(arms["dense"].flops_per_token, rel=0.05)


def test_a_hidden_size_is_found_however_wide_the_model():
    arms = matched(
        ("hidden_size = 32", "hidden_size = 800"), ("tolerance = 0.05", "tolerance = 0.01"),
        ("moe_intermediate_size", "hidden_size"),
        ("n_routed_experts = 4\n", "n_routed_experts = 4\nmoe_intermediate_size = 8\n"),
    )  # fmt: skip
    assert arms["experts"].solved["hidden_size"] > 512
    assert arms["experts"].flops_per_token == pytest.approx(arms["dense"].flops_per_token, rel=0.01)


def test_an_arm_of_adamw_over_a_base_of_muon_has_the_rate_that_it_says():
    """What the base leaves to AdamW beside Muon is no rate of an arm that has its own."""
    arms = matched(
        ("[recipe.optimizer]\nlr = 0.003", '[recipe.optimizer]\nname = "muon"\nlr = 0.01\nadamw_lr = 0.005'),
        ("[arms.experts.train]", '[arms.own.optimizer]\nname = "adamw"\nlr = 0.002\n\n'
                                 '[arms.beside.optimizer]\nname = "adamw"\n\n[arms.experts.train]'),
    )  # fmt: skip
    rates = {name: arm.recipe.optimizer.matrices_lr for name, arm in arms.items()}
    assert rates == {"dense": 0.01, "experts": 0.01, "own": 0.002, "beside": 0.005}
    for name in ("own", "beside"):
        optimizer = Optimizer(Transformer(arms[name].config), arms[name].recipe.optimizer)
        assert optimizer.lr == rates[name]


def test_an_arm_with_a_model_type_is_a_whole_model():
    with pytest.raises(UsageError, match=r"study tiny, arm experts: .*hidden_size"):
        matched(("first_k_dense_replace = 1\n", 'model_type = "glm4_moe"\nfirst_k_dense_replace = 1\n'))


def test_what_cannot_be_matched_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as error:
        matched(("n_routed_experts = 4", "n_routed_experts = 400"), ("num_experts_per_tok = 2", "num_experts_per_tok = 100"))
    message = str(error.value)
    assert "arm experts: training FLOPs per token cannot be matched" in message
    assert "moe_intermediate_size = 1 comes nearest" in message and "\n" not in message


def test_an_unequal_arm_without_a_free_width_is_refused():
    with pytest.raises(UsageError, match=r"name a free width in arms\.experts\.solve\.active_flops, or raise tolerance"):
        matched(('solve = { active_flops = "moe_intermediate_size" }\n', ""),
                ("n_routed_experts = 4", "n_routed_experts = 4\nmoe_intermediate_size = 64"))  # fmt: skip


def test_a_free_width_that_is_no_field_is_refused():
    with pytest.raises(UsageError, match=r"arms\.experts\.solve\.active_flops is 'width'"):
        matched(('"moe_intermediate_size"', '"width"'))
