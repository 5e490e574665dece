"""What serving a model could reach at best: a roofline of one decoding step.

A step reads the weights that its tokens pass and every user's cache, multiplies, and exchanges tokens between devices. Routed
experts are spread over all devices of a copy, and rows travel to them. Of everything else `tensor` neighbouring devices share
one set of weights, and its users: heads are divided among them, and keys and values as far as there are heads of them, but a
latent belongs to all heads and lies on each. So spreading a latent's users, with a small `tensor`, repeats weights, and
spreading weights repeats latents; the best degree is looked for. (DeepSeek-V3 decodes with 4-way tensor parallelism in
attention beside 80-way data parallelism and experts over 320 devices: arXiv 2412.19437, section 3.4.2.)

Latencies, sampling, prompts and scheduling are left out: the result is an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cadre.plan.count import count
from cadre.plan.hardware import LINK_EFFICIENCY, Device
from cadre.plan.memory import RESERVE
from cadre.plan.shape import Grouped, Shape

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
    """A deployment: `copies` of the model on `group` devices each, of which `tensor` share all weights but the routed experts',
    with room for `users` sequences a copy. `weight_bytes`: of a copy, what is repeated in it as often as it is."""

    group: int
    tensor: int
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
    best: tuple[float, Serving] | None = None
    group = 1
    while group <= devices:
        for tensor in _shared_by(shape, device, group):
            made = _placed(shape, device, group, tensor, precision, context, devices // group)
            total = made.copies * made.best.tokens_per_second if made else 0.0
            if made and (best is None or total > best[0]):
                best = total, made
        if best is not None and group >= (_WIDEST if shape.sparse_blocks else device.node_size):
            break
        group *= 2
    return best[1] if best else None


def _spread(shape: Shape, group: int) -> bool:
    """Whether each of so many devices holds whole experts."""
    return shape.experts is not None and shape.sparse_blocks > 0 and shape.experts.n_routed_experts % group == 0


def _shared_by(shape: Shape, device: Device, group: int) -> list[int]:
    """How many devices of a group may share weights: all of them, or, where there are experts to spread, those of a node at
    most."""
    if not _spread(shape, group):
        return [group]
    powers = [1 << power for power in range(group.bit_length())]
    return [t for t in powers if t <= device.node_size and shape.attention.num_attention_heads % t == 0]


def _placed(
    shape: Shape, device: Device, group: int, tensor: int, precision: str, context: int, copies: int
) -> Serving | None:  # fmt: skip
    weight = WEIGHT_BYTES[precision]
    routed = shape.sparse_blocks * shape.routed * weight
    every = count(shape.without_extra()).total_parameters * weight - routed
    cache = cache_per_user(shape, context, precision)
    room = device.memory_bytes * (1 - RESERVE) - every / tensor - routed / group
    users = group // tensor * int(room * _cache_parts(shape, tensor) // cache)
    if users < 1:
        return None
    steps = [decode_step(shape, device, group, precision, context, n, tensor) for n in (*_below(users), users)]
    return Serving(group, tensor, copies, users, group // tensor * every + routed, cache, steps)


def _cache_parts(shape: Shape, tensor: int) -> int:
    """Into how many parts a cache is cut where so many devices share heads."""
    return min(tensor, shape.attention.num_key_value_heads) if isinstance(shape.attention, Grouped) else 1


def _below(users: int) -> list[int]:
    return [n for n in _USERS if n < users]


def decode_step(
    shape: Shape, device: Device, group: int, precision: str, context: int, users: int, tensor: int
) -> DecodeStep:  # fmt: skip
    """One step of a copy on `group` devices for `users` sequences that hold `context` tokens each, on its busiest device."""
    counted = count(shape.without_extra(), context=context)
    experts = distinct_experts(shape, users)
    active = shape.sparse_blocks * shape.active_routed
    every = counted.active_parameters_without_input_embedding - active
    own = math.ceil(users * tensor / group)  # users of those that share
    touched = experts / group if tensor == group else max(1.0, experts / group)  # whole experts, unless those are cut too
    read = (every / tensor + shape.sparse_blocks * touched * shape.expert) * WEIGHT_BYTES[precision]
    read += own * cache_per_user(shape, context, precision) / _cache_parts(shape, tensor)
    computed = own / tensor * (counted.decode_flops_per_token - 2 * active) + users / group * 2 * active
    links = _exchange(shape, device, group, precision, own / tensor)
    links += _all_reduce(shape, device, group, tensor, own, precision)
    return DecodeStep(users, experts, read / device.memory_bandwidth, computed / device.flops[precision], links)


def _exchange(shape: Shape, device: Device, group: int, precision: str, tokens: float) -> float:
    """Seconds of dispatch and combine for so many tokens of each device: once to each node (as in `cadre.plan.step`), and
    within it to each device that holds some of a token's experts."""
    if group == 1 or not _spread(shape, group) or shape.experts is None:
        return 0.0
    nodes, local = -(-group // device.node_size), min(group, device.node_size)
    row = shape.hidden_size * (CACHE_BYTES[precision] + WEIGHT_BYTES[precision])
    abroad = min(shape.experts.node_limit, nodes) * (1 - 1 / nodes)
    near = shape.experts.touched(group) * (1 - 1 / local)
    seconds = max(near / device.link_bandwidth, abroad / device.network_bandwidth)
    return tokens * row * shape.sparse_blocks * seconds / LINK_EFFICIENCY


def _all_reduce(shape: Shape, device: Device, group: int, tensor: int, users: int, precision: str) -> float:
    """Seconds to add up what the devices that share weights computed: after attention, and after feed-forward where its
    experts are not spread."""
    if tensor == 1:
        return 0.0
    nodes, local = -(-tensor // device.node_size), min(tensor, device.node_size)
    rounds = 2 * len(shape.blocks) - (shape.sparse_blocks if _spread(shape, group) else 0)
    row = shape.hidden_size * CACHE_BYTES[precision]
    near, abroad = 2 * (local - 1) / local, 2 * (nodes - 1) / nodes / local
    seconds = max(near / device.link_bandwidth, abroad / device.network_bandwidth)
    return users * row * rounds * seconds / LINK_EFFICIENCY
