"""What a run is refused for, or warned of, before it begins."""

import psutil
import pytest
import torch

from cadre.errors import UsageError
from cadre.plan.memory import state_bytes
from cadre.plan.shape import Shape
from cadre.train import checks
from cadre.train.checks import check_fp8, check_memory
from cadre.train.recipe import read_recipe
from cadre.train.run import start
from tests.shapes import small


def test_a_model_larger_than_the_machine_is_refused_with_numbers(monkeypatch):
    class Memory:
        total = 2**16

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(UsageError, match=r"the model has [\d,]+ parameters: .* GiB"):
        check_memory(small("deepseek_v3"), torch.device("cpu"))
    need = state_bytes(Shape.from_config(small("llama")), "adamw")
    monkeypatch.setattr(Memory, "total", 3 * need // 2)
    check_memory(small("llama"), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"and of the model of [\d,]+ parameters beside it"):
        check_memory(small("llama"), torch.device("cpu"), beside=small("llama"))


def test_the_memory_is_that_of_all_machines_however_many_processes_share_one(monkeypatch):
    class Memory:
        total = 3 * state_bytes(Shape.from_config(small("llama")), "adamw") // 4

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_memory(small("llama"), torch.device("cpu"), processes=4)
    with pytest.raises(UsageError, match="choose a smaller model"):
        check_memory(small("llama"), torch.device("cpu"), processes=2)


def test_experts_in_fp8_want_a_card_that_has_it(monkeypatch):
    check_fp8(small("deepseek_v3"), torch.device("cpu"))
    for able in (True, False):
        monkeypatch.setattr(checks, "multiplies_fp8", lambda device, able=able: able)
        if able:
            check_fp8(small("deepseek_v3"), torch.device("cuda"))
        else:
            with pytest.raises(UsageError, match=r"train.fp8_experts: needs Triton and a card .* leave it out"):
                check_fp8(small("deepseek_v3"), torch.device("cuda"))


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["train.steps=20", "schedule.warmup_steps=20"], "the rate warms up over 20 steps, all of this run"),
        (["balance.bias_update=none", "balance.sequence_weight=0.0"], "nothing keeps the experts evenly used: balance."),
        (["balance.bias_speed=0.0", "balance.sequence_weight=0.0"], "nothing keeps the experts evenly used: balance."),
        (["balance.sequence_weight=0.0"], None),
        (["balance.bias_update=none"], None),
        (["model.model_type=deepseek_v2", "model.num_nextn_predict_layers=0"], None),
        (
            ["model.model_type=deepseek_v2", "model.num_nextn_predict_layers=0", "balance.sequence_weight=0.0"],
            "nothing keeps the experts evenly used (routers of deepseek_v2 own no bias)",
        ),
    ],
)
def test_what_is_hardly_meant_is_said(lab, overrides, says):
    notes: list[str] = []
    start(read_recipe(str(lab.recipe), overrides), lab.folder / "run", torch.device("cpu"), notes.append)
    said = [note for note in notes if "warms up" in note or "evenly used" in note]
    assert len(said) == (says is not None) and (says is None or said[0].startswith(says))


@pytest.mark.parametrize("ours, seconds, said", [(False, 50, True), (False, 1, False), (True, 50, False)])
def test_a_dtype_that_the_cpu_only_emulates_is_pointed_out(lab, monkeypatch, ours, seconds, said):
    monkeypatch.setattr(checks, "own_products_faster", lambda narrow: ours)
    monkeypatch.setattr(checks, "gemm_flops_per_second", lambda dtype, *_: 1e9 if dtype == torch.float32 else 1e9 / seconds)
    for dtype in ("bfloat16", "float32"):
        notes = []
        recipe = read_recipe(str(lab.recipe), [f"train.dtype={dtype}"])
        start(recipe, lab.folder / dtype, torch.device("cpu"), notes.append)
        warning = "this CPU multiplies bfloat16 50 times as slowly as float32: train.dtype=float32 is faster here"
        assert (warning in notes) == (said and dtype == "bfloat16")
