"""What a rank holds, in bytes, beside what the planner counts for it."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cadre.plan.hardware import hardware
from cadre.plan.layout import Degrees, Workload, layouts
from cadre.plan.memory import Memory, memory
from cadre.plan.shape import Shape
from cadre.train.parallel import shard
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import read_recipe
from cadre.train.run import start
from cadre.train.trainer import Trainer
from tests.train.parallel.test_equal import Nobody, recipe
from tests.train.parallel.world import world

__all__ = ["recipe"]
# Every first dimension divides by four, so that a rank holds exactly its share.
WIDE = (
    "model.model_type=deepseek_v2", "model.hidden_size=128", "model.num_hidden_layers=10", "model.first_k_dense_replace=0",
    "model.num_attention_heads=4", "model.kv_lora_rank=32", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=16",
    "model.v_head_dim=32", "model.intermediate_size=256", "model.n_routed_experts=16", "model.moe_intermediate_size=64",
    "model.num_nextn_predict_layers=0", "balance.use_bias=false", "balance.bias_update=none", "eval.every=100",
    "train.micro_batch=1",
)  # fmt: skip


class Peak(TorchDispatchMode):
    """The most bytes that tensors held at once, those made while it watches and those it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.live: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.bytes = 0

    def see(self, found: Any) -> None:
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.live.add((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage())
        # What is resized, as gathered weights are, is not made or let go of: count all there is.
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in self.live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result


def stepped(parallel: Parallel, recipe: Path, out: Path, size: int, degrees: dict[str, int], optimizer: str) -> dict[str, int]:
    """Bytes of this rank after steps: weights, gradients, moments, and the peak of one step."""
    settings = [
        *WIDE,
        f"train.batch={2 * size}",  # two passes: in the second, gradients and activations are there together
        f"optimizer.name={optimizer}",
        *(f"parallel.{name}={degree}" for name, degree in degrees.items()),
    ]
    trainer = Trainer(start(read_recipe(str(recipe), settings), out, torch.device("cpu"), print, parallel), Nobody())
    trainer.step(next(trainer.run.batches))
    held = parallel.held(trainer.model)
    parts = {"weights": list(held.values()), "gradients": [tensor.grad for tensor in held.values()]}
    parts["optimizer"] = [tensor for tensor in trainer.optimizer.tensors().values() if tensor.ndim]
    trainer.optimizer.zero_grad()
    with Peak() as peak:
        peak.see([list(trainer.model.parameters()), list(trainer.model.buffers()), parts["optimizer"]])
        trainer.step(next(trainer.run.batches))
    return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in parts.items()} | {"peak": peak.bytes}


def counted(recipe: Path, size: int, degrees: dict[str, int], optimizer: str) -> Memory:
    made = read_recipe(str(recipe), [*WIDE, f"train.batch={2 * size}"])
    shape = Shape.from_config(made.config(300))
    device = replace(hardware("cpu-2core"), memory_bytes=0.0)  # so that none of it is kept free
    work = Workload(shape, device, "fp32", made.data.seq_len, 2 * size, optimizer, 1, Degrees(**degrees))
    ((cuts, layout),) = layouts(work, size)
    return memory(cuts, layout)


LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (2, {}), (4, {}), (4, {"expert": 2}), (4, {"expert": 4}), (4, {"replicas": 2, "expert": 2}),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16", "muon"])
def test_the_memory_of_a_rank_falls_as_counted(tmp_path, recipe, monkeypatch, optimizer):
    monkeypatch.setattr(shard, "GATHERED_AT_ONCE", 0)  # as a large model is cut
    alone = stepped(Parallel(), recipe, tmp_path / "alone", 1, {}, optimizer)
    compare("1 process", [alone], counted(recipe, 1, {}, optimizer))
    for number, (size, degrees) in enumerate(LAYOUTS):
        ranks = world(size, stepped, recipe, tmp_path / str(number), size, degrees, optimizer)
        compare(f"{size} processes, {degrees or 'data'}", ranks, counted(recipe, size, degrees, optimizer))


def compare(layout: str, ranks: list[dict[str, int]], count: Memory) -> None:
    peak = max(rank["peak"] for rank in ranks)
    print(f"{layout}: peak {peak / 1e6:.2f} MB a rank, counted {count.total / 1e6:.2f}")
    for rank in ranks:
        for name in ("weights", "gradients", "optimizer"):
            assert rank[name] == getattr(count, name), name
        assert rank["peak"] == pytest.approx(count.total, rel=0.1)
