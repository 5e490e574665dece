"""The step of `kernels.adamw` in Triton: one pass over memory a parameter, nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from cadre.kernels.adamw import AdamWStep

BLOCK = 4096


def adamw_on_card(steps: Sequence[AdamWStep]) -> None:
    """As the reference, of tensors that lie in one piece."""
    for step in steps:
        count = step.weight.numel()
        numbers = step.beta1, step.beta2, step.eps, step.keep, step.rate, step.unbias
        if count:
            _step[(triton.cdiv(count, BLOCK),)](
                step.weight, step.gradient, step.mean, step.square, count, *numbers, BLOCK=BLOCK, num_warps=8
            )


@triton.jit
def _step(weight, gradient, mean, square, count, beta1, beta2, eps, keep, rate, unbias, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside, other=0.0)
    before = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
    m = before + (g - before) * (1 - beta1)
    v = tl.load(square + at, mask=inside, other=0.0).to(tl.float32) * beta2 + g * g * (1 - beta2)
    tl.store(mean + at, m.to(tl.bfloat16), mask=inside)
    tl.store(square + at, v.to(tl.bfloat16), mask=inside)
    w = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(weight + at, w * keep + rate * m / (tl.sqrt(v) * unbias + eps), mask=inside)
