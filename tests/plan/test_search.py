from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.plan.search import activations, fits, search, smallest
from tests.plan.test_step import layout, work


@given(st.sampled_from(["mixtral-8x7b", "deepseek-v2-lite", "qwen3-30b-a3b", "llama-3.1-8b"]), st.integers(8, 200))
def test_what_is_found_fits_and_is_sorted(name, devices):
    task = work(name)
    found = search(task, devices, keep=5)
    assert bool(found) >= fits(task, devices)
    assert [made.seconds for made in found] == sorted(made.seconds for made in found)
    for made in found:
        assert made.memory.total <= task.device.memory_bytes
        assert made.layout.devices <= devices < made.layout.devices + max(1024, devices / 2 + 1)


@pytest.mark.parametrize(
    ("name", "first"), [("deepseek-v3", 256), ("mixtral-8x22b", 64), ("llama-3.1-8b", 4), ("kimi-k2", 512)]
)
def test_twice_the_devices_are_no_slower(name, first):
    """The batch stays, so each doubling halves what a device has to do, and no layout is lost."""
    speeds = [search(work(name, batch=16384), first << doubling, keep=1)[0].tokens_per_second for doubling in range(5)]
    assert speeds == sorted(speeds)


def test_nothing_fits_where_weights_alone_do_not():
    task = work("deepseek-v3")
    assert search(task, 8) == [] and not fits(task, 8)
    leanest = smallest(task, 8)
    assert leanest.memory.total > 671e9 * (2 + 4 + 12) / 8
    assert smallest(work("deepseek-v3", batch=1, micro_batch=2), 8) is None


def test_activations_of_a_layout_under_each_recomputation():
    task = work("mixtral-8x7b")
    made = activations(task, layout(data=8, pipeline=8, schedule="1f1b", recompute="selective"))
    none, selective, full = made.values()
    assert list(made) == [f"activations_{n}" for n in
                          ("without_recomputation", "with_selective_recomputation", "with_recomputation")]  # fmt: skip
    assert none > selective > full


@pytest.mark.parametrize("devices", [1, 7, 1000, 10_000])
def test_any_number_of_devices_is_planned_for(devices):
    """From one card to ten thousand; a prime number leaves some idle rather than doing without expert parallelism."""
    found = search(work("deepseek-v2-lite", batch=16384), devices, keep=1)
    assert bool(found) == (devices > 1)
    assert all(made.layout.devices <= devices for made in found)
