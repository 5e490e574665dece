"""The predicted time of one optimizer step under a layout, term by term.

The slowest stage sets the pace. Time that communication spends behind computation is `hidden`; what stands still is the sum
of `terms`. Sources beside each rule; docs/plan.md tells the whole of it.
"""

from __future__ import annotations

from cadre.plan.hardware import LINK_EFFICIENCY
from cadre.plan.layout import Layout, Pipeline, Workload
from cadre.plan.memory import GRADIENT_BYTES, rows_sent, weight_bytes
from cadre.plan.shape import Latent, Shape


def step(cuts: Pipeline, layout: Layout) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one step by cause (their sum is the step), and seconds of communication hidden behind computation."""
    work = cuts.work
    device, blocks = work.device, cuts.slowest_blocks
    micro_batches, depth = layout.micro_batches(work.batch), layout.pipeline
    tokens = layout.micro_batch * work.context
    rate = device.flops[work.precision] * device.efficiency[work.precision] * layout.tensor
    forward = cuts.flops * tokens / rate
    again = 0.0
    if layout.recompute == "full":
        again = forward
    elif layout.recompute == "selective":
        again = len(blocks) * _expansion_flops(work.shape) * tokens / rate
    sparse = sum(block.sparse for block in blocks)
    exchange = sparse * _all_to_all(work, layout)
    replays = 3 if layout.recompute == "full" else 2  # forward, backward, and forward again
    split = len(blocks) * _tensor(work, layout) * replays
    hop = _hop(work, layout)
    exchanges = replays * exchange
    compute = 3 * forward + again
    hidden = {"all_to_all": 0.0, "pipeline": 0.0, "gradients": 0.0}
    twice = 0.0
    if layout.schedule == "dualpipe":
        # Forward and backward of two micro-batches hide each other's communication (arXiv 2412.19437, section 3.2.1).
        exposed = max(0.0, exchanges - _cover(work, compute))
        hidden["all_to_all"] = micro_batches * (exchanges - exposed)
        transfers = 2 * hop if device.cpu else 0.0
        hidden["pipeline"] = micro_batches * (2 * hop - transfers)
        both, backward = compute + exposed + split, 2 * forward + again + (replays - 1) * exchange
        bubble = (depth / 2 - 1) * max(0.0, both + backward - 3 * forward)
    else:
        exposed = exchanges
        transfers = 2 * hop * (2 if cuts.folded else layout.chunks)
        # One forward one backward: (PP - 1)(F + B); interleaved: that over the chunks (arXiv 2104.04473, section 2.2.2).
        bubble = (depth - 1) * (compute + exchanges + split) / layout.chunks
        if cuts.folded:
            one_way = forward + (exchanges + split) / 2  # forward, or backward to the inputs
            bubble, twice = _v_shaped(layout, one_way / 2, forward / 2, micro_batches, device.cpu)
    terms = {
        "compute": micro_batches * 3 * forward,
        "recompute": micro_batches * again + twice,
        "all_to_all": micro_batches * exposed,
        "tensor": micro_batches * split,
        "pipeline": micro_batches * transfers,
        "bubble": bubble,
    }
    if layout.sharded:
        terms["gradients"], hidden["gradients"] = _gathering(cuts, layout, compute, micro_batches)
    else:
        terms["gradients"], hidden["gradients"] = _gradients(cuts, layout, forward)
    terms["optimizer"] = _update(cuts, layout)
    return terms, hidden


def _cover(work: Workload, compute: float) -> float:
    """Seconds of communication that so many seconds of computation hide. On a CPU none: the cores that send are those that
    compute."""
    return 0.0 if work.device.cpu else compute


def _v_shaped(layout: Layout, chunk: float, weights: float, micro_batches: int, at_once: bool) -> tuple[float, float]:
    """Seconds of bubble, and of backward passes made twice, of the two schedules that put off the gradients of weights.

    chunk: seconds of one stage's forward pass of a micro-batch, and as many of its backward pass to the inputs; weights:
    seconds of its backward pass to the weights. at_once: the kernels give both gradients at once, so that each of the two
    backward passes takes the time of both. zbv puts off the gradients of all weights, dualpipev those of 2 (PP - 1) chunks.

    These are the times that torch 2.13's own schedules (`ScheduleZBVZeroBubble`, `ScheduleDualPipeV`) take when their lists of
    operations, for 2, 4 and 8 places, are laid out on a clock with such seconds.
    """
    places = layout.pipeline
    if layout.schedule == "zbv":
        if at_once:
            return (places - 1) * (chunk + weights), micro_batches * 2 * (chunk + weights)
        return (places - 1) * chunk, 0.0
    if at_once:
        return min(2, places - 1) * weights, 2 * (places - 1) * (chunk + weights)
    return (places - 1) * (2 * chunk - weights), 0.0


def _expansion_flops(shape: Shape) -> float:
    """Forward FLOPs a token and block that selective recomputation repeats: the up-projections of latent attention."""
    attention = shape.attention
    if not isinstance(attention, Latent):
        return 0.0
    heads = attention.num_attention_heads
    queries = (attention.q_lora_rank or 0) * heads * attention.qk_head_dim
    return 2 * (queries + attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim))


def _all_to_all(work: Workload, layout: Layout) -> float:
    """Seconds that one block's dispatch and combine take for one micro-batch on one device.

    With DeepSeek's kernels a token goes once to each node that holds some of its experts, min(top-k, node limit) at most, and
    from there to each expert over the node's own links; both happen at once (arXiv 2412.19437, section 3.2.2). `cadre train`
    sends it once to each device that holds some of its experts, wherever that is, in one all-to-all, with 8 bytes a choice
    forward and 4 backward. Dispatch is in 8 bits where the training is, combine is not.
    """
    experts = work.shape.experts
    if layout.expert == 1 or experts is None:
        return 0.0
    node = work.device.node_size
    wide = weight_bytes(work.precision)
    narrow = work.precision == "fp8" or (work.degrees is not None and work.degrees.fp8_rows)
    row = work.shape.hidden_size * ((1 if narrow else wide) + wide)
    local = min(layout.expert, node)
    rows = rows_sent(work, layout.expert)
    if work.degrees is None:
        nodes = -(-layout.expert // node)
        abroad = min(experts.num_experts_per_tok, experts.node_limit, nodes) * (1 - 1 / nodes)
        near = rows * (1 - 1 / local)
    else:
        row += 6 * experts.num_experts_per_tok
        abroad = rows * (layout.expert - local) / layout.expert
        near = rows * (local - 1) / layout.expert
    sent = layout.micro_batch * work.context / layout.tensor * row / LINK_EFFICIENCY
    return sent * max(abroad / work.device.network_bandwidth, near / work.device.link_bandwidth)


def _tensor(work: Workload, layout: Layout) -> float:
    """Seconds that one block's tensor parallelism takes in one forward pass of a micro-batch: gather and scatter around
    attention, and around the feed-forward unless its experts are spread instead (arXiv 2205.05198, section 4.2.1)."""
    if layout.tensor == 1:
        return 0.0
    experts = work.shape.experts
    rounds = 2 if experts is None or experts.n_shared_experts else 1
    moved = 2 * (layout.tensor - 1) / layout.tensor * work.shape.hidden_size * weight_bytes(work.precision)
    return rounds * moved * layout.micro_batch * work.context / (work.device.link_bandwidth * LINK_EFFICIENCY)


def _hop(work: Workload, layout: Layout) -> float:
    """Seconds to hand one micro-batch's hidden states to the next stage."""
    if layout.pipeline == 1:
        return 0.0
    moved = layout.micro_batch * work.context / layout.tensor * work.shape.hidden_size * weight_bytes(work.precision)
    far = layout.data * layout.tensor >= work.device.node_size
    rate = work.device.network_bandwidth if far else work.device.link_bandwidth
    return moved / (rate * LINK_EFFICIENCY)


