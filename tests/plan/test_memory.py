from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from cadre.kernels import loss
from cadre.model.config import ModelConfig
from cadre.plan import catalogue
from cadre.plan.count import count
from cadre.plan.hardware import hardware
from cadre.plan.layout import Layout, Pipeline, Workload, cut
from cadre.plan.memory import (
    LOSS_ELEMENTS,
    LOSS_ELEMENTS_OF_A_CARD,
    LOSS_LEAST_ROWS,
    RECOMPUTE,
    RESERVE,
    Memory,
    activation_bytes,
    loss_bytes,
    memory,
    optimizer_bytes,
)
from cadre.plan.shape import Block, Experts, Grouped, Shape
from tests.shapes import configs

# Sixteen equal blocks of experts: every stage but for embedding and head is alike.
EVEN = Shape("mixtral", 64, 32, Grouped(4, 2, 8), (Block(True),) * 16, experts=Experts(8, 2, 16))


def pipeline(shape: Shape, stages: int, **choices: object) -> Pipeline:
    work = dict(shape=shape, device=hardware("h100"), precision="bf16", context=16, batch=64)
    return cut(Workload(**{**work, **choices}), stages)


def layout(**choices: object) -> Layout:
    plain = dict(
        data=1, expert=1, pipeline=1, tensor=1, schedule="none", chunks=1, micro_batch=1, recompute="none", sharded=False
    )
    return Layout(**{**plain, **choices})


@given(configs())
def test_stages_hold_the_whole_model_once(config: ModelConfig):
    shape = Shape.from_config(config)
    for stages in range(1, len(shape.blocks) + 1):
        cuts = pipeline(shape, stages)
        assert len(cuts.stages) == stages and all(stage.blocks for stage in cuts.stages)
        assert sum((stage.blocks for stage in cuts.stages), ()) == shape.blocks
        held = sum(stage.common + stage.expert for stage in cuts.stages)
        # A tied matrix, and the embedding that prediction modules read, are on the first stage and again on the last.
        again = stages > 1 and (shape.tie_word_embeddings + bool(shape.extra))
        assert held == count(shape).total_parameters + again * shape.matrix


