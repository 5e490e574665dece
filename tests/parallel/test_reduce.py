from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cadre.train.parallel.reduce import ReduceByExchange
from tests.parallel.world import world

LENGTH = 5


def gradients(rank: int, ranks: int) -> torch.Tensor:
    return torch.randn(ranks * LENGTH, generator=torch.Generator().manual_seed(rank))


def reduced(ranks) -> torch.Tensor:
    reduce = ReduceByExchange()
    out = reduce.allocate((LENGTH,), dtype=torch.float32, device=torch.device("cpu"))
    reduce(out, gradients(ranks.rank, ranks.size), dist.group.WORLD, dist.ReduceOp.SUM)
    with pytest.raises(ValueError, match="added"):
        reduce(out, gradients(ranks.rank, ranks.size), dist.group.WORLD, dist.ReduceOp.AVG)
    return out


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_gets_the_sum_of_its_part(size):
    whole = sum(gradients(rank, size) for rank in range(size))
    torch.testing.assert_close(torch.cat(world(size, reduced)), whole)
