"""What serving a model could reach at best: a roofline of one decoding step.

A step reads the weights that its tokens pass and every user's cache, multiplies, and exchanges tokens between devices.
Weights and caches are taken as spread evenly over the devices of one copy. Latencies, sampling, prompts and scheduling are
left out: the result is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from cadre.plan.count import count
from cadre.plan.hardware import LINK_EFFICIENCY, Device
from cadre.plan.memory import RESERVE
from cadre.plan.shape import Shape

# Bytes of a weight and of a cached element when serving.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
CACHE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
_USERS = (1, 8, 64, 512)
# The most devices a copy of a mixture of experts is spread over here.
_WIDEST = 64


@dataclass(frozen=True)
class DecodeStep:
    """One step for `users` sequences of a copy. experts: distinct routed experts that a sparse block's tokens touch, on
    average. memory, compute, links: seconds of each; reading and multiplying overlap, links do not."""

    users: int
    experts: float
    memory: float
    compute: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.links

    @property
    def tokens_per_second(self) -> float:
        return self.users / self.seconds


@dataclass(frozen=True)
class Serving:
    """A deployment: `copies` of the model on `group` devices each, with room for `users` sequences a copy."""

    group: int
    copies: int
    users: int
    weight_bytes: float
    cache_bytes_per_user: int
    steps: list[DecodeStep]

    @property
    def best(self) -> DecodeStep:
        """The step with every place taken, which is the last."""
        return self.steps[-1]


def distinct_experts(shape: Shape, tokens: int) -> float:
    """How many of a block's routed experts `tokens` tokens touch on average, each choosing top-k of them evenly."""
    if shape.experts is None:
        return 0.0
    routed = shape.experts.n_routed_experts
    return routed * (1 - (1 - shape.experts.num_experts_per_tok / routed) ** tokens)


def cache_per_user(shape: Shape, context: int, precision: str) -> int:
    """Bytes of one sequence's cache at `context` tokens; a sliding window keeps no more than itself."""
    seen = sum(min(block.window or context, context) for block in shape.blocks)
    return seen * shape.attention.cached * CACHE_BYTES[precision]


def serving(shape: Shape, device: Device, devices: int, precision: str, context: int) -> Serving | None:
    """The way to spread copies over `devices` that decodes most tokens a second with every place taken; None if not one
    copy with one user fits."""
    weights = count(shape.without_extra()).total_parameters * WEIGHT_BYTES[precision]
    cache = cache_per_user(shape, context, precision)
    best: tuple[float, Serving] | None = None
    group = 1
    while group <= devices:
        users = int((group * device.memory_bytes * (1 - RESERVE) - weights) // cache)
        if users >= 1:
            steps = [decode_step(shape, device, group, precision, context, n) for n in (*_below(users), users)]
            made = Serving(group, devices // group, users, weights, cache, steps)
            total = made.copies * made.best.tokens_per_second
            if best is None or total > best[0]:
                best = total, made
            if group >= (_WIDEST if shape.sparse_blocks else device.node_size):
                break
        group *= 2
    return best[1] if best else None


def _below(users: int) -> list[int]:
    return [n for n in _USERS if n < users]


def decode_step(shape: Shape, device: Device, group: int, precision: str, context: int, users: int) -> DecodeStep:
    """One step of a copy on `group` devices for `users` sequences that hold `context` tokens each."""
    counted = count(shape.without_extra(), context=context)
    experts = distinct_experts(shape, users)
    every = counted.active_parameters_without_input_embedding - shape.sparse_blocks * shape.active_routed
    read = (every + shape.sparse_blocks * experts * shape.expert) * WEIGHT_BYTES[precision]
    read += users * cache_per_user(shape, context, precision)
    return DecodeStep(
        users,
        experts,
        read / (group * device.memory_bandwidth),
        users * counted.decode_flops_per_token / (group * device.flops[precision]),
        _links(shape, device, group, precision, users),
    )


def _links(shape: Shape, device: Device, group: int, precision: str, users: int) -> float:
    """Seconds on links: dispatch and combine where there are experts, else two all-reduces a block."""
    if group == 1:
        return 0.0
    nodes = -(-group // device.node_size)
    local = min(group, device.node_size)
    row = shape.hidden_size * CACHE_BYTES[precision]
    if shape.experts and shape.sparse_blocks:
        dispatch = shape.hidden_size * WEIGHT_BYTES[precision]
        rows = users / group * (row + dispatch) * shape.sparse_blocks
        abroad = min(shape.experts.node_limit, nodes) * (1 - 1 / nodes)
        near = shape.experts.num_experts_per_tok * (1 - 1 / local)
    else:
        rows = 2 * users * row * len(shape.blocks)
        near, abroad = 2 * (local - 1) / local, 2 * (nodes - 1) / nodes / local
    return rows / LINK_EFFICIENCY * max(near / device.link_bandwidth, abroad / device.network_bandwidth)
