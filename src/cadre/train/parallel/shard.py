"""A model sharded over ranks: the routed experts over the expert mesh (expert parallelism), everything by FSDP over the ranks
of a replica.

Gradients are summed, never averaged: the loss of a rank, as that of a micro-batch, already is its share of the batch's mean.
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

# A model of no more parameters is one FSDP unit, all-gathered once a pass. An all-gather for each block, forward and backward,
# would take time to save little memory.
GATHERED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Part:
    """This rank's run of a parameter's rows; a row of a 3-D parameter is an expert. `local`: the rows, in the memory that the
    model computes with. `shape`: of the whole parameter. `mesh`: the ranks that hold the parameter. Along the mesh's first
    dimension (replicas) it is replicated; each of the other dimensions, from left to right, shards it by rows."""

    parameter: nn.Parameter
    local: Tensor
    shape: torch.Size
    mesh: DeviceMesh

    @property
    def holders(self) -> list[int]:
        """The ranks of the first replica, which together hold each row once."""
        return self.mesh.mesh[0].flatten().tolist()

    def rows(self, rank: int) -> slice:
        """Which rows a rank holds. Rows are split as by `torch.chunk`: the last ranks may hold fewer, or none."""
        start, stop = 0, self.shape[0]
        _, *places = (self.mesh.mesh == rank).nonzero()[0].tolist()
        for ranks, place in zip(self.mesh.shape[1:], places, strict=True):
            step = -(-(stop - start) // ranks)
            start, stop = min(start + place * step, stop), min(start + (place + 1) * step, stop)
        return slice(start, stop)

    def as_dtensor(self, local: Tensor) -> DTensor:
        """A local tensor that is sharded like the parameter, such as its momentum, as a DTensor."""
        stride = torch.empty(self.shape, device="meta").stride()
        placements: list[Placement] = [Replicate(), *[Shard(0)] * (self.mesh.ndim - 1)]
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=self.shape, stride=stride)


def shard(
    model: Transformer,
    values: Iterable[tuple[str, Tensor]],
    data_mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    device: torch.device,
    wait: timedelta,
    stages: Sequence[nn.Module] = (),
    fp8_rows: bool = False,
    shared: SharedMemory | None = None,
) -> dict[str, Part]:
    """Give a model on the meta device its values and shard it. This goes block by block, so that beside embedding and head only
    one block is ever whole (a small model is sharded at once). Returns this rank's parts by parameter name.

    values: tensors by name, in the model's order. data_mesh, expert_mesh: `Layout.meshes`. wait: how long to wait for other
    processes. stages: the pipeline's stages on this process, if there is a pipeline; of all other stages only router biases get
    storage. fp8_rows: whether tokens are sent to experts in 8 bits. shared: the memory that the ranks of a replica share, if
    they do."""
    roots = stages or [model]
    held_modules = {module for root in roots for module in root.modules()}
    replicas, expert_ranks, _ = expert_mesh.shape
    expert_ranks_group, copies = expert_mesh.get_group("expert"), expert_mesh.get_group("copy")
    expert_group = ExpertGroup(expert_ranks_group, fp8_rows, open_shared_memory(model, expert_ranks_group, device, wait))
    shared_by_copies = open_shared_memory(model, copies, device, wait) if expert_ranks > 1 else None
    experts: set[nn.Parameter] = set()
    # With a mesh of two dimensions FSDP all-reduces gradients over the first one, which one replica does not need.
    same_experts = expert_mesh["replica", "copy"] if replicas > 1 else expert_mesh["copy"]
    all_ranks = data_mesh if replicas > 1 else data_mesh["shard"]

    def shard_module(module: nn.Module) -> None:
        for block in [block for block in module.modules() if isinstance(block, Block) and expert_ranks > 1]:
            if isinstance(block.mlp, MixtureOfExperts) and not isinstance(block.mlp, ExpertParallelMixture):
                block.mlp = ExpertParallelMixture(block.mlp, expert_group)
                if same_experts.size() > 1:
                    fully_shard(block.mlp.experts, mesh=same_experts)
                experts.update(block.mlp.experts.parameters())
        # Experts that one rank holds alone are kept from FSDP, which would copy them to gather them.
        # A pipeline's stage stays gathered for all micro-batches of a step, until its gradients are reduced.
        reshard = False if stages else None
        ignored = experts if same_experts.size() == 1 else None
        fully_shard(module, mesh=all_ranks, ignored_params=ignored, reshard_after_forward=reshard)

    blockwise = sum(parameter.numel() for root in roots for parameter in root.parameters()) > GATHERED_AT_ONCE
    for name, value in values:
        _set(model, name, value, device, held_modules)
        inside = blockwise and name.startswith(("layers.", "mtp."))
        part = model.get_submodule(".".join(name.split(".")[:2])) if inside else None
        if part is not None and not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers())):
            shard_module(part)
    for root in roots:
        shard_module(root)
    for module in held_modules:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if device.type == "cpu":
                memory = shared_by_copies if isinstance(module, Experts) else shared
                module.set_custom_all_gather(AllGather(memory))  # type: ignore[arg-type]  # no public base class
                module.set_custom_reduce_scatter(ReduceScatter(memory))  # type: ignore[arg-type]
    # Training calls the model's parts one by one, not `forward`. FSDP all-gathers embedding, last norm and head for `hidden`,
    # and frees them at the end of the backward pass.
    for root in roots:
        register_fsdp_forward_method(root, "hidden")
    parts = {}
    expert_names = {name for name, parameter in model.named_parameters() if parameter in experts}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            shape, mesh = parameter.shape, data_mesh
            if name in expert_names:
                shape, mesh = torch.Size((shape[0] * expert_ranks, *shape[1:])), expert_mesh
            parts[name] = Part(parameter, local, shape, mesh)
    return parts


def open_shared_memory(
    model: Transformer, group: dist.ProcessGroup, device: torch.device, wait: timedelta
) -> SharedMemory | None:
    """`SharedMemory.open` for a model that is all-gathered whole, else None: for a larger model the blocks, which are never
    freed, would take too much memory."""
    small = sum(parameter.numel() for parameter in model.parameters()) <= GATHERED_AT_ONCE
    return SharedMemory.open(group, device, wait) if small else None


def remote_part(name: str, shape: torch.Size, data_mesh: DeviceMesh, expert_mesh: DeviceMesh) -> Part:
    """The `Part` of a parameter that only other ranks hold, those of these meshes: its `local` is empty."""
    nothing = torch.empty(0)
    expert_parallel = ".experts." in name and expert_mesh.shape[1] > 1
    return Part(nn.Parameter(nothing), nothing, shape, expert_mesh if expert_parallel else data_mesh)


def _set(model: Transformer, name: str, value: Tensor, device: torch.device, held_modules: set[nn.Module]) -> None:
    """Set a parameter in those of `held_modules` that have it, or a buffer wherever it is."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        setattr(module, leaf, value.to(device))
        return
    tied = model.config.tie_word_embeddings and path in ("embed_tokens", "lm_head")
    owners = held_modules & ({model.embed_tokens, model.lm_head} if tied else {module})
    parameter = nn.Parameter(value.to(device)) if owners else None
    for owner in owners:
        setattr(owner, leaf, parameter)
