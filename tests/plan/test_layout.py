from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.plan import catalogue
from cadre.plan.count import count
from cadre.plan.hardware import hardware
from cadre.plan.layout import Degrees, Workload, cut, layouts
from cadre.plan.memory import memory
from cadre.plan.shape import Block


def work(name: str, batch: int = 1024, device: str = "h100", precision: str = "bf16", **choices: object) -> Workload:
    shape = catalogue.lookup(name).shape.without_extra()
    return Workload(shape, hardware(device), precision, 4096, batch, **choices)


@given(st.sampled_from(["mixtral-8x7b", "deepseek-v2-lite", "llama-3.1-8b"]), st.integers(1, 300))
def test_degrees_multiply_to_the_devices(name, devices):
    task = work(name)
    experts = task.shape.experts.n_routed_experts if task.shape.experts else 1
    seen = set()
    for cuts, one in layouts(task, devices):
        assert one.devices == one.data * one.pipeline * one.tensor == devices
        assert (one.data * one.tensor) % one.expert == 0 and experts % one.expert == 0
        assert one.pipeline == len(cuts.stages) <= len(task.shape.blocks)
        assert task.shape.attention.num_attention_heads % one.tensor == 0 and one.tensor <= task.device.node_size
        assert one.data * one.micro_batch <= task.batch
        if one.schedule == "interleaved":
            assert one.micro_batches(task.batch) % one.pipeline == 0
        if one.schedule == "dualpipe":
            assert one.pipeline % 2 == 0 and one.micro_batches(task.batch) >= 2 * one.pipeline
        assert (one.schedule == "none") == (one.pipeline == 1)
        assert not (one.sharded and one.pipeline > 1)
        assert one not in seen
        seen.add(one)
    assert seen or devices > task.batch


def test_what_deepseek_v3_used_is_among_the_layouts():
    wanted = (128, 64, 16, 1, "dualpipe")
    made = (one for _, one in layouts(work("deepseek-v3", 15360, "h800", "fp8"), 2048))
    assert any((one.data, one.expert, one.pipeline, one.tensor, one.schedule) == wanted for one in made)


def test_a_given_micro_batch_is_kept_to():
    assert {one.micro_batch for _, one in layouts(work("llama-3.1-8b", micro_batch=4), 8)} == {4}


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 12))
def test_the_cut_is_the_best_one(sparse, stages):
    """Against trying every cut, on blocks of two costs."""
    base = catalogue.lookup("deepseek-v2-lite").shape
    shape = replace(base, blocks=tuple(Block(s) for s in sparse))
    task = Workload(shape, hardware("h100"), "bf16", 128, 8)
    stages = min(stages, len(sparse))
    costs = [task.flops(block) for block in shape.blocks]
    costs[-1] += task.head_flops

    def best(start: int, left: int) -> float:
        if left == 1:
            return sum(costs[start:])
        return min(max(sum(costs[start:end]), best(end, left - 1)) for end in range(start + 1, len(costs) - left + 2))

    assert cut(task, stages).flops == pytest.approx(best(0, stages))


def test_weighted_flops_are_the_counted_ones_when_nothing_slows_experts():
    task = work("mixtral-8x7b")
    plain = replace(task, device=replace(task.device, half_rate_width=0.0))
    flops = sum(map(plain.flops, plain.shape.blocks)) + plain.head_flops
    assert flops == pytest.approx(count(plain.shape).forward_flops_per_token, rel=1e-6)
    slower = sum(map(task.flops, task.shape.blocks)) + task.head_flops
    routed = 32 * 2 * task.shape.active_routed
    assert slower - flops == pytest.approx(routed * 2500 / 14336)


@given(st.integers(1, 64), st.sampled_from([None, 1, 4]), st.sampled_from([None, 1, 2]), st.sampled_from([1, 2, 3]))
def test_a_recipe_is_spread_as_training_can_be_told(devices, expert, replicas, pipeline):
    degrees = Degrees(expert, replicas, pipeline)
    task = work("deepseek-v2-lite", batch=devices * 6, micro_batch=2, degrees=degrees)
    seen = [one for _, one in layouts(task, devices)]
    for one in seen:
        assert one.devices == devices and one.tensor == 1 and one.recompute == "none" and one.pipeline == pipeline
        assert one.data == one.replicas * one.copies * one.expert and one.shards * one.replicas == one.data
        assert one.expert in (expert, one.expert if expert is None else None)
        assert one.replicas in (replicas, one.replicas if replicas is None else None)
        assert one.sharded == (one.data > 1 and pipeline == 1) and one.micro_batch == 2
    assert len(set(seen)) == len(seen)
    data = devices // pipeline
    possible = devices % pipeline == 0 and data % (replicas or 1) == 0 and data // (replicas or 1) % (expert or 1) == 0
    assert bool(seen) == possible


def test_a_recipe_holds_float32_and_casts():
    """Weights 4 bytes, their cast 2 where computing is in bf16; one device holds as much as with 2 and a 4-byte master copy."""
    plain = work("llama-3.1-8b", batch=8, micro_batch=1)
    trained = replace(plain, degrees=Degrees())
    held, other = (memory(*next(layouts(task, 1))) for task in (trained, plain))
    parameters = count(plain.shape).total_parameters
    assert (held.weights, held.optimizer) == (4 * parameters, 8 * parameters)
    assert held.buffers - other.buffers == 2 * parameters and held.total == pytest.approx(other.total)
