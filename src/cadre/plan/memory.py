"""Memory of one device in training, by part, under a layout.

Weights, gradients and optimizer states are those of mixed-precision training with optimizer states spread over the data
ranks (ZeRO stage 1, arXiv 1910.02054). Activations are what the backward pass needs of each block, counted tensor by tensor
for an attention that keeps no matrix of scores (arXiv 2205.14135), and spread over the tensor ranks (sequence parallelism,
arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from cadre.plan.shape import Block, Latent, Shape

if TYPE_CHECKING:
    from cadre.plan.layout import Layout, Pipeline, Workload

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")

# Bytes an optimizer keeps of each parameter: its moments, and the float32 master copy where weights are held shorter. Muon
# steps the matrices inside blocks and leaves the rest to AdamW (`left_to_adamw`).
OPTIMIZERS = {"adamw": (8, 4), "adamw-bf16": (4, 4), "muon": (4, 4)}
# Muon's own room, `cadre.train.muon`: elements of matrices of one shape that it takes at once, unless one parameter has more,
# and copies of them that live together: the updates, joined, orthogonalised, and both of those before. Matrices that are cut
# into rows travel all at once. (On a CPU the kernel that steps whole matrices in place needs none of it.)
_MUON_AT_ONCE, _MUON_COPIES, _MUON_CUT_COPIES = 2**24, 5, 6
GRADIENT_BYTES = 4
# Share of a device's memory kept free: the runtime's own context, communication buffers, fragmentation.
RESERVE = 0.05
# Logits that the chunked loss holds at once, elements, and rows at least: `cadre.kernels.loss`, which writes their gradient
# over them. On a CPU they are float32 whatever is multiplied.
LOSS_ELEMENTS, LOSS_ELEMENTS_OF_A_CARD, LOSS_LEAST_ROWS = 2**22, 2**26, 64


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def weight_bytes(precision: str) -> int:
    """Bytes of a weight as it is held for computing; in fp8 training a bf16 copy is what is quantised block by block."""
    return 4 if precision == "fp32" else 2


def optimizer_bytes(optimizer: str, precision: str) -> int:
    """Bytes of a parameter's optimizer state; weights held in float32 are their own master copy."""
    moments, master = OPTIMIZERS[optimizer]
    return moments + (0 if precision == "fp32" else master)


def activation_bytes(shape: Shape, block: Block, precision: str, recompute: Recompute) -> float:
    """Bytes a block keeps of one token from its forward to its backward pass.

    none: every tensor a gradient needs. selective: norms, the SwiGLU product, and the expansion of latent attention are
    computed again, which costs little (DeepSeek-V3 report, section 3.2.3). full: the block's input only.
    In fp8 the inputs of linear layers are kept in 8 bits (section 3.3.3 there), the residual stream and attention in 16.
    """
    wide = weight_bytes(precision)
    narrow = 1 if precision == "fp8" else wide
    hidden, attention = shape.hidden_size, shape.attention
    if recompute == "full":
        return hidden * wide
    lean = recompute == "selective"
    heads = attention.num_attention_heads
    output = heads * attention.v_head_dim
    kept = 2 * hidden * wide + output * wide  # the residual stream twice, and attention's output
    if isinstance(attention, Latent):
        kept += (attention.cached + (attention.q_lora_rank or 0)) * wide
        expanded = heads * (2 * attention.qk_head_dim + attention.v_head_dim)
    else:
        kept += (heads * attention.head_dim + attention.cached) * wide
        expanded = heads * attention.head_dim + attention.cached // 2 if attention.qk_norm else 0
    if not lean:
        kept += expanded * wide + 2 * hidden * narrow  # what attention multiplies; both norms' outputs
    if not block.sparse or shape.experts is None:
        return kept + (2 if lean else 3) * (shape.intermediate_size or 0) * narrow
    experts = shape.experts
    width = experts.moe_intermediate_size
    rows = experts.num_experts_per_tok
    kept += rows * hidden * narrow + experts.n_routed_experts * 4  # dispatched rows; the router's scores in float32
    kept += (rows + experts.n_shared_experts) * (2 if lean else 3) * width * narrow
    return kept if lean else kept + rows * hidden * wide  # the experts' outputs, for the gradient of their weights


