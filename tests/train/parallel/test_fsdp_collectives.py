from __future__ import annotations

import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cadre.train.parallel.fsdp_collectives import AllGather, ReduceScatter
from cadre.train.parallel.shared_memory import SharedMemory
from tests.train.parallel.world import world

LENGTH = 5


def gradients(rank: int, ranks: int) -> torch.Tensor:
    return torch.randn(ranks * LENGTH, generator=torch.Generator().manual_seed(rank))


def shared(wanted: bool) -> SharedMemory | None:
    return SharedMemory.open(dist.group.WORLD, torch.device("cpu"), timedelta(minutes=1)) if wanted else None


def reduced(ranks, in_memory: bool) -> torch.Tensor:
    reduce, turns = ReduceScatter(shared(in_memory)), []
    for turn in range(5):
        # As FSDP does: the input first, which is then filled.
        given = reduce.allocate((ranks.size * LENGTH,), dtype=torch.float32, device=torch.device("cpu"))
        out = reduce.allocate((LENGTH,), dtype=torch.float32, device=torch.device("cpu"))
        given.copy_(gradients(ranks.rank, ranks.size) + turn)
        reduce(out, given, dist.group.WORLD, dist.ReduceOp.SUM)
        turns.append(out - turn * ranks.size)
    with pytest.raises(ValueError, match="added"):
        reduce(out, given, dist.group.WORLD, dist.ReduceOp.AVG)
    return torch.stack(turns)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_gets_the_sum_of_its_part(size, in_memory):
    whole = sum(gradients(rank, size) for rank in range(size))
    got = torch.cat(world(size, reduced, in_memory), dim=1)
    torch.testing.assert_close(got, whole.expand_as(got), rtol=1e-5, atol=1e-5)


def gathered(ranks, in_memory: bool) -> torch.Tensor:
    warnings.simplefilter("error")
    gather, turns = AllGather(shared(in_memory)), []
    for turn in range(5):
        out = gather.allocate((ranks.size * LENGTH,), dtype=torch.float32, device=torch.device("cpu"))
        mine = out[ranks.rank * LENGTH : (ranks.rank + 1) * LENGTH]  # FSDP's input lies in its output
        mine.copy_(gradients(ranks.rank, 1) + turn)
        work = gather(out, mine, dist.group.WORLD, async_op=True)
        if work is not None:
            work.wait()
        turns.append(out - turn)
    return torch.stack(turns)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_gets_what_all_have(size, in_memory):
    whole = torch.cat([gradients(rank, 1) for rank in range(size)])
    for got in world(size, gathered, in_memory):
        torch.testing.assert_close(got, whole.expand_as(got), rtol=1e-5, atol=1e-5)
