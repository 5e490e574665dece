"""A model cut up over ranks: everything by FSDP over the data ranks, experts over their own mesh first.

Gradients are added, never averaged: a rank's loss already is its share of the batch's mean, as a micro-batch's is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from cadre.model.experts import MixtureOfExperts
from cadre.model.transformer import Block, Transformer
from cadre.train.parallel.exchange import Exchange, SpreadMixture

# A model of no more parameters is gathered whole, once a pass: a gathering for each block, twice, costs more time than so
# little memory is worth.
GATHERED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Part:
    """This rank's run of a parameter's rows (of its experts, if they are experts'). `local`: the rows themselves, in the
    memory that the model computes with. `shape`: of the whole. `mesh`: the ranks that it is cut over, along its first
    dimension by each dimension of the mesh from left to right."""

    parameter: nn.Parameter
    local: Tensor
    shape: torch.Size
    mesh: DeviceMesh

    def rows(self, rank: int) -> slice:
        """Which rows a rank holds, cut as `torch.chunk` does: the last ranks may hold fewer or none."""
        start, stop = 0, self.shape[0]
        places = (self.mesh.mesh == rank).nonzero()[0].tolist()
        for ranks, place in zip(self.mesh.shape, places, strict=True):
            step = -(-(stop - start) // ranks)
            start, stop = min(start + place * step, stop), min(start + (place + 1) * step, stop)
        return slice(start, stop)

    def as_dtensor(self, local: Tensor) -> DTensor:
        """A tensor that is cut up like the parameter, such as its momentum."""
        stride = torch.empty(self.shape, device="meta").stride()
        cuts = [Shard(0)] * self.mesh.ndim
        return DTensor.from_local(local, self.mesh, cuts, run_check=False, shape=self.shape, stride=stride)


def shard(
    model: Transformer, values: Iterable[tuple[str, Tensor]], data: DeviceMesh, spread: DeviceMesh, device: torch.device
) -> dict[str, Part]:
    """Give a model without storage its values and cut it up, block by block, so that only one block is ever whole beside
    embedding and head (a small model at once). `values`: tensors by name, in the model's order; `data`, `spread`:
    `Layout.meshes`. Returns the parts by parameter name."""
    expert_ranks, replicas = spread.shape
    exchange = Exchange(spread.get_group("expert"))
    experts: set[nn.Parameter] = set()

    def cut(module: nn.Module) -> None:
        for block in [block for block in module.modules() if isinstance(block, Block) and expert_ranks > 1]:
            if isinstance(block.mlp, MixtureOfExperts) and not isinstance(block.mlp, SpreadMixture):
                block.mlp = SpreadMixture(block.mlp, exchange)
                if replicas > 1:
                    fully_shard(block.mlp.experts, mesh=spread["replica"])
                experts.update(block.mlp.experts.parameters())
        # Experts that no two ranks share are no business of FSDP's: gathering them would copy them.
        fully_shard(module, mesh=data, ignored_params=experts if replicas == 1 else None)

    blockwise = sum(parameter.numel() for parameter in model.parameters()) > GATHERED_AT_ONCE
    for name, value in values:
        _give(model, name, value.to(device))
        inside = blockwise and name.startswith(("layers.", "mtp."))
        part = model.get_submodule(".".join(name.split(".")[:2])) if inside else None
        if part is not None and not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers())):
            cut(part)
    cut(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Training calls the parts of the model one by one: this one gathers embedding, last norm and head, and the end of the
    # backward pass lets go of them.
    register_fsdp_forward_method(model, "hidden")
    parts = {}
    spread_names = {name for name, parameter in model.named_parameters() if parameter in experts}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            shape, mesh = parameter.shape, data
            if name in spread_names:
                shape, mesh = torch.Size((shape[0] * expert_ranks, *shape[1:])), spread
            parts[name] = Part(parameter, local, shape, mesh)
    return parts


def _give(model: Transformer, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        setattr(module, leaf, value)
        return
    setattr(module, leaf, nn.Parameter(value))
    if model.config.tie_word_embeddings and path in ("embed_tokens", "lm_head"):
        model.embed_tokens.weight = model.lm_head.weight = module.get_parameter(leaf)
