"""What a layout is: the ways to spread a training run over devices that there are, and how a model is cut into stages.

A stage's `data x tensor` devices hold its experts together: `expert` of them share one copy, so it divides that product, as in
DeepSeek-V3's 16-way pipeline with 64-way expert parallelism and no tensor parallelism (arXiv 2412.19437, section 3.2) or
Megatron's parallel folding (arXiv 2504.14960). What a layout holds is in `cadre.plan.memory`, what a step takes under it in
`cadre.plan.step`, which one is best in `cadre.plan.search`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from cadre.plan.count import count
from cadre.plan.hardware import Device
from cadre.plan.memory import RECOMPUTE, Recompute, Stage, largest_block, optimizer_bytes, weight_bytes
from cadre.plan.shape import Block, Shape

Schedule = Literal["none", "1f1b", "interleaved", "dualpipe", "zbv", "dualpipev"]
# The schedules of `cadre train` (`cadre.train.parallel.pipeline`) with two stages at every place, and of these the ones whose
# stages go through the places in order and then back.
TWO_STAGES = ("interleaved", "zbv", "dualpipev")
V_SHAPED = ("zbv", "dualpipev")


@dataclass(frozen=True)
class Degrees:
    """What a recipe's `[parallel]` says of its layout; None leaves a degree to the search. schedule: of a pipeline. fp8_rows:
    tokens go to experts in 8 bits."""

    expert: int | None = 1
    replicas: int | None = 1
    pipeline: int = 1
    schedule: Schedule = "1f1b"
    fp8_rows: bool = False


@dataclass(frozen=True)
class Workload:
    """What is to be trained on what: `batch` sequences of `context` tokens a step; `micro_batch` sequences at once, if set.

    degrees: if set, the run is one of `cadre train`: spread in the ways that it knows, with weights held and gathered in
    float32, and their casts to a shorter precision kept until the backward pass. Else any layout, with weights held and
    gathered in the precision of computing beside a float32 master copy.
    """

    shape: Shape
    device: Device
    precision: str
    context: int
    batch: int
    optimizer: str = "adamw"
    micro_batch: int | None = None
    degrees: Degrees | None = None
    mtp_share: float = 1.0

    @property
    def held_bytes(self) -> int:
        """Of a weight as it is held and gathered."""
        return weight_bytes(self.held_precision)

    @property
    def cast_bytes(self) -> int:
        """Of a weight's cast for computing, kept beside it."""
        wide = weight_bytes(self.precision)
        return wide if wide < self.held_bytes else 0

    @property
    def state_bytes(self) -> int:
        """Of the optimizer's state of a parameter."""
        return optimizer_bytes(self.optimizer, self.held_precision)

    @property
    def held_precision(self) -> str:
        """Of the weights that the optimizer steps."""
        return self.precision if self.degrees is None else "fp32"

    def flops(self, block: Block) -> float:
        """Forward FLOPs of a block for one token, those of routed experts weighted by how much slower narrow ones run."""
        shape = self.shape
        width = shape.attention.num_attention_heads * (shape.attention.qk_head_dim + shape.attention.v_head_dim)
        flops = 2 * shape.every_token(block) + width * shape.reach(block, self.context)
        if block.sparse and shape.experts:
            slower = 1 + self.device.half_rate_width / shape.experts.moe_intermediate_size
            flops += 2 * shape.active_routed * slower
        return flops

    @cached_property
    def head_flops(self) -> float:
        """Forward FLOPs of what follows the last block: the head, and the prediction modules with a head each."""
        extra = sum(2 * (self.shape.joint() + self.shape.matrix) + self.flops(block) for block in self.shape.extra)
        return 2 * self.shape.matrix + self.mtp_share * extra


