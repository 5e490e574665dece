"""The recipes for many cards, as far as a machine without any can try them: every number of processes they are meant for has a
layout, a rank of it is built on the meta device and holds what the planner counts, and a machine too small says so at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from cadre.errors import UsageError
from cadre.hub.names import skeleton
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.plan.hardware import hardware
from cadre.train.muon import Muon
from cadre.train.optimizer import Optimizer
from cadre.train.parallel.auto import settle
from cadre.train.parallel.layout import Layout, compose
from cadre.train.parallel.shard import shard
from cadre.train.recipe import Recipe, read_recipe
from cadre.train.run import start
from tests.cli.test_plan import planned

__all__ = ["planned"]
RANKS = (8, 16, 32, 64, 128, 256)
H100 = hardware("h100")


def read(name: str) -> tuple[Recipe, ModelConfig]:
    recipe = read_recipe(name)
    return recipe, recipe.config(recipe.model["vocab_size"])


@contextmanager
def pretended(ranks: int, rank: int) -> Iterator[None]:
    """One of many processes, the others of which are not there: nothing it sends arrives anywhere."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def held(config: ModelConfig, layout: Layout, rank: int) -> int:
    """Parameters that this rank holds of a model cut up without memory for any of it."""
    model, cpu = skeleton(config), torch.device("cpu")
    meshes = layout.meshes(cpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = ((name, torch.empty(tensor.shape)) for name, tensor in skeleton(config).state_dict().items())
        parts = shard(model, values, *meshes, cpu, timedelta(minutes=1))
    for name, part in parts.items():
        rows = part.rows(rank)
        assert part.local.shape[0] == rows.stop - rows.start, name
    biases = sum(buffer.numel() for buffer in model.buffers())  # of routers, which every rank holds whole
    assert sum(part.shape.numel() for part in parts.values()) + biases == count(config).total_parameters
    return sum(part.local.numel() for part in parts.values())


@pytest.mark.parametrize("name, ranks", [("node", 8), *(("v2-lite", ranks) for ranks in RANKS)])
def test_a_rank_of_every_size_is_built_and_holds_what_is_counted(name, ranks):
    recipe, config = read(name)
    settled = settle(recipe, config, ranks, H100, lambda line: None)
    layout = compose(settled, config, ranks)
    rank = ranks - 3
    with pretended(ranks, rank):
        parameters = held(config, layout, rank)
    # Cut into rows, a matrix of fewer rows than a multiple of the ranks leaves some of them a row more or fewer.
    assert parameters == pytest.approx(count(config).total_parameters / layout.shards, rel=0.01)


def state_of(model: Transformer, optimizer: Optimizer) -> int:
    """Bytes that the optimizer will keep of a model: of each parameter that Muon steps a momentum, of others two moments.
    Router biases, which nobody steps, count as those do."""
    muon = {id(p) for part in optimizer.parts if isinstance(part, Muon) for group in part.param_groups for p in group["params"]}
    held = sum(p.numel() * (4 if id(p) in muon else 8) for p in model.parameters())
    return held + 8 * sum(buffer.numel() for buffer in model.buffers())


@pytest.mark.parametrize("name, optimizer", [("node", "muon"), ("v2-lite", "adamw")])
def test_the_plan_prints_the_memory_of_a_rank_in_the_layout_that_training_chooses(planned, name, optimizer):
    recipe, config = read(name)
    model = skeleton(config)
    state = state_of(model, Optimizer(model, recipe.optimizer)) / count(config).total_parameters
    assert recipe.optimizer.name == optimizer and (4 < state < 4.3) == (optimizer == "muon")
    for ranks in RANKS:
        plan = planned(name, "--hardware", "h100", "--devices", ranks)
        settled = settle(recipe, config, ranks, H100, lambda line: None)
        chosen = settled.parallel
        assert compose(settled, config, ranks).data == ranks
        assert plan["fits"] and (plan["batch"], plan["context"]) == (recipe.train.batch, recipe.data.seq_len)
        assert (plan["layout"]["expert"], plan["layout"]["replicas"]) == (chosen.expert, chosen.replicas)
        memory, share = plan["memory_per_device_bytes"], plan["total_parameters"] * chosen.replicas / ranks
        found = [memory[part] for part in ("weights", "gradients", "optimizer")]
        assert found == pytest.approx([4 * share, 4 * share, state * share])


@pytest.mark.parametrize("name", ["node", "v2-lite"])
def test_a_machine_that_is_too_small_is_told_at_once_with_numbers(name, tmp_path, monkeypatch):
    class Small:
        total = 16 * 2**30

    monkeypatch.setattr(psutil, "virtual_memory", Small)
    recipe, config = read(name)
    with pytest.raises(UsageError, match=r"the model has [\d,]+ parameters: training takes \d+ GiB .* there are 16 GiB"):
        start(recipe, tmp_path / "run", torch.device("cpu"), lambda line: None)
    with pytest.raises(UsageError, match=r"no layout of this model fits 2 x 16\.0 GB: .* needs [\d.]+ GB each"):
        settle(recipe, config, 2, replace(H100, memory_bytes=16e9), lambda line: None)