@dataclass(frozen=True)
class Stage:
    """A run of blocks that one pipeline rank holds, with the embedding if first, head and prediction modules if last."""

    shape: Shape
    blocks: tuple[Block, ...]
    first: bool
    last: bool

    @cached_property
    def common(self) -> int:
        """Parameters that every data rank holds, split over tensor ranks."""
        shape = self.shape
        held = sum(shape.every_token(block) for block in self.blocks)
        if self.first:
            held += shape.matrix
        if self.last:
            held += shape.hidden_size + shape.matrix * (not (shape.tie_word_embeddings and self.first))
            held += sum(shape.joint() + shape.every_token(block) for block in shape.extra)
            # Prediction modules read the embedding, which then has a copy on the last stage.
            held += shape.matrix * bool(shape.extra and not self.first)
        return held

    @cached_property
    def matrices(self) -> int:
        """Of these, the parameters that Muon steps: those of matrices inside blocks, routers apart."""
        blocks = self.blocks + (self.shape.extra if self.last else ())
        inside = sum(rows * columns for block in blocks for rows, columns in self.shape.matrices(block))
        return inside + (2 * self.shape.hidden_size**2 * len(self.shape.extra) if self.last else 0)

    @cached_property
    def alike(self) -> int:
        """Of these, those of the most common shape, by elements."""
        sizes: dict[tuple[int, int], int] = {}
        for block in self.blocks + (self.shape.extra if self.last else ()):
            for matrix in self.shape.matrices(block):
                sizes[matrix] = sizes.get(matrix, 0) + matrix[0] * matrix[1]
        return max(sizes.values(), default=0)

    @cached_property
    def expert(self) -> int:
        """Parameters of routed experts, spread over expert ranks."""
        blocks = self.blocks + (self.shape.extra if self.last else ())
        return sum(self.shape.routed for block in blocks if block.sparse)

    def activations(self, precision: str, recompute: Recompute) -> float:
        """Bytes kept of one token."""
        blocks = self.blocks + (self.shape.extra if self.last else ())
        kinds = {block.sparse for block in blocks}
        each = {s: activation_bytes(self.shape, Block(s), precision, recompute) for s in kinds}
        return sum(each[block.sparse] for block in blocks)


def left_to_adamw(optimizer: str, precision: str, parameters: float) -> float:
    """Bytes that Muon's run keeps beyond `optimizer_bytes` for parameters that are no matrices inside blocks."""
    if optimizer != "muon":
        return 0.0
    return (optimizer_bytes("adamw", precision) - optimizer_bytes("muon", precision)) * parameters


def state_bytes(shape: Shape, optimizer: str) -> int:
    """Bytes of a whole model's float32 weights, gradients and optimizer states: what training it takes at least."""
    whole = Stage(shape, shape.blocks, first=True, last=True)
    each = weight_bytes("fp32") + GRADIENT_BYTES + optimizer_bytes(optimizer, "fp32")
    left = left_to_adamw(optimizer, "fp32", whole.common - whole.matrices)
    return each * (whole.common + whole.expert) + round(left)


def update_bytes(optimizer: str, matrices: float, alike: float, cut: bool, experts: float, largest: float) -> float:
    """Bytes of float32 that Muon's update makes beside what it updates, on one rank: of its share of the `matrices` that every
    token passes, `cut` into rows or whole with so many `alike`, and of `experts`, two thirds of which are gate and up.
    `largest`: elements of the largest parameter. AdamW makes none."""
    if optimizer != "muon":
        return 0.0
    at_once = max(_MUON_AT_ONCE, largest)
    if not cut:
        return 4 * _MUON_COPIES * min(max(alike, 2 / 3 * experts), at_once)
    return 4 * max(matrices + _MUON_COPIES * min(2 / 3 * experts, at_once), _MUON_CUT_COPIES * matrices)


def largest_block(stages: list[Stage], precision: str) -> float:
    """Bytes that the fullest block keeps of one token, without recomputation: what full recomputation brings back."""
    shape = stages[0].shape
    kinds = {block.sparse for stage in stages for block in stage.blocks}
    return max(activation_bytes(shape, Block(sparse), precision, "none") for sparse in kinds)


