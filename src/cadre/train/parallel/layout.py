"""Which process does what: the one place where the dimensions of `[parallel]` are combined.

Every process is a data rank: it takes its share of each batch's sequences. Neighbouring ranks form a replica, over which all
parameters are sharded (FSDP); replicas exchange only gradients (hybrid sharding). Within a replica `expert` neighbouring ranks
share a copy of the experts: each holds an equal run of them, and they send each other tokens. Ranks that hold the same experts
shard these among themselves. 8 processes with `replicas` 2 and `expert` 2, a mesh [replica 2, expert 2, copy 2]:

                               expert rank 0          expert rank 1
    replica 0    copy 0    rank 0: experts 0..E/2   rank 1: experts E/2..E
                 copy 1    rank 2: experts 0..E/2   rank 3: experts E/2..E
    replica 1    copy 0    rank 4: experts 0..E/2   rank 5: experts E/2..E
                 copy 1    rank 6: experts 0..E/2   rank 7: experts E/2..E

With `context` above 1, so many neighbouring ranks take the same sequences, and each computes some of their positions
(`cadre.train.parallel.context`). Parameters, gradients and experts are sharded as before.

With `pipeline` above 1, there is one such layout for each place in the pipeline; ranks are numbered place by place. A place
holds one stage of the model or two (`cadre.train.parallel.pipeline`). The n-th ranks of all places take the same sequences.

Expert parallelism uses the data ranks and needs no more processes (DeepSeek-V3 report, section 3.2). The ranks of a node are
numbered one after the other. So the experts of a routing group lie on neighbouring ranks, and a router that is limited to some
groups sends tokens only to the ranks of these.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.plan.layout import TWO_STAGES, V_SHAPED, stage_blocks, wanted_micro_batches
from cadre.plan.shape import Shape
from cadre.train.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """`data`: number of data ranks; with a pipeline, at each place. `expert`: of ranks that share a copy of the experts.
    `replicas`: of groups of ranks that each hold all parameters. `context`: of ranks that share sequences. `pipeline`: of
    places in the pipeline. `stages`: the blocks of every stage of the pipeline. `fp8_rows`: whether tokens are sent to experts
    in 8 bits."""

    data: int
    expert: int = 1
    replicas: int = 1
    context: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    stages: tuple[range, ...] = ()
    fp8_rows: bool = False

    @property
    def readers(self) -> int:
        """How many parts the sequences of a batch are divided into, one for each group of `context` neighbouring ranks."""
        return self.data // self.context

    @property
    def shards(self) -> int:
        """How many ranks a replica has."""
        return self.data // self.replicas

    @property
    def copies(self) -> int:
        """How many ranks of a replica have the same experts to hold, which are sharded over them."""
        return self.shards // self.expert

    @property
    def v_shaped(self) -> bool:
        """Whether the stages go through the places of the pipeline in order and then back, so that the first place holds the
        first and the last stage."""
        return self.pipeline > 1 and self.schedule in V_SHAPED

    @property
    def places(self) -> list[int]:
        """For each stage the place in the pipeline that holds it."""
        back = self.v_shaped
        turn = [*range(self.pipeline), *(reversed(range(self.pipeline)) if back else range(self.pipeline))]
        return turn[: len(self.stages)]

    def meshes(self, device: torch.device, place: int = 0) -> tuple[DeviceMesh, DeviceMesh]:
        """The data mesh and the expert mesh of a place in the pipeline: its ranks as [replica, shard] and as [replica, expert,
        copy]. Every process must call it for every place."""
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        ranks = torch.arange(place * self.data, (place + 1) * self.data).view(self.replicas, self.shards)
        data = DeviceMesh(device.type, ranks, mesh_dim_names=("replica", "shard"))
        # The order of dimensions in which experts are sharded: first by expert rank, then each run over its copies.
        expert_ranks = ranks.view(self.replicas, self.copies, self.expert).transpose(1, 2).contiguous()
        return data, DeviceMesh(device.type, expert_ranks, mesh_dim_names=("replica", "expert", "copy"))


def compose(recipe: Recipe, config: ModelConfig, processes: int) -> Layout:
    """The layout of a recipe, its "auto" degrees chosen, on so many processes. Raises `UsageError` naming the first thing
    that does not fit."""
    section, batch, micro = recipe.parallel, recipe.train.batch, recipe.train.micro_batch
    pipeline = section.pipeline
    _divides("pipeline", pipeline, processes, f"run's {_several(processes)}")
    data = processes // pipeline if section.data == "auto" else section.data
    if data * pipeline != processes:
        staged, wanted = "" if pipeline == 1 else f" and parallel.pipeline is {pipeline}", data * pipeline
        raise UsageError(
            f"parallel.data is {data}{staged}, but the run has {_several(processes)}: start {wanted} (--nproc {wanted}), "
            'or set "auto"'
        )
    replicas, expert, experts = section.replicas, section.expert, config.n_routed_experts if config.has_experts else None
    if replicas == "auto" or expert == "auto":
        raise UsageError('parallel.expert or parallel.replicas is "auto", which only `cadre train` can choose: set a number')
    run = f"run's {_several(data)}" if pipeline == 1 else f"{_several(data)} of each of {pipeline} stages"
    _divides("replicas", replicas, data, run)
    shards = data // replicas
    _divides("expert", expert, shards, run if replicas == 1 else f"{_several(shards)} of each of {replicas} replicas")
    if expert > 1 and not experts:
        raise UsageError(f"parallel.expert is {expert}, but the model has no experts to spread: set 1")
    if expert == 1 and section.rows == "fp8":
        raise UsageError('parallel.rows is "fp8", but with parallel.expert 1 no rows travel: set "compute"')
    if experts and experts % expert:
        raise UsageError(f"parallel.expert is {expert}, which does not divide the {experts} experts: choose another")
    context, seq_len = section.context, recipe.data.seq_len
    _divides("context", context, data, run)
    if context > 1 and seq_len % (2 * context):
        raise UsageError(
            f"parallel.context is {context}, which cuts sequences into {2 * context} equal chunks, but data.seq_len is "
            f"{seq_len}: choose a multiple of {2 * context}"
        )
    readers = data // context
    takers = f"{readers} processes" if context * pipeline == 1 else f"{readers} groups of {context * pipeline} processes"
    if batch % readers:
        raise UsageError(f"train.batch is {batch}, which {takers} cannot share equally: choose a multiple of {readers}")
    share = batch // readers
    if micro and micro < share and share % micro:
        raise UsageError(
            f"train.micro_batch is {micro}, which does not divide the {share} sequences that each of {takers} takes: "
            f"choose one of {_divisors(share)}"
        )
    stages = _stages(recipe, config, share // min(micro or share, share)) if pipeline > 1 else ()
    return Layout(data, expert, replicas, context, pipeline, section.schedule, stages, section.rows == "fp8")


def v_schedules() -> bool:
    """Whether this version of torch runs the V-shaped schedules. In 2.11 a rank sends itself messages, which gloo refuses, and
    gradients of functions written in Python cannot be computed later."""
    return tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2]) >= (2, 13)


def _stages(recipe: Recipe, config: ModelConfig, micro_batches: int) -> tuple[range, ...]:
    """The blocks of each stage of a pipeline."""
    section, blocks = recipe.parallel, config.num_hidden_layers
    pipeline, schedule = section.pipeline, section.schedule
    stages = 2 * pipeline if schedule in TWO_STAGES else pipeline
    if section.context > 1:
        raise UsageError("parallel.pipeline and parallel.context cannot be combined: set one of them to 1")
    if stages > blocks:
        raise UsageError(
            f'parallel.pipeline is {pipeline}, with schedule "{schedule}" {stages} stages, but the model has only {blocks} '
            "blocks: choose fewer"
        )
    if wanted := wanted_micro_batches(schedule, pipeline, micro_batches):
        raise UsageError(
            f'parallel.pipeline is {pipeline}, with schedule "{schedule}" for {wanted} micro-batches of a process, but '
            f"train.batch and train.micro_batch make {micro_batches}: choose a smaller micro_batch"
        )
    return tuple(stage_blocks(Shape.from_config(config), recipe.data.seq_len, stages))


def _divides(name: str, degree: int, ranks: int, those: str) -> None:
    if ranks % degree:
        raise UsageError(f"parallel.{name} is {degree}, which does not divide the {those}: choose one of {_divisors(ranks)}")


def _several(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
