from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cadre.plan import catalogue
from cadre.plan.count import count
from cadre.plan.hardware import LINK_EFFICIENCY, hardware
from cadre.plan.layout import Degrees, Layout, Pipeline, Workload, cut
from cadre.plan.search import predict, search
from cadre.plan.shape import Block, Experts, Grouped, Shape
from cadre.plan.step import step

EVEN = Shape("mixtral", 64, 32, Grouped(4, 2, 8), (Block(True),) * 16, experts=Experts(8, 2, 16))
DENSE = Shape("llama", 64, 32, Grouped(4, 2, 8), (Block(False),) * 16, intermediate_size=64)


def work(shape: Shape | str, **choices: object) -> Workload:
    shape = catalogue.lookup(shape).shape.without_extra() if isinstance(shape, str) else shape
    return Workload(**{**dict(shape=shape, device=hardware("h800"), precision="bf16", context=4096, batch=512), **choices})


def layout(**choices: object) -> Layout:
    plain = dict(
        data=1, expert=1, pipeline=1, tensor=1, schedule="none", chunks=1, micro_batch=1, recompute="none", sharded=False
    )
    return Layout(**{**plain, **choices})


def terms(cuts: Pipeline, **choices: object) -> dict[str, float]:
    return step(cuts, layout(**{"pipeline": len(cuts.stages), **choices}))[0]


def test_one_device_only_computes():
    task = work(DENSE)
    made = terms(cut(task, 1))
    flops = 3 * count(DENSE).forward_flops_per_token * 512 * 4096
    assert made["compute"] == pytest.approx(flops / (989.4e12 * 0.56), rel=1e-3)
    assert {name for name, value in made.items() if value} == {"compute", "optimizer"}
    again = terms(cut(task, 1), recompute="full")
    assert again["recompute"] == pytest.approx(made["compute"] / 3)


def test_bubbles():
    """1F1B (PP - 1)(F + B); interleaved that over its chunks; DualPipe (PP / 2 - 1)(F&B + B - 3 W), arXiv 2412.19437, table 2.
    Here nothing is communicated but hidden states, so F : B : W = 1 : 2 : 1."""
    cuts, count_ = cut(work(DENSE), 8), 512
    forward = terms(cuts, schedule="1f1b")["compute"] / count_ / 3
    assert terms(cuts, schedule="1f1b")["bubble"] == pytest.approx(7 * 3 * forward)
    assert terms(cuts, schedule="interleaved", chunks=2)["bubble"] == pytest.approx(7 * 3 * forward / 2)
    assert terms(cuts, schedule="dualpipe")["bubble"] == pytest.approx((8 / 2 - 1) * (3 + 2 - 3) * forward)
    assert terms(cut(work(DENSE), 2), schedule="dualpipe")["bubble"] == 0


@pytest.mark.parametrize(
    ("schedule", "device", "bubble", "again"),
    [
        # Of a chunk's forward pass (half a place's), F : B : W = 1 : 1 : 1, 8 places, 512 micro-batches: what torch's lists of
        # operations take on a clock.
        ("zbv", "h800", 7, 0), ("dualpipev", "h800", 7, 0),
        # With kernels that give both gradients at once every pass that is put off is made twice.
        ("zbv", "cpu-2core-bf16", 14, 512 * 4), ("dualpipev", "cpu-2core-bf16", 2, 28),
    ],
)  # fmt: skip
def test_schedules_that_put_off_gradients_of_weights(schedule, device, bubble, again):
    cuts = cut(work(DENSE, device=hardware(device)), 8, schedule)
    assert len(cuts.stages) == 16 and len(cuts.slowest_blocks) == 2
    made = step(cuts, layout(pipeline=8, schedule=schedule))[0]
    chunk = made["compute"] / 512 / 6
    assert (made["bubble"], made["recompute"]) == (pytest.approx(bubble * chunk), pytest.approx(again * chunk))


def test_all_to_all_bytes_of_v3():
    """k' hidden (dispatch + combine bytes) a token and layer, k' = min(top-k, node limit), over 40 GB/s: an eighth of it stays
    on the node. Forward and backward."""
    cuts = cut(work("deepseek-v3", precision="fp8"), 1)
    made = terms(cuts, data=64, expert=64)
    nodes, kept = 8, min(8, 4)
    each = kept * (1 - 1 / nodes) * 7168 * (1 + 2) / (50e9 * LINK_EFFICIENCY)
    assert made["all_to_all"] == pytest.approx(2 * 58 * each * 512 / 64 * 4096)
    wide = terms(cut(work("deepseek-v3"), 1), data=64, expert=64)
    assert wide["all_to_all"] == pytest.approx(made["all_to_all"] * 4 / 3)
    free = replace(cuts.work.shape, experts=replace(cuts.work.shape.experts, n_group=1, topk_group=1))
    unlimited = terms(cut(replace(cuts.work, shape=free), 1), data=64, expert=64)
    assert unlimited["all_to_all"] == pytest.approx(2 * made["all_to_all"])


def test_all_to_all_within_a_node_runs_over_its_links():
    made = terms(cut(work(EVEN), 1), data=8, expert=8)
    each = 2 * (1 - 1 / 8) * 32 * 4 / (200e9 * LINK_EFFICIENCY)
    assert made["all_to_all"] == pytest.approx(2 * 16 * each * 512 / 8 * 4096)
    assert terms(cut(work(EVEN), 1), data=8)["all_to_all"] == 0