def loss_bytes(shape: Shape, tokens: int, precision: str, card: bool) -> int:
    """Bytes of the logits that the chunked loss holds."""
    elements, wide = (LOSS_ELEMENTS_OF_A_CARD, weight_bytes(precision)) if card else (LOSS_ELEMENTS, 4)
    return min(tokens, max(LOSS_LEAST_ROWS, elements // shape.vocab_size)) * shape.vocab_size * wide


def memory(cuts: Pipeline, layout: Layout) -> Memory:
    """Bytes on the fullest device, by part."""
    work = cuts.work
    wide = work.held_bytes
    tokens = layout.micro_batch * work.context / layout.tensor
    again = cuts.fullest_block * tokens if layout.recompute == "full" else 0.0
    fixed = RESERVE * work.device.memory_bytes + _exchange(work, layout, tokens)
    found: list[Memory] = []
    for stages, kept in _held(cuts, layout):
        common, matrices, expert, alike = (
            sum(getattr(stage, name) for stage in stages) for name in ("common", "matrices", "expert", "alike")
        )
        held = whole = common / layout.tensor + expert / layout.expert
        local = common / layout.tensor / layout.shards + expert / layout.expert / layout.copies
        last = any(stage.last for stage in stages)
        logits = loss_bytes(work.shape, layout.micro_batch * work.context, work.precision, not work.device.cpu)
        buffers = logits / layout.tensor if last else 0.0
        if layout.sharded:
            buffers += _gathered(work, layout)
            held = local
        # When the optimizer steps, activations and gathered weights are gone, and it may use their room.
        step = _update_bytes(work, layout, matrices, alike, expert)
        buffers = fixed + max(buffers, step - kept * tokens - again) + work.cast_bytes * whole
        # Both copies that a DualPipe rank holds are updated by two ranks together.
        shared = 2 if layout.schedule == "dualpipe" else 1
        left = (common - matrices) / layout.tensor / layout.shards
        state = (work.state_bytes * local + left_to_adamw(work.optimizer, work.held_precision, left)) / shared
        found.append(Memory(wide * held, GRADIENT_BYTES * held, state, kept * tokens + again, buffers))
    return max(found, key=lambda memory: memory.total)


def _update_bytes(work: Workload, layout: Layout, matrices: float, alike: float, expert: float) -> float:
    experts = work.shape.experts
    largest = 2 * experts.moe_intermediate_size * work.shape.hidden_size * experts.n_routed_experts if experts else 0
    own = expert / layout.expert / layout.copies
    cut = layout.sharded and layout.shards > 1
    share = matrices / layout.tensor / (layout.shards if cut else 1)
    return update_bytes(work.optimizer, share, alike / layout.tensor, cut, own, largest / layout.expert / layout.copies)


def _held(cuts: Pipeline, layout: Layout) -> Iterator[tuple[tuple[Stage, ...], float]]:
    """For each kind of rank: the stages that it holds, and the activation bytes of a token times the micro-batches alive."""
    depth, chunks = layout.pipeline, layout.chunks
    micro_batches = layout.micro_batches(cuts.work.batch)
    if layout.schedule == "dualpipe":
        for a, b in cuts.pairs:
            kept = (cuts.kept[id(a), layout.recompute] + cuts.kept[id(b), layout.recompute]) / 2
            yield (a, b), kept * (depth + 1)
        return
    if cuts.folded:  # DualPipeV keeps a chunk more, as DualPipe does a micro-batch (arXiv 2412.19437, table 2)
        alive = min(depth + (0.5 if layout.schedule == "dualpipev" else 0.0), micro_batches)
        for a, b in cuts.pairs:
            yield (a, b), (cuts.kept[id(a), layout.recompute] + cuts.kept[id(b), layout.recompute]) * alive
        return
    for rank, stage in cuts.kinds:
        alive = float(depth - rank)
        if layout.schedule == "interleaved":  # arXiv 2205.05198, section 4.2.3
            alive = alive + (depth - 1) / chunks
        yield (stage,), cuts.kept[id(stage), layout.recompute] * min(alive, micro_batches)


def rows_sent(work: Workload, ranks: int) -> float:
    """Rows of a token in an all-to-all over so many ranks: of a recipe, as `cadre train` sends them, one for each that holds
    some of its experts, itself included; else one for each expert."""
    experts = work.shape.experts
    assert experts is not None
    return experts.touched(ranks) if work.degrees is not None else experts.num_experts_per_tok


def _exchange(work: Workload, layout: Layout, tokens: float) -> float:
    """Bytes of the rows that are being sent and received in one dispatch and combine."""
    experts = work.shape.experts
    if layout.expert == 1 or experts is None:
        return 0.0
    return 2 * tokens * rows_sent(work, layout.expert) * work.shape.hidden_size * weight_bytes(work.precision)


def _gathered(work: Workload, layout: Layout) -> float:
    """Bytes of whole weights and gradients on a sharded rank (arXiv 2304.11277): embedding and head from a pass's beginning to
    its end; the largest block and the next; gradients twice, as computed and as added up. Experts that are spread are a group
    of their own, gathered when they compute and added up before the rest of the block."""
    shape = work.shape
    wide = work.held_bytes if layout.shards > 1 else 0  # what is not cut up needs no gathering
    ends = (1 if shape.tie_word_embeddings else 2) * shape.matrix / layout.tensor
    held = max(_block_gathered(work, layout, wide, block) for block in set(shape.blocks))
    return wide * ends + max(held, 2 * GRADIENT_BYTES * ends)


def _block_gathered(work: Workload, layout: Layout, wide: int, block: Block) -> float:
    common = work.shape.every_token(block) / layout.tensor
    experts = work.shape.routed / layout.expert if block.sparse else 0.0
    if layout.expert == 1:
        return 2 * (wide + GRADIENT_BYTES) * (common + experts)
    apart = (work.held_bytes if layout.copies > 1 else 0) * experts
    if layout.copies * layout.replicas > 1:  # what no other rank holds needs no adding up
        apart += 2 * GRADIENT_BYTES * experts
    return 2 * wide * common + max(2 * GRADIENT_BYTES * common, apart)
