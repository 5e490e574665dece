from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cadre.cli.plan_tables import describe
from cadre.errors import UsageError
from cadre.plan import catalogue
from cadre.plan.count import count
from cadre.plan.hardware import hardware
from cadre.plan.layout import Degrees
from cadre.plan.planner import Request, make_plan
from cadre.plan.shape import Shape
from cadre.train.recipe import read_recipe


def planned(name: str = "deepseek-v2-lite", **choices: object) -> dict:
    plain = dict(name=name, source="somewhere", shape=catalogue.lookup(name).shape, device=hardware("h100"), context=4096)
    return make_plan(Request(**{**plain, **choices}))


def test_a_plan_is_plain_json_with_the_counts():
    made = planned(tokens=1e12)
    assert json.loads(json.dumps(made)) == made
    counted = count(catalogue.lookup("deepseek-v2-lite").shape)
    for name in ("total_parameters", "active_parameters", "training_flops_per_token", "kv_cache_bytes_per_token"):
        assert made[name] == getattr(counted, name)
    assert made["parameters"] == counted.parts


def test_cost_follows_from_speed_rent_and_power():
    made = planned(tokens=1e12, devices=64, rent=3.0)
    assert made["device_hours"] == pytest.approx(1e12 / made["tokens_per_second"] / 3600 * 64)
    assert made["days"] == pytest.approx(made["device_hours"] / 64 / 24)
    assert made["cost_usd"] == pytest.approx(3 * made["device_hours"])
    assert made["energy_kwh"] == pytest.approx(0.7 * made["device_hours"])
    assert made["mfu"] == pytest.approx(made["tokens_per_second"] * made["training_flops_per_token"] / (64 * 989.4e12))
    assert made["tokens_per_second"] == pytest.approx(made["batch"] * 4096 / made["step_seconds"])
    without = planned(devices=64)
    assert without["tokens"] is None and without["cost_usd"] is None and without["tokens_per_second"]


def test_a_given_mfu_sets_the_hours():
    made = planned(tokens=1e12, devices=64, mfu=0.5)
    flops = 1e12 * made["training_flops_per_token"]
    assert made["device_hours"] == pytest.approx(flops / (0.5 * 989.4e12 * 3600))
    assert made["mfu"] == 0.5 and made["layout"]
    assert made["tokens_per_second"] == pytest.approx(made["batch"] * 4096 / made["step_seconds"])
    assert sum(made["step_terms_seconds"].values()) == pytest.approx(made["step_seconds"])
    assert made["layouts"][0]["step_seconds"] == pytest.approx(made["step_seconds"])


def test_what_fits_on_no_number_of_devices_is_said_so():
    less = planned(devices=8, context=10**8, batch=8)
    assert not less["fits"]
    assert any("nor on any other number of them" in note for note in less["notes"])
    (note,) = (note for note in planned(devices=1)["notes"] if "does not fit" in note)
    enough = int(note.rpartition("; ")[2].split()[0].replace(",", ""))
    assert planned(devices=enough)["fits"]


def test_what_does_not_fit_has_neither_speed_nor_price():
    """The share reached while computing would be several times too fast: V2-Lite on 16 RTX 4090 reaches MFU 21%."""
    unknown = ("mfu", "tokens_per_second", "device_hours", "days", "cost_usd", "energy_kwh", "step_seconds")
    less = planned(device=hardware("rtx4090"), devices=8, tokens=3e11)
    assert not less["fits"] and less["tokens"] == 3e11 and all(less[key] is None for key in unknown)
    assert "MFU" not in {one["name"] for one in less["assumptions"]}
    assert planned(device=hardware("rtx4090"), devices=16, tokens=3e11)["mfu"] < 0.25
    uneven = planned(devices=3, batch=16, degrees=Degrees(), tokens=1e9)
    assert "cannot be spread over 3 devices" in uneven["notes"][0] and all(uneven[key] is None for key in unknown)
    asked = planned(device=hardware("rtx4090"), devices=8, tokens=3e11, mfu=0.2)
    assert asked["mfu"] == 0.2 and asked["cost_usd"] > 10_000 and asked["step_seconds"] is None


def test_memory_by_part_adds_up_and_fits():
    memory = planned(devices=64)["memory_per_device_bytes"]
    parts = ("weights", "gradients", "optimizer", "activations", "buffers")
    assert memory["total"] == pytest.approx(sum(memory[part] for part in parts))
    assert memory["total"] <= memory["capacity"] == 80e9
    assert memory["activations_without_recomputation"] > memory["activations_with_recomputation"] > 0