@dataclass(frozen=True)
class Layout:
    """One way to spread a run: the degrees multiply to the devices but for `expert`, which divides data x tensor.

    chunks: pieces of the model that an interleaved rank holds. sharded: weights and gradients are spread over the data ranks
    too and gathered block by block (ZeRO stage 3, FSDP); else only optimizer states are (stage 1). replicas: groups of data
    ranks that hold everything each, spread over the group alone (hybrid sharding).
    """

    data: int
    expert: int
    pipeline: int
    tensor: int
    schedule: Schedule
    chunks: int
    micro_batch: int
    recompute: Recompute
    sharded: bool
    replicas: int = 1

    @property
    def shards(self) -> int:
        """Data ranks that a replica's parameters are spread over."""
        return self.data // self.replicas

    @property
    def copies(self) -> int:
        """Data and tensor ranks of a replica that hold the same experts, and spread their states."""
        return self.shards * self.tensor // self.expert

    @property
    def devices(self) -> int:
        return self.data * self.pipeline * self.tensor

    def micro_batches(self, batch: int) -> int:
        """Micro-batches that a pipeline takes through in a step."""
        return -(-batch // (self.data * self.micro_batch))


@dataclass(frozen=True)
class Pipeline:
    """The model cut into stages of about equal compute, with what their memory is made of. folded: each place holds two of
    them, the first and the last, the second and the last but one, and so on."""

    work: Workload
    stages: list[Stage]
    folded: bool = False

    @cached_property
    def flops(self) -> float:
        """Weighted forward FLOPs for one token of the slowest place."""
        return self._flops(self._slowest)

    @cached_property
    def slowest_blocks(self) -> tuple[Block, ...]:
        """The blocks of the slowest place, those of prediction modules included."""
        return tuple(b for s in self._slowest for b in s.blocks + (self.work.shape.extra if s.last else ()))

    @cached_property
    def _slowest(self) -> tuple[Stage, ...]:
        return max(self.pairs if self.folded else [(stage,) for stage in self.stages], key=self._flops)

    def _flops(self, stages: tuple[Stage, ...]) -> float:
        return sum(sum(map(self.work.flops, s.blocks)) + (self.work.head_flops if s.last else 0) for s in stages)

    @cached_property
    def kinds(self) -> list[tuple[int, Stage]]:
        """The stages that differ, each with the first rank that holds one: earlier ranks keep more micro-batches alive."""
        first: dict[tuple[int, int, int], tuple[int, Stage]] = {}
        for rank, stage in enumerate(self.stages):
            first.setdefault((stage.common, stage.expert, len(stage.blocks)), (rank, stage))
        return list(first.values())

    @cached_property
    def pairs(self) -> list[tuple[Stage, Stage]]:
        """The two stages that each DualPipe rank or folded place holds, once for each kind of pair."""
        both = {
            (a.common + b.common, a.expert + b.expert, len(a.blocks) + len(b.blocks)): (a, b)
            for a, b in zip(self.stages, reversed(self.stages), strict=True)
        }
        return list(both.values())

    @cached_property
    def kept(self) -> dict[tuple[int, Recompute], float]:
        """Activation bytes of one token by stage kind and recomputation."""
        return {(id(s), r): s.activations(self.work.precision, r) for s in self.stages for r in RECOMPUTE}

    @cached_property
    def fullest_block(self) -> float:
        return largest_block(self.stages, self.work.precision)


def cut(work: Workload, pipeline: int, schedule: Schedule = "1f1b") -> Pipeline:
    """Cut the blocks into `pipeline` runs, twice as many where a V-shaped schedule folds them, so that the slowest is as fast
    as can be."""
    folded = schedule in V_SHAPED
    blocks = work.shape.blocks
    costs = [work.flops(block) for block in blocks]
    costs[-1] += work.head_flops
    stages = [
        Stage(work.shape, blocks[run.start : run.stop], first=run.start == 0, last=run.stop == len(blocks))
        for run in even_runs(costs, 2 * pipeline if folded else pipeline)
    ]
    return Pipeline(work, stages, folded)


def stage_blocks(shape: Shape, context: int, stages: int) -> list[range]:
    """The blocks of each of `stages` pipeline stages, by the FLOPs of a token in sequences of `context` tokens as `count` has
    them: a block's own, and after the last block those of the head and of the multi-token prediction modules, each with one
    more head. The embedding is looked up and costs none."""

    def forward(blocks: tuple[Block, ...], extra: tuple[Block, ...] = ()) -> float:
        return count(replace(shape, blocks=blocks, extra=extra), context=context).training_flops_per_token / 3

    head = forward(())
    costs = [forward((block,)) - head for block in shape.blocks]
    costs[-1] += forward((), shape.extra)
    return even_runs(costs, stages)


def even_runs(costs: list[float], runs: int) -> list[range]:
    """Cut parts in a row, no fewer than `runs`, into runs of which the dearest is as cheap as can be and none is empty."""
    low, high = max(costs), sum(costs)
    for _ in range(40):
        middle = (low + high) / 2
        if len(_greedy(costs, middle)) <= runs:
            high = middle
        else:
            low = middle
    bounds = _greedy(costs, high)
    while len(bounds) < runs:  # a cut more costs nothing
        widest = max(range(len(bounds)), key=lambda i: bounds[i] - (bounds[i - 1] if i else 0))
        start = bounds[widest - 1] if widest else 0
        bounds.insert(widest, (start + bounds[widest]) // 2)
    return [range(start, end) for start, end in zip([0, *bounds[:-1]], bounds, strict=True)]


def _greedy(costs: list[float], most: float) -> list[int]:
    """Where runs end that are filled from the left up to `most`."""
    ends, held = [], 0.0
    for index, cost in enumerate(costs):
        if held and held + cost > most:
            ends.append(index)
            held = 0.0
        held += cost
    return [*ends, len(costs)]


def layouts(work: Workload, devices: int) -> Iterator[tuple[Pipeline, Layout]]:
    """Every layout of the search, whether it fits or not."""
    if work.degrees is not None:
        yield from _of_trainer(work, devices, work.degrees)
        return
    shape, node = work.shape, work.device.node_size
    routed = _routed(shape)
    for pipeline in _divisors(devices, len(shape.blocks)):
        cuts = cut(work, pipeline)
        for tensor in _divisors(devices // pipeline, node):
            if tensor & (tensor - 1) or shape.attention.num_attention_heads % tensor:
                continue
            data = devices // pipeline // tensor
            for expert in _divisors(routed, data * tensor):
                if (data * tensor) % expert == 0:
                    for rest in _ways(work, pipeline, data):
                        yield cuts, Layout(data, expert, pipeline, tensor, *rest)


def _of_trainer(work: Workload, devices: int, degrees: Degrees) -> Iterator[tuple[Pipeline, Layout]]:
    """Those that `cadre train` can be told: everything sharded within replicas, experts spread within those too. A pipeline's
    stages stay gathered for a whole step."""
    pipeline, schedule = degrees.pipeline, degrees.schedule if degrees.pipeline > 1 else "none"
    data = devices // pipeline
    stages = 2 * pipeline if schedule in TWO_STAGES else pipeline
    if devices % pipeline or stages > len(work.shape.blocks) or not data or work.batch % data:
        return
    share = work.batch // data
    micro_batch = min(work.micro_batch or share, share)
    if share % micro_batch or wanted_micro_batches(schedule, pipeline, share // micro_batch):
        return
    routed, cuts = _routed(work.shape), cut(work, pipeline, schedule)
    chunks, sharded = 2 if schedule == "interleaved" else 1, data > 1 and schedule == "none"
    for replicas in _divisors(data, data):
        for expert in _divisors(routed, data // replicas):
            fits = data // replicas % expert == 0
            if fits and degrees.replicas in (None, replicas) and degrees.expert in (None, expert):
                yield cuts, Layout(data, expert, pipeline, 1, schedule, chunks, micro_batch, "none", sharded, replicas)


def wanted_micro_batches(schedule: str, pipeline: int, micro_batches: int) -> str | None:
    """How many micro-batches of a process the schedule of `cadre train` runs with, in words, unless it runs with these."""
    if schedule == "none":
        return None
    if schedule == "interleaved":
        return f"a multiple of {pipeline}" if micro_batches % pipeline or not micro_batches else None
    least = 2 * pipeline if schedule == "dualpipev" else pipeline
    return f"at least {least}" if micro_batches < least else None


def _routed(shape: Shape) -> int:
    return shape.experts.n_routed_experts if shape.sparse_blocks and shape.experts else 1


def _ways(work: Workload, pipeline: int, data: int) -> Iterator[tuple[Schedule, int, int, Recompute, bool]]:
    """Schedules, chunks, micro-batches, recomputation and sharding worth a look at these degrees."""
    sizes = [work.micro_batch] if work.micro_batch else [1, 2, 4, 8, 16] if pipeline == 1 else [1]
    for size in sizes:
        if size * data > work.batch:
            continue
        for recompute in RECOMPUTE:
            if pipeline == 1:
                yield "none", 1, size, recompute, False
                if data > 1:
                    yield "none", 1, size, recompute, True
                continue
            yield "1f1b", 1, size, recompute, False
            micro_batches = -(-work.batch // (data * size))
            # Interleaving takes micro-batches in rounds of one for each stage (arXiv 2104.04473, section 2.2.2).
            for chunks in (2, 4, 8) if micro_batches % pipeline == 0 else ():
                # Embedding and head may take a chunk each, as in Llama 3 (arXiv 2407.21783, section 3.3.2).
                if chunks * pipeline <= len(work.shape.blocks) + 2:
                    yield "interleaved", chunks, size, recompute, False
            if pipeline % 2 == 0 and micro_batches >= 2 * pipeline:
                yield "dualpipe", 1, size, recompute, False


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
