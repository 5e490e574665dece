"""A model in stages is the model: where it is cut, what each process holds of it, and a whole training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cadre.errors import UsageError
from cadre.hub.save import save
from cadre.model.transformer import Transformer
from cadre.plan import catalogue
from cadre.plan.count import count
from cadre.plan.layout import stage_blocks
from cadre.plan.shape import Shape
from cadre.train.parallel import layout as layout_module
from cadre.train.parallel.group import Parallel
from cadre.train.parallel.layout import Layout, compose, v_schedules
from cadre.train.parallel.ranks import Ranks
from cadre.train.recipe import parse_recipe
from tests.runs import RECIPE
from tests.shapes import configs, small
from tests.train.parallel.test_equal import EVERYTHING, assert_same_run, recipe, several, train
from tests.train.parallel.world import world

__all__ = ["recipe"]
SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")


@given(configs(), st.integers(1, 99), st.integers(1, 3))
def test_every_block_is_in_one_stage(config, context, stages):
    stages = min(stages, config.num_hidden_layers)
    cut = stage_blocks(Shape.from_config(config), context, stages)
    assert len(cut) == stages and all(cut)
    assert [block for run in cut for block in run] == list(range(config.num_hidden_layers))


@given(configs(), st.integers(1, 99))
def test_a_cut_in_two_is_the_one_whose_dearer_stage_costs_least(config, context):
    shape = Shape.from_config(config)

    def flops(shape: Shape) -> float:
        return count(shape, context=context).training_flops_per_token / 3

    whole, head, blocks = flops(shape), flops(replace(shape, blocks=(), extra=())), shape.blocks
    costs = []
    for cut in range(1, len(blocks)):
        first = flops(replace(shape, blocks=blocks[:cut], extra=())) - head
        costs.append(max(first, whole - first))
    if costs:
        assert costs[stage_blocks(shape, context, 2)[0].stop - 1] == pytest.approx(min(costs))


def test_the_head_and_what_predicts_further_weigh_on_the_last_stage():
    shape = catalogue.lookup("deepseek-v3").shape
    sizes, bare = ([len(run) for run in stage_blocks(of, 4096, 2)] for of in (shape, shape.without_extra()))
    assert sizes[1] < bare[1] < sizes[0]


@given(st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(1, 12), st.sampled_from([1, 2, 4, 8]), st.integers(2, 12))
def test_a_pipeline_fits_or_is_refused_by_name(schedule, pipeline, micro_batches, data, blocks):
    config = small("deepseek_v3", num_hidden_layers=blocks)
    settings = [f"parallel.pipeline={pipeline}", f"parallel.schedule={schedule}", f"train.batch={micro_batches * data}",
                "train.micro_batch=1"]  # fmt: skip
    stages = pipeline if schedule == "1f1b" else 2 * pipeline
    fits = stages <= blocks and micro_batches >= (stages if schedule == "dualpipev" else pipeline)
    fits &= schedule != "interleaved" or micro_batches % pipeline == 0
    wanted = parse_recipe(RECIPE.format(source='"x"'), "test", settings)
    if pipeline > 1 and not fits:
        with pytest.raises(UsageError, match=rf'parallel\.pipeline is {pipeline}, with schedule "{schedule}"'):
            compose(wanted, config, pipeline * data)
        return
    layout = compose(wanted, config, pipeline * data)
    assert (layout.data, layout.pipeline, len(layout.stages)) == (data, pipeline, stages if pipeline > 1 else 0)
    held = [layout.places.count(place) for place in range(pipeline)]
    assert pipeline == 1 or held == [stages // pipeline] * pipeline
    assert pipeline == 1 or schedule not in ("zbv", "dualpipev") or layout.places[0] == layout.places[-1] == 0


@pytest.mark.parametrize("processes, settings, message", [
    (3, ["parallel.pipeline=2"], r"parallel\.pipeline is 2, which does not divide the run's 3 processes: choose one of 1, 3"),
    (2, ["parallel.pipeline=2", "parallel.data=2"],
     r"parallel\.data is 2 and parallel\.pipeline is 2, but the run has 2 processes: start 4 \(--nproc 4\)"),
    (2, ["parallel.pipeline=2", "parallel.expert=2"], r"does not divide the 1 process of each of 2 stages: choose one of 1"),
    (2, ["parallel.pipeline=2"], r"for at least 2 micro-batches of a process, but .* make 1: choose a smaller micro_batch"),
    (4, ["parallel.pipeline=2", "parallel.context=2", "train.micro_batch=1"],
     r"\.pipeline and parallel\.context cannot be combined"),
    (2, ["parallel.pipeline=2", "parallel.schedule=gpipe"], r"parallel\.schedule"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(processes, settings, message):
    with pytest.raises(UsageError, match=message):
        wanted = parse_recipe(RECIPE.format(source='"x"'), "test", ["train.batch=24", *settings])
        compose(wanted, small("deepseek_v3"), processes)


def test_schedules_that_this_torch_cannot_run_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(layout_module.importlib.metadata, "version", lambda name: "2.11.0+cu130")
    settings = ["parallel.pipeline=2", "parallel.schedule=zbv", "train.batch=24", "train.micro_batch=1"]
    one = Parallel()
    one.size = 2
    with pytest.raises(UsageError, match=r'parallel\.schedule "zbv" needs torch 2\.13 or newer'):
        one.check(parse_recipe(RECIPE.format(source='"x"'), "test", settings), small("deepseek_v3", num_hidden_layers=4))


MODEL = small("deepseek_v3", num_hidden_layers=4, num_nextn_predict_layers=1)


def write(ranks: Ranks, schedule: str, folder: Path) -> list[str]:
    ranks.layout = Layout(1, pipeline=2, schedule=schedule, stages=tuple(stage_blocks(Shape.from_config(MODEL), 8, 4)))
    model = ranks.build(MODEL, torch.device("cpu"), seed=3)
    ranks.save_model(model, dict(ranks.held(model)) | dict(model.named_buffers()), folder / "written", None, torch.float32)
    stored = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    assert stored == list(ranks.held(model))
    return stored


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_each_parameter_is_in_one_place_and_together_they_are_the_model(tmp_path, schedule):
    whole = Transformer(MODEL).initialize(3)
    save(whole, tmp_path / "whole")
    first, second = world(2, write, schedule, tmp_path)
    assert sorted(first + second) == sorted(name for name, _ in whole.named_parameters())
    assert "embed_tokens.weight" in first
    assert ("lm_head.weight" in first) == (schedule == "zbv")
    written, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("written", "whole"))
    assert written.keys() == wanted.keys() and all(torch.equal(written[name], wanted[name]) for name in wanted)


def test_a_pipeline_changes_no_number(tmp_path, recipe):
    settings = (*EVERYTHING, "train.steps=4", "eval.every=2", "checkpoint.every=100", "model.num_hidden_layers=4")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    layouts = {"turn": {"pipeline": 2}} | ({"back": {"pipeline": 2, "schedule": "zbv"}} if v_schedules() else {})
    world(2, several, recipe, tmp_path, layouts, settings)
    for name in layouts:
        assert_same_run(tmp_path / "alone", tmp_path / name)