def test_without_devices_the_fewest_that_fit():
    made = planned()
    assert made["fits"] and made["devices"] > 1
    less = planned(devices=made["devices"] // 2)
    assert not less["fits"] and less["layout"] is None and less["step_seconds"] is None
    assert f"{made['devices']} are enough" in less["notes"][0]
    assert less["memory_per_device_bytes"]["total"] > 80e9


def test_the_batch_grows_with_the_devices_up_to_v3s():
    assert planned(devices=64)["batch"] == 512
    assert planned(devices=64, batch=100)["batch"] == 100
    assert planned("deepseek-v3", devices=4096)["batch"] == 15360
    assert planned("deepseek-v3", devices=4096, context=8192)["batch"] == 7680


def test_a_batch_too_small_for_any_layout():
    made = planned(devices=4096, batch=1)
    assert not made["fits"] and made["memory_per_device_bytes"] is None
    assert made["notes"] == ["no layout gives each of 4096 devices work: a batch of 1 sequences is too small"]
    vast = planned("qwen3-8b", context=10**7)["notes"]
    assert any(note.startswith("training at a context of 10,000,000 fits on no number of h100") for note in vast)


def test_decoding_is_part_of_it():
    decode = planned("deepseek-v3", devices=64, precision="fp8")["decode"]
    assert decode["users"] == decode["copies"] * decode["users_per_copy"]
    assert decode["tokens_per_second"] == pytest.approx(decode["copies"] * decode["steps"][-1]["tokens_per_second"])
    assert decode["steps"][0]["users"] == 1
    assert decode["steps"][0]["bound"] == "memory"
    each = [one["tokens_per_second_per_user"] for one in decode["steps"]]
    assert each == sorted(each, reverse=True)
    assert planned("deepseek-v3", devices=1)["decode"] is None


def test_assumptions_carry_value_and_source():
    made = planned(tokens=1e9, rent=1.5, devices=16)
    found = {one["name"]: one for one in made["assumptions"]}
    assert found["USD a device-hour"] == {
        "name": "USD a device-hour", "value": 1.5, "source": "given", "option": "--rent"
    }  # fmt: skip
    assert found["peak FLOP/s"]["value"] == 989.4e12
    assert found["MFU"]["source"] == "predicted by the layout model" and found["MFU"]["option"] == "--mfu"
    assert all(one["source"] for one in made["assumptions"])
    alone = {one["name"] for one in planned("llama-3.1-8b", devices=1)["assumptions"]}
    assert "network bytes/s" not in alone and "expert width at which it halves" not in alone


def test_what_was_read_but_not_understood_is_passed_on():
    made = planned(ignored=("loops",), notes=("only the language model",))
    assert made["ignored"] == ["loops"] and made["notes"][0] == "only the language model"


def test_a_context_beyond_the_models_is_noted():
    assert planned("llama-3.1-8b", context=131_072)["notes"] == []
    assert planned("llama-3.1-8b", context=131_073)["notes"][0].startswith("context 131,073 is beyond the 131,072 positions")


def test_a_short_step_on_a_card_waits_for_launches_that_are_not_counted():
    small = Shape.from_config(read_recipe("pocket").config(4096))
    for device, noted in (("h100", True), ("cpu-2core", False)):
        notes = planned(shape=small, device=hardware(device), devices=1, context=256, batch=4)["notes"]
        assert any("launching" in note for note in notes) == noted
    assert not any("launching" in note for note in planned(devices=64)["notes"])


def test_idle_devices_are_counted_and_paid():
    made = planned("deepseek-v3", devices=2050, tokens=1e12)
    assert made["idle_devices"] == 2050 - made["layout"]["devices"] > 0
    assert made["device_hours"] / made["days"] == pytest.approx(24 * 2050)


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ({"devices": 0}, "--devices is 0; it must be at least 1"),
        ({"devices": 10**6}, "--devices is 1000000; at most 131,072"),
        ({"batch": 0}, "--batch is 0; it must be at least 1"),
        ({"context": 0}, "--context is 0; it must be at least 1"),
        ({"tokens": 0.0}, "--tokens is 0; it must be at least 1"),
        ({"tokens": float("inf")}, "--tokens is inf"),
        ({"tokens": float("nan")}, "--tokens is nan"),
        ({"mfu": 0.0}, "--mfu is 0; it must be above 0 and at most 1"),
        ({"mfu": 40.0}, "--mfu is 40; it must be above 0 and at most 1"),
        ({"rent": -1.0}, "--rent is -1; it must be US dollars"),
        ({"rent": 1e300}, r"--rent is 1e\+300; it must be US dollars a device-hour, at least 0 and at most 1,000,000"),
        ({"batch": 10**32}, r"--batch is 1e\+32; at most 1,000,000,000 can be planned for"),
        ({"context": 10**26}, r"--context is 1e\+26; at most 1,000,000,000 can be planned for"),
        ({"tokens": 1e30}, r"--tokens is 1e\+30; at most 1,000,000,000,000,000,000 can be planned for"),
        (
            {"shape": replace(catalogue.lookup("qwen3-8b").shape, hidden_size=10**30)},
            r"somewhere: .*e\+\d+ parameters; at most 1e\+18 can be planned for",
        ),
        ({"optimizer": "sgd"}, "--optimizer sgd: must be one of adamw, adamw-bf16, muon"),
        ({"precision": "fp32"}, "--precision fp32: h100 has a rate for bf16, fp8 only"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(choices, line):
    with pytest.raises(UsageError, match=line):
        planned(**choices)


def test_a_layout_in_words():
    plain = dict(data=1, expert=1, pipeline=1, tensor=1, schedule="none", chunks=1, micro_batch=1, recompute="none",
                 sharded=False, replicas=1, devices=1)  # fmt: skip
    assert describe(plain) == "one device"
    rich = dict(plain, data=8, expert=4, pipeline=2, devices=16, schedule="interleaved", chunks=2, recompute="full")
    assert describe(rich) == "data 8, expert 4, pipeline 2, tensor 1, interleaved 1F1B x2, full recomputation"
    folded = dict(plain, pipeline=2, devices=2, schedule="dualpipev")
    assert describe(folded) == "data 1, expert 1, pipeline 2, tensor 1, DualPipeV"
    assert describe(dict(folded, schedule="zbv")).endswith("ZB-V")
    assert describe(dict(plain, data=4, devices=4, sharded=True, replicas=2, micro_batch=4)) == (
        "data 4, expert 1, pipeline 1, tensor 1, replicas 2, weights sharded, micro-batch 4"
    )
