from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.train.parallel.layout import compose
from cadre.train.recipe import Recipe, parse_recipe
from tests.runs import RECIPE
from tests.shapes import small
from tests.train.parallel.world import world


def recipe(*settings: str) -> Recipe:
    return parse_recipe(RECIPE.format(source='"x"'), "test", ["train.batch=24", *settings])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.sampled_from([6, 8, 12]))
def test_a_layout_is_whole_or_refused(processes, replicas, expert, experts):
    config = small("deepseek_v3", n_routed_experts=experts)
    settings = f"parallel.expert={expert}", f"parallel.replicas={replicas}", f"train.batch={8 * processes}"
    if processes % replicas or (processes // replicas) % expert or experts % expert:
        with pytest.raises(UsageError, match=rf"parallel\.(expert is {expert}|replicas is {replicas})"):
            compose(recipe(*settings), config, processes)
        return
    layout = compose(recipe(*settings), config, processes)
    assert (layout.data, layout.expert * layout.copies * layout.replicas) == (processes, processes)


@pytest.mark.parametrize("processes, settings, message", [
    (2, ["parallel.data=4"], r"parallel\.data is 4, but the run has 2 processes: start 4 \(--nproc 4\), or set \"auto\""),
    (1, ["parallel.data=2"], r"but the run has 1 process:"),
    (4, ["parallel.expert=3"], r"parallel\.expert is 3, which does not divide the run's 4 processes: choose one of 1, 2, 4"),
    (4, ["parallel.context=3"], r"parallel\.context is 3, which does not divide the run's 4 processes: choose one of 1, 2, 4"),
    (2, ["parallel.context=2", "data.seq_len=14"],
     r"context is 2, which cuts sequences into 4 equal chunks, but data\.seq_len is 14: choose a multiple of 4"),
    (10, ["parallel.context=2"], r"train\.batch is 24, which 5 groups of 2 processes cannot share equally: .* multiple of 5"),
    (1, ["parallel.expert=2"], r"does not divide the run's 1 process: choose one of 1"),
    (4, ["parallel.expert=4"], r"does not divide the 6 experts"),
    (4, ["parallel.rows=fp8"], r"parallel\.rows is \"fp8\", but with parallel\.expert 1 no rows travel: set \"compute\""),
    (4, ["parallel.replicas=3"], r"parallel\.replicas is 3, which does not divide the run's 4 processes: choose"),
    (6, ["parallel.replicas=3", "parallel.expert=3"],
     r"parallel\.expert is 3, which does not divide the 2 processes of each of 3 replicas: choose one of 1, 2"),
    (5, [], r"train\.batch is 24, which 5 processes cannot share equally: choose a multiple of 5"),
    (2, ["train.micro_batch=8"], r"train\.micro_batch is 8, which does not divide the 12 .*: choose one of 1, 2, 3, 4, 6, 12"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(processes, settings, message):
    with pytest.raises(UsageError, match=message):
        compose(recipe(*settings), small("deepseek_v3"), processes)


def test_a_dense_model_has_no_experts_to_spread():
    with pytest.raises(UsageError, match=r"parallel\.expert is 2, but the model has no experts"):
        compose(recipe("parallel.expert=2"), small("llama"), 2)


@pytest.mark.parametrize("setting, message", [
    ("parallel.data=0", r"parallel\.data: is 0; it must be 'auto' or a whole number, at least 1"),
    ("parallel.expert=true", r"parallel\.expert: is True; it must be 'auto' or a whole number, at least 1"),
    ("parallel.timeout=1e300", r"parallel\.timeout"),
    ("parallel.tensor=2", "parallel: there is no tensor parallelism: data ranks .* and `context`"),
    ("parallel.context=0", r"parallel\.context"),
    ("parallel.expert=0", r"parallel\.expert"), ("parallel.timeout=0", r"parallel\.timeout"),
])  # fmt: skip
def test_the_section_is_checked(setting, message):
    with pytest.raises(UsageError, match=message):
        recipe(setting)


def test_the_planner_says_that_it_does_not_count_cut_sequences():
    with pytest.raises(UsageError, match=r"parallel\.context is 2, which the planner does not count"):
        recipe("parallel.context=2").parallel.degrees()


def test_a_larger_micro_batch_than_a_share_is_the_share():
    assert compose(recipe("train.micro_batch=24"), small("deepseek_v3"), 4).data == 4


def _meshes(ranks, *settings):
    layout = compose(recipe("parallel.expert=2", *settings), small("deepseek_v3"), ranks.size)
    data, spread = layout.meshes(torch.device("cpu"))
    return data.mesh.tolist(), spread.mesh.tolist(), spread.get_local_rank("expert"), spread.get_local_rank("copy")


def test_neighbours_share_a_copy_of_the_experts():
    answers = world(4, _meshes)
    assert all(answer[:2] == ([[0, 1, 2, 3]], [[[0, 2], [1, 3]]]) for answer in answers)
    assert [answer[2:] for answer in answers] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_neighbours_share_a_replica():
    answers = world(4, _meshes, "parallel.replicas=2")
    assert all(answer[:2] == ([[0, 1], [2, 3]], [[[0], [1]], [[2], [3]]]) for answer in answers)