def _spread(work: Workload, ranks: int, stride: int, moved: float) -> float:
    """Seconds to scatter or gather `moved` bytes over `ranks` that are `stride` devices apart: over the node's links, and
    beyond it once for all ranks of the node, each with its own adapter."""
    if ranks == 1:
        return 0.0
    local = max(1, min(ranks, work.device.node_size // stride))
    near = moved * (local - 1) / local / work.device.link_bandwidth
    nodes = ranks / local
    far = moved / local * (nodes - 1) / nodes / work.device.network_bandwidth
    return max(near, far) / LINK_EFFICIENCY


def _parameters(cuts: Pipeline, layout: Layout) -> tuple[float, float]:
    """Parameters of the fullest rank: those every token passes, and its experts'."""
    if layout.schedule == "dualpipe" or cuts.folded:
        ranks = [(a.common + b.common, a.expert + b.expert) for a, b in cuts.pairs]
    else:
        ranks = [(stage.common, stage.expert) for _, stage in cuts.kinds]
    common, expert = max(ranks, key=lambda rank: rank[0] / layout.tensor + rank[1] / layout.expert)
    return common / layout.tensor, expert / layout.expert


def _gradients(cuts: Pipeline, layout: Layout, forward: float) -> tuple[float, float]:
    """Seconds that gradients and updated weights take, exposed and hidden: the scatter behind the last micro-batch's
    backward pass, the gather of weights behind the first one's forward pass."""
    work = cuts.work
    common, expert = _parameters(cuts, layout)
    scatter = _spread(work, layout.data, layout.tensor, common * GRADIENT_BYTES)
    scatter += _spread(work, layout.copies, layout.expert, expert * GRADIENT_BYTES)
    gather = scatter * weight_bytes(work.precision) / GRADIENT_BYTES
    exposed = max(0.0, scatter - _cover(work, 2 * forward)) + max(0.0, gather - _cover(work, forward))
    return exposed, scatter + gather - exposed


def _gathering(cuts: Pipeline, layout: Layout, compute: float, micro_batches: int) -> tuple[float, float]:
    """The same for sharded weights: gathered for the forward and again for the backward pass of every micro-batch, and
    gradients scattered after it, block by block behind the computation (arXiv 2304.11277, section 3.3). Replicas add up their
    shares of the gradients as well: a scatter and a gather."""
    work = cuts.work
    common, expert = _parameters(cuts, layout)
    shards, copies = layout.shards, layout.copies
    wide = 2 * work.held_bytes + GRADIENT_BYTES
    each = _spread(work, shards, layout.tensor, common * wide) + _spread(work, copies, layout.expert, expert * wide)
    shares = (common / shards + expert / copies) * GRADIENT_BYTES
    each += 2 * _spread(work, layout.replicas, shards * layout.tensor, shares)
    exposed = micro_batches * max(0.0, each - _cover(work, compute))
    return exposed, micro_batches * each - exposed


def _update(cuts: Pipeline, layout: Layout) -> float:
    """Seconds to read and write the states of the parameters that one device updates, and of Muon's iterations on them."""
    work = cuts.work
    common, expert = _parameters(cuts, layout)
    shared = 2 if layout.schedule == "dualpipe" else 1
    own = (common / layout.shards + expert / layout.copies) / shared
    moved = 2 * work.state_bytes + GRADIENT_BYTES + work.held_bytes
    seconds = own * moved / work.device.memory_bandwidth
    if work.optimizer == "muon":
        rate = work.device.flops[work.precision] * work.device.efficiency[work.precision] * layout.tensor
        seconds += _newton_schulz_flops(cuts, layout) / shared / rate
    return seconds


def _newton_schulz_flops(cuts: Pipeline, layout: Layout) -> float:
    """FLOPs of one device's share of Muon's iterations, on the slowest stage: 5 of them, 3 of routed experts
    (`cadre.train.optimizer`), each a Gram matrix, its square, both of which are symmetric, and a product (K. Jordan 2024)."""

    def one(rows: int, columns: int) -> float:
        m, n = sorted((rows, columns))
        return 0.75 * (2 * m * m * n + 2 * m**3) + 2 * m * m * n

    shape, blocks = cuts.work.shape, cuts.slowest_blocks
    common = 5 * sum(one(*matrix) for block in blocks for matrix in shape.matrices(block))
    experts = 0.0
    if shape.experts:
        sparse = sum(block.sparse for block in blocks) * shape.experts.n_routed_experts
        experts = 3 * sparse * 3 * one(shape.experts.moe_intermediate_size, shape.hidden_size)
    return common / layout.shards + experts / layout.expert / layout.copies
