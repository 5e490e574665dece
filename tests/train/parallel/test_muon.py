from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cadre.train.muon import Muon
from cadre.train.parallel.muon import ShardedMuon
from cadre.train.parallel.shared_memory import SharedMemory
from tests.train.parallel.world import world

# Rows that divide and do not, fewer rows than ranks, tall and wide; experts, of which a rank may have none.
SHAPES = [(8, 5), (8, 5), (8, 5), (7, 3), (2, 6), (1, 4), (4, 8, 5), (0, 3, 2), (3, 6, 5), (8, 5), (5, 5)]
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
# Which shapes step together, and how: some of the same shape in different ways, gate and up in one.
GROUPS = [(slice(0, 8), {"iterations": 3}), (slice(8, 9), {"iterations": 3, "fused": 2}), (slice(9, 11), {"iterations": 5})]


def weights(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def groups(parameters: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [{"params": parameters[part], **options} for part, options in GROUPS]


def rows(shape: tuple[int, ...], rank: int, ranks: int) -> slice:
    step = -(-shape[0] // ranks)
    return slice(rank * step, (rank + 1) * step)


def steps(optimizer: Muon, parameters: list[torch.Tensor], cut) -> None:
    for seed in (1, 2, 3):
        for parameter, shape, gradient in zip(parameters, SHAPES, weights(seed), strict=True):
            parameter.grad = gradient[cut(shape)].clone()
        optimizer.step()


def sharded(ranks, in_memory: bool) -> list[torch.Tensor]:
    def cut(shape):
        return rows(shape, ranks.rank, ranks.size)

    parameters = [weight[cut(shape)].clone() for shape, weight in zip(SHAPES, weights(0), strict=True)]
    whole = {parameter: shape[0] for parameter, shape in zip(parameters, SHAPES, strict=True) if len(shape) == 2}
    shared = SharedMemory.open(dist.group.WORLD, torch.device("cpu"), timedelta(minutes=1)) if in_memory else None
    steps(ShardedMuon(groups(parameters), whole, dist.group.WORLD, shared, **OPTIONS), parameters, cut)
    return parameters


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_matrices_in_rows_step_as_whole_ones(size, in_memory):
    parameters = weights(0)
    steps(Muon(groups(parameters), **OPTIONS), parameters, lambda shape: slice(None))
    for parameter, *parts in zip(parameters, *world(size, sharded, in_memory), strict=True):
        torch.testing.assert_close(torch.cat(parts), parameter, rtol=1e-5, atol=1e-5)
