"""The layout that "auto" stands for: one that fits, the fastest by the planner's count, and the same for all processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.plan.hardware import hardware
from cadre.plan.layout import Workload, layouts
from cadre.plan.shape import Shape
from cadre.train.parallel.auto import settle
from cadre.train.parallel.layout import compose
from cadre.train.parallel.ranks import Ranks
from cadre.train.recipe import Recipe, parse_recipe, read_recipe
from cadre.train.run import start
from tests.runs import RECIPE
from tests.shapes import small
from tests.train.parallel.test_equal import recipe as recipe_file
from tests.train.parallel.world import world

__all__ = ["recipe_file"]
CONFIG = small("deepseek_v3", n_routed_experts=8)
AUTO = ("parallel.expert=auto", "parallel.replicas=auto")
H100 = hardware("h100")


def recipe(*settings: str) -> Recipe:
    return parse_recipe(RECIPE.format(source='"x"'), "test", ["train.batch=24", *settings])


def unheard(line: str) -> None:
    raise AssertionError(line)


@given(st.integers(1, 24), st.sampled_from([None, 1, 2, 3]), st.sampled_from([None, 1, 2]))
def test_what_is_chosen_is_a_layout_and_what_is_given_stays(processes, expert, replicas):
    given_ = {"expert": expert or "auto", "replicas": replicas or "auto"}
    wanted = recipe(f"train.batch={processes * 2}", *(f"parallel.{name}={degree}" for name, degree in given_.items()))
    settled = settle(wanted, CONFIG, processes, H100, lambda line: None).parallel
    for name, degree in given_.items():
        assert getattr(settled, name) == degree or degree == "auto"
    possible = processes % (replicas or 1) == 0 and processes // (replicas or 1) % (expert or 1) == 0 and expert != 3
    if possible:
        layout = compose(wanted.model_copy(update={"parallel": settled}), CONFIG, processes)
        assert layout.expert * layout.copies * layout.replicas == processes


@given(
    st.sampled_from(["1f1b", "interleaved", "zbv", "dualpipev"]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 12),
    st.integers(2, 9),
)  # fmt: skip
def test_what_is_planned_is_what_training_accepts(schedule, pipeline, data, micro_batches, blocks):
    """Blocks and micro-batches that are too few for a schedule are refused by both."""
    config = small("deepseek_v3", n_routed_experts=8, num_hidden_layers=blocks, first_k_dense_replace=1)
    batch = data * micro_batches
    wanted = recipe(
        f"parallel.schedule={schedule}", f"parallel.pipeline={pipeline}", f"train.batch={batch}", "train.micro_batch=1"
    )  # fmt: skip
    work = Workload(
        Shape.from_config(config), H100, "bf16", wanted.data.seq_len, batch, micro_batch=1, degrees=wanted.parallel.degrees()
    )  # fmt: skip
    planned = [layout for _, layout in layouts(work, data * pipeline)]
    try:
        composed = compose(wanted, config, data * pipeline)
    except UsageError:
        assert not planned
    else:
        (layout,) = planned
        assert (layout.data, layout.pipeline) == (composed.data, composed.pipeline)
        assert layout.schedule == (schedule if pipeline > 1 else "none")


def test_nothing_to_choose_says_nothing():
    given_ = recipe("parallel.expert=2")
    assert settle(given_, CONFIG, 4, H100, unheard) is given_


def test_the_memory_decides_and_numbers_say_so():
    """Replicas spare gathering over the slow network as long as they fit."""
    lines: list[str] = []
    wide = small("deepseek_v3", n_routed_experts=8, hidden_size=512, moe_intermediate_size=512)
    slow = replace(H100, node_size=2, network_bandwidth=1e6, link_bandwidth=1e9)
    wanted = recipe("parallel.replicas=auto", "train.dtype=bfloat16")
    rooms = [replace(slow, memory_bytes=room) for room in (1e9, 1.8e8)]
    assert [settle(wanted, wide, 8, room, lines.append).parallel.replicas for room in rooms] == [8, 2]
    assert "on 8 x h100: by the planner's count the fastest that fits" in lines[0] and "of 1.0 GB each" in lines[0]
    message = r"no layout of this model fits 8 x 0\.0 GB: the leanest, expert 1 with replicas 1, needs [\d.]+ GB each"
    with pytest.raises(UsageError, match=message):
        settle(wanted, wide, 8, replace(slow, memory_bytes=1e7), lines.append)


def test_a_batch_that_cannot_be_shared_is_refused_as_ever():
    settled = settle(recipe(*AUTO), CONFIG, 5, H100, unheard)
    with pytest.raises(UsageError, match=r"train\.batch is 24, which 5 processes cannot share"):
        compose(settled, CONFIG, 5)


def _started(ranks: Ranks, recipe: Path, out: Path) -> tuple[object, list[str]]:
    lines: list[str] = []
    run = start(read_recipe(str(recipe), list(AUTO)), out, torch.device("cpu"), lines.append, ranks)
    ranks.anyone(False)  # nobody ends before the other has arrived
    return run.recipe.parallel, [line for line in lines if line.startswith("layout")]


def test_all_processes_choose_alike_and_the_recipe_leaves_the_next_ones_free(tmp_path, recipe_file):
    (first, said), (second, also) = world(2, _started, recipe_file, tmp_path / "run")
    assert first == second and not first.open
    assert read_recipe(str(tmp_path / "run" / "recipe.toml")).parallel.open
    assert said == also and "on 2 x cpu-2core" in said[0]
