"""A model cut up over ranks: everything by FSDP over the ranks of a replica, experts over their own mesh first.

Gradients are added, never averaged: a rank's loss already is its share of the batch's mean, as a micro-batch's is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from cadre.model.experts import Experts, MixtureOfExperts
from cadre.model.transformer import Block, Transformer
from cadre.train.parallel.dispatch import ExpertGroup, ExpertParallelMixture
from cadre.train.parallel.fsdp_collectives import AllGather, ReduceScatter
from cadre.train.parallel.shared_memory import SharedMemory

# A model of no more parameters is gathered whole, once a pass: a gathering for each block, twice, costs more time than so
# little memory is worth.
GATHERED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Part:
    """This rank's run of a parameter's rows (of its experts, if they are experts'). `local`: the rows themselves, in the
    memory that the model computes with. `shape`: of the whole. `mesh`: the ranks that hold it, whole on each place of the
    mesh's first dimension (replicas), and there cut along its own first dimension by each of the others, from left to right."""

    parameter: nn.Parameter
    local: Tensor
    shape: torch.Size
    mesh: DeviceMesh

    @property
    def holders(self) -> list[int]:
        """Ranks that hold each row once: those of the first replica."""
        return self.mesh.mesh[0].flatten().tolist()

    def rows(self, rank: int) -> slice:
        """Which rows a rank holds, cut as `torch.chunk` does: the last ranks may hold fewer or none."""
        start, stop = 0, self.shape[0]
        _, *places = (self.mesh.mesh == rank).nonzero()[0].tolist()
        for ranks, place in zip(self.mesh.shape[1:], places, strict=True):
            step = -(-(stop - start) // ranks)
            start, stop = min(start + place * step, stop), min(start + (place + 1) * step, stop)
        return slice(start, stop)

    def as_dtensor(self, local: Tensor) -> DTensor:
        """A tensor that is cut up like the parameter, such as its momentum."""
        stride = torch.empty(self.shape, device="meta").stride()
        cuts: list[Placement] = [Replicate(), *[Shard(0)] * (self.mesh.ndim - 1)]
        return DTensor.from_local(local, self.mesh, cuts, run_check=False, shape=self.shape, stride=stride)


def shard(
    model: Transformer,
    values: Iterable[tuple[str, Tensor]],
    data: DeviceMesh,
    spread: DeviceMesh,
    device: torch.device,
    wait: timedelta,
    stages: Sequence[nn.Module] = (),
    fp8_rows: bool = False,
    shared: SharedMemory | None = None,
) -> dict[str, Part]:
    """Give a model without storage its values and cut it up, block by block, so that only one block is ever whole beside
    embedding and head (a small model at once). `values`: tensors by name, in the model's order; `data`, `spread`:
    `Layout.meshes`; `wait`: how long for other processes; `stages`: those of a pipeline that this process holds, so that of the
    rest only router biases get storage; `fp8_rows`: whether rows go to the experts in 8 bits; `shared`: the memory of the
    shards' processes, if they have any. Returns the parts by parameter name."""
    roots = stages or [model]
    here = {module for root in roots for module in root.modules()}
    replicas, expert_ranks, _ = spread.shape
    experts_mesh_group, copies = spread.get_group("expert"), spread.get_group("copy")
    expert_group = ExpertGroup(experts_mesh_group, fp8_rows, open_shared_memory(model, experts_mesh_group, device, wait))
    shared_by_copies = open_shared_memory(model, copies, device, wait) if expert_ranks > 1 else None
    experts: set[nn.Parameter] = set()
    # In a mesh of two dimensions FSDP adds gradients up over the first one, which is no use for one replica.
    alike = spread["replica", "copy"] if replicas > 1 else spread["copy"]
    every = data if replicas > 1 else data["shard"]

    def cut(module: nn.Module) -> None:
        for block in [block for block in module.modules() if isinstance(block, Block) and expert_ranks > 1]:
            if isinstance(block.mlp, MixtureOfExperts) and not isinstance(block.mlp, ExpertParallelMixture):
                block.mlp = ExpertParallelMixture(block.mlp, expert_group)
                if alike.size() > 1:
                    fully_shard(block.mlp.experts, mesh=alike)
                experts.update(block.mlp.experts.parameters())
        # Experts that no two ranks share are no business of FSDP's: gathering them would copy them.
        # A stage is passed by many micro-batches before its gradients are added up: it stays gathered so long.
        again = False if stages else None
        ignored = experts if alike.size() == 1 else None
        fully_shard(module, mesh=every, ignored_params=ignored, reshard_after_forward=again)

    blockwise = sum(parameter.numel() for root in roots for parameter in root.parameters()) > GATHERED_AT_ONCE
    for name, value in values:
        _give(model, name, value, device, here)
        inside = blockwise and name.startswith(("layers.", "mtp."))
        part = model.get_submodule(".".join(name.split(".")[:2])) if inside else None
        if part is not None and not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers())):
            cut(part)
    for root in roots:
        cut(root)
    for module in here:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if device.type == "cpu":
                memory = shared_by_copies if isinstance(module, Experts) else shared
                module.set_custom_all_gather(AllGather(memory))  # type: ignore[arg-type]  # no public base class
                module.set_custom_reduce_scatter(ReduceScatter(memory))  # type: ignore[arg-type]
    # Training calls the parts of the model one by one: this one gathers embedding, last norm and head, and the end of the
    # backward pass lets go of them.
    for root in roots:
        register_fsdp_forward_method(root, "hidden")
    parts = {}
    spread_names = {name for name, parameter in model.named_parameters() if parameter in experts}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            shape, mesh = parameter.shape, data
            if name in spread_names:
                shape, mesh = torch.Size((shape[0] * expert_ranks, *shape[1:])), spread
            parts[name] = Part(parameter, local, shape, mesh)
    return parts


def open_shared_memory(
    model: Transformer, group: dist.ProcessGroup, device: torch.device, wait: timedelta
) -> SharedMemory | None:
    """For a model that is gathered whole. One that is gathered block by block is large, and what its messages take would be
    held for good."""
    small = sum(parameter.numel() for parameter in model.parameters()) <= GATHERED_AT_ONCE
    return SharedMemory.open(group, device, wait) if small else None


def far_part(name: str, shape: torch.Size, data: DeviceMesh, spread: DeviceMesh) -> Part:
    """A parameter that only ranks of other meshes hold, those given, none of which is this one."""
    nothing = torch.empty(0)
    spreads = ".experts." in name and spread.shape[1] > 1
    return Part(nn.Parameter(nothing), nothing, shape, spread if spreads else data)


def _give(model: Transformer, name: str, value: Tensor, device: torch.device, here: set[nn.Module]) -> None:
    """A parameter to the modules of `here` that have it, a buffer to all."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        setattr(module, leaf, value.to(device))
        return
    tied = model.config.tie_word_embeddings and path in ("embed_tokens", "lm_head")
    owners = here & ({model.embed_tokens, model.lm_head} if tied else {module})
    parameter = nn.Parameter(value.to(device)) if owners else None
    for owner in owners:
        setattr(owner, leaf, parameter)