def test_a_recipes_all_to_all_sends_a_row_to_each_rank():
    """V2-Lite over 16 processes of two nodes: of 64 experts a token's 6 lie on 5.3 ranks of 4; 8 of 16 are on the other
    node, 7 on its own. Every row goes there by itself, with its choices; DeepSeek's kernels would send one to each node."""
    degrees = Degrees(16)
    cuts = cut(work("deepseek-v2-lite", precision="bf16", degrees=degrees, device=hardware("h100"), batch=16), 1)
    made = terms(cuts, data=16, expert=16, sharded=True)
    ranks = 16 * (1 - math.comb(60, 6) / math.comb(64, 6))
    row = 2048 * (2 + 2) + 6 * 6
    each = ranks * 8 / 16 * row / (50e9 * LINK_EFFICIENCY)
    assert made["all_to_all"] == pytest.approx(2 * 26 * each * 4096)
    assert ranks == pytest.approx(5.32, abs=0.01)
    near = terms(cut(replace(cuts.work, device=replace(hardware("h100"), node_size=16)), 1), data=16, expert=16, sharded=True)
    assert near["all_to_all"] == pytest.approx(2 * 26 * ranks * 15 / 16 * row / (450e9 * LINK_EFFICIENCY) * 4096)


def test_dualpipe_hides_all_to_all_behind_computing():
    cuts = cut(work("deepseek-v3", batch=4096), 16)
    degrees = dict(data=64, expert=64)
    plain, plain_hidden = step(cuts, layout(pipeline=16, schedule="1f1b", **degrees))
    dual, hidden = step(cuts, layout(pipeline=16, schedule="dualpipe", **degrees))
    assert plain_hidden["all_to_all"] == 0 and dual["all_to_all"] == 0
    assert hidden["all_to_all"] == pytest.approx(plain["all_to_all"])
    slow = cut(replace(cuts.work, device=replace(cuts.work.device, network_bandwidth=1e9)), 16)
    dual, hidden = step(slow, layout(pipeline=16, schedule="dualpipe", **degrees))
    assert dual["all_to_all"] > 0
    assert hidden["all_to_all"] == pytest.approx(dual["compute"])


def test_tensor_traffic():
    """A gather and a scatter of the hidden states around attention and around feed-forward, forward and backward."""
    made = terms(cut(work(DENSE), 1), tensor=4)
    each = 2 * (3 / 4) * 32 * 2 / (200e9 * LINK_EFFICIENCY)
    assert made["tensor"] == pytest.approx(2 * 2 * 16 * each * 512 * 4096)
    assert made["compute"] == pytest.approx(terms(cut(work(DENSE), 1))["compute"] / 4)


def test_gradients_hide_behind_the_last_backward_and_the_first_forward_pass():
    task = work("llama-3.1-8b", batch=1024)
    plain = predict(cut(task, 1), layout(data=64))
    scatter = 4 * count(task.shape).total_parameters / LINK_EFFICIENCY * max(7 / 8 / 200e9, 7 / 8 / 8 / 50e9)
    hidden, shown = plain.hidden["gradients"], plain.terms["gradients"]
    assert hidden + shown == pytest.approx(1.5 * scatter)
    forward = plain.terms["compute"] / (1024 / 64) / 3
    assert shown == pytest.approx(max(0, scatter - 2 * forward) + max(0, scatter / 2 - forward))
    assert predict(cut(task, 1), layout(data=64, micro_batch=16)).terms["gradients"] == 0


def test_sharded_weights_are_gathered_for_every_micro_batch():
    task = work("llama-3.1-8b", batch=1024)
    made = predict(cut(task, 1), layout(data=64, sharded=True))
    parameters = count(task.shape).total_parameters
    each = (2 * 2 + 4) * parameters / LINK_EFFICIENCY * max(7 / 8 / 200e9, 7 / 8 / 8 / 50e9)
    assert made.hidden["gradients"] + made.terms["gradients"] == pytest.approx(1024 / 64 * each)


def test_cores_that_send_do_not_compute_meanwhile():
    """On a CPU nothing is hidden; a card hides the gathering of weights."""
    for name, shown in (("cpu-2core", True), ("h100", False)):
        task = work(DENSE, device=hardware(name), precision=next(iter(hardware(name).flops)), degrees=Degrees())
        for sharded in (True, False):
            made, hidden = step(cut(task, 1), layout(data=2, sharded=sharded))
            assert (made["gradients"] > 0, hidden["gradients"] > 0) == (shown, not shown)
    dual, hidden = step(cut(work(EVEN, device=hardware("cpu-2core"), precision="fp32"), 2), layout(
        data=2, expert=2, pipeline=2, schedule="dualpipe"
    ))  # fmt: skip
    assert not any(hidden.values()) and dual["all_to_all"] > 0 and dual["pipeline"] > 0


def test_the_terms_add_up_to_the_step():
    for made in search(work("mixtral-8x7b"), 64):
        assert made.seconds == sum(made.terms.values())
        assert all(value >= 0 for value in (*made.terms.values(), *made.hidden.values()))
        assert made.tokens_per_second == 512 * 4096 / made.seconds