@given(configs())
def test_parts_add_up_and_recomputation_saves(config: ModelConfig):
    shape = Shape.from_config(config)
    cuts = pipeline(shape, 1, context=config.max_position_embeddings)
    held = [memory(cuts, layout(recompute=recompute)) for recompute in RECOMPUTE]
    for one in held:
        assert one.total == one.weights + one.gradients + one.optimizer + one.activations + one.buffers
        parameters = count(shape).total_parameters
        assert (one.weights, one.gradients, one.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    for block in {*shape.blocks, *shape.extra}:
        none, selective, full = (activation_bytes(shape, block, "bf16", recompute) for recompute in RECOMPUTE)
        assert none > selective > full == 2 * shape.hidden_size


def test_memory_of_the_figures():
    """N = (experts / EP + others) / PP: 2 N weights, 4 N gradients, optimizer / DP."""
    data, expert, depth = 8, 4, 4
    held = memory(pipeline(EVEN, depth), layout(data=data, expert=expert, pipeline=depth, schedule="1f1b"))
    experts = 16 * EVEN.routed
    others = count(EVEN).total_parameters - experts - 2 * EVEN.matrix - EVEN.hidden_size
    # The fullest stage has the embedding or the head as well.
    parameters = (experts / expert + others) / depth + EVEN.matrix
    assert held.weights == pytest.approx(2 * parameters, abs=2 * EVEN.hidden_size)
    assert held.gradients == 2 * held.weights
    local = (experts / data + others / data) / depth + EVEN.matrix / data
    assert held.optimizer == pytest.approx(12 * local, abs=12 * EVEN.hidden_size)


def test_tensor_ranks_split_all_but_experts_and_activations():
    whole, halved = (memory(pipeline(EVEN, 1), layout(tensor=t, data=4 // t, expert=4)) for t in (1, 2))
    common, expert = count(EVEN).total_parameters - 16 * EVEN.routed, 16 * EVEN.routed / 4
    assert whole.weights == 2 * (common + expert)
    assert halved.weights == 2 * (common / 2 + expert)
    assert halved.activations == whole.activations / 2


def test_sharding_spreads_weights_and_gradients():
    """ZeRO stage 3: all of it over the data ranks, but for what is gathered: embedding and head, two blocks and gradients."""
    plain, sharded = (memory(pipeline(EVEN, 1), layout(data=8, sharded=s)) for s in (False, True))
    assert sharded.weights == plain.weights / 8
    assert sharded.gradients == plain.gradients / 8
    assert sharded.optimizer == plain.optimizer
    blocks = 2 * (2 + 4) * (EVEN.every_token(Block(True)) + EVEN.routed)
    assert sharded.buffers - plain.buffers == 2 * 2 * EVEN.matrix + blocks


def test_replicas_hold_everything_again():
    whole, twice = (memory(pipeline(EVEN, 1), layout(data=8, sharded=True, replicas=r)) for r in (1, 2))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(twice, part) == 2 * getattr(whole, part)


def test_spread_experts_are_gathered_alone_and_only_if_others_hold_them_too():
    gathered = [
        memory(pipeline(EVEN, 1), layout(data=8, sharded=True, expert=e)).buffers
        - memory(pipeline(EVEN, 1), layout(data=8, expert=e)).buffers
        for e in (2, 4, 8)
    ]
    common = EVEN.every_token(Block(True))
    assert gathered[2] == 2 * 2 * EVEN.matrix + 2 * (2 + 4) * common
    assert gathered[0] - gathered[1] == (2 + 2 * 4) * EVEN.routed / 4


def test_micro_batches_alive_on_the_first_rank():
    """1F1B keeps PP, interleaving (PP - 1) / chunks more of a rank's blocks, DualPipe PP + 1; never more than there are."""
    cuts = pipeline(EVEN, 4, batch=64)
    one = cuts.kept[id(cuts.stages[0]), "none"] * 16
    assert memory(cuts, layout(pipeline=4, schedule="1f1b")).activations == 4 * one
    assert memory(cuts, layout(pipeline=4, schedule="interleaved", chunks=2)).activations == (4 + 3 / 2) * one
    assert memory(cuts, layout(pipeline=4, schedule="dualpipe")).activations == 5 * one
    few = pipeline(EVEN, 4, batch=2)
    assert memory(few, layout(pipeline=4, schedule="1f1b")).activations == 2 * one


def test_a_folded_place_holds_the_first_and_the_last_stage():
    cuts = cut(pipeline(EVEN, 1).work, 4, "zbv")
    held = memory(cuts, layout(pipeline=4, schedule="zbv"))
    first, last = cuts.stages[0], cuts.stages[7]
    assert held.weights == 2 * (first.common + first.expert + last.common + last.expert)
    kept = 16 * sum(cuts.kept[id(stage), "none"] for stage in (first, last))
    assert held.activations == 4 * kept
    assert memory(cuts, layout(pipeline=4, schedule="dualpipev")).activations == 4.5 * kept


def test_dualpipe_holds_two_stages_but_updates_one():
    cuts = pipeline(EVEN, 4)
    held = memory(cuts, layout(pipeline=4, schedule="dualpipe"))
    first, last = cuts.stages[0], cuts.stages[3]
    assert held.weights == 2 * (first.common + first.expert + last.common + last.expert)
    assert held.optimizer == 12 * (held.weights / 2) / 2


@pytest.mark.parametrize(
    ("optimizer", "precision", "each"),
    [("adamw", "bf16", 12), ("adamw-bf16", "fp8", 8), ("muon", "bf16", 8), ("adamw", "fp32", 8)],
)
def test_bytes_of_optimizer_state(optimizer, precision, each):
    assert optimizer_bytes(optimizer, precision) == each


def test_eight_bits_make_activations_leaner_and_full_recomputation_keeps_the_input():
    shape = catalogue.lookup("deepseek-v3").shape.without_extra()
    sparse = Block(True)
    assert activation_bytes(shape, sparse, "fp8", "selective") < 0.7 * activation_bytes(shape, sparse, "bf16", "selective")
    cuts = pipeline(shape, 1, context=4096, batch=1)
    full = memory(cuts, layout(recompute="full")).activations
    assert full == 4096 * (61 * 2 * 7168 + activation_bytes(shape, sparse, "bf16", "none"))


def test_buffers_are_the_reserve_the_exchange_and_the_loss():
    plain = memory(pipeline(EVEN, 1), layout()).buffers
    assert plain == RESERVE * 80e9 + 16 * 64 * 2
    spread = memory(pipeline(EVEN, 1), layout(data=4, expert=4)).buffers
    assert spread - plain == 2 * 16 * 2 * 32 * 2


def test_the_loss_holds_what_the_kernel_does():
    assert (loss.CHUNK_ELEMENTS, loss.CHUNK_ELEMENTS_OF_A_CARD, loss.LEAST_ROWS) == (
        LOSS_ELEMENTS, LOSS_ELEMENTS_OF_A_CARD, LOSS_LEAST_ROWS
    )  # fmt: skip
    shape = catalogue.lookup("deepseek-v3").shape
    assert loss_bytes(shape, 4096, "bf16", card=True) == pytest.approx(2 * 2**26, rel=0.01)
    assert loss_bytes(shape, 4096, "bf16", card=False) == 64 * shape.vocab_size * 4  # the fewest rows
    assert loss_bytes(shape, 10, "fp32", card=True) == 10 * shape.vocab_size * 4


def test_a_memory_is_the_sum_of_its_parts():
    assert replace(Memory(1, 2, 3, 4, 5), weights=10).total == 24
