"""Which process does what: the one place where the dimensions of `[parallel]` are put together.

Every process is a data rank: it takes its share of each batch's sequences. `expert` neighbouring ones share a copy of the
experts, each holding an equal run of them, and send one another tokens; the data ranks that hold the same experts share
those out among themselves, as all data ranks do with everything else (FSDP):

                    expert rank 0          expert rank 1         of a mesh [expert 2, replica 2] on 4 processes
    replica 0    rank 0: experts 0..E/2   rank 1: experts E/2..E
    replica 1    rank 2: experts 0..E/2   rank 3: experts E/2..E

Expert parallelism within data parallelism costs no process of its own: DeepSeek-V3 report, section 3.2. A node's ranks are
numbered one after the other, so experts that are grouped for routing lie on neighbouring ranks, and a router that is limited
to some groups sends to the ranks of these alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.train.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """Degrees: `data` ranks in all, `expert` of them to a copy of the experts."""

    data: int
    expert: int

    @property
    def replicas(self) -> int:
        """Copies of the experts, each spread over the ranks that hold the same ones."""
        return self.data // self.expert

    def meshes(self, device: torch.device) -> tuple[DeviceMesh, DeviceMesh]:
        """The data ranks [data], and the same ranks as [expert, replica]. Every process must call it."""
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        ranks = torch.arange(self.data)
        data = DeviceMesh(device.type, ranks, mesh_dim_names=("data",))
        # In this order a tensor cut by expert and then by replica is cut from left to right.
        spread = ranks.view(self.replicas, self.expert).T.contiguous()
        return data, DeviceMesh(device.type, spread, mesh_dim_names=("expert", "replica"))


def compose(recipe: Recipe, config: ModelConfig, processes: int) -> Layout:
    """The layout of a recipe on so many processes. Raises `UsageError` naming the first thing that does not fit."""
    section, batch, micro = recipe.parallel, recipe.train.batch, recipe.train.micro_batch
    data = processes if section.data == "auto" else section.data
    if data != processes:
        raise UsageError(
            f'parallel.data is {data}, but the run has {_several(processes)}: start {data} (--nproc {data}), or set "auto"'
        )
    expert, experts = section.expert, config.n_routed_experts if config.has_experts else None
    if data % expert:
        raise UsageError(
            f"parallel.expert is {expert}, which does not divide the run's {_several(data)}: choose one of {_divisors(data)}"
        )
    if expert > 1 and not experts:
        raise UsageError(f"parallel.expert is {expert}, but the model has no experts to spread: set 1")
    if experts and experts % expert:
        raise UsageError(f"parallel.expert is {expert}, which does not divide the {experts} experts: choose another")
    if batch % data:
        raise UsageError(f"train.batch is {batch}, which {data} processes cannot share equally: choose a multiple of {data}")
    share = batch // data
    if micro and micro < share and share % micro:
        raise UsageError(
            f"train.micro_batch is {micro}, which does not divide the {share} sequences that each of {data} processes takes: "
            f"choose one of {_divisors(share)}"
        )
    return Layout(data, expert)


def _several(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
