"""AdamW's step with moments kept in bfloat16, as DeepSeek-V3 was trained (report, section 3.3.3): half of their memory, and
of the bytes a step moves beside weights and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cadre.kernels.card import has_triton
from cadre.kernels.native import structs
from cadre.kernels.native.library import is_plain, kernels, training_kernels_take


@dataclass(frozen=True)
class AdamWStep:
    """What AdamW (arXiv 1711.05101, algorithm 2) does to one parameter: float32 `weight` and `gradient`, bfloat16 `mean` and
    `square`, all of one shape.

    mean <- beta1 mean + (1 - beta1) gradient; square <- beta2 square + (1 - beta2) gradient^2; and
    weight <- keep weight + rate mean / (unbias sqrt(square) + eps), by both as they are before they are rounded. In step t at
    the learning rate lr: keep = 1 - lr decay, rate = -lr / (1 - beta1^t), unbias = 1 / sqrt(1 - beta2^t).
    """

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    beta1: float
    beta2: float
    eps: float
    keep: float
    rate: float
    unbias: float


def adamw_reference(steps: Sequence[AdamWStep]) -> None:
    """One parameter after the other."""
    for step in steps:
        mean = step.mean.to(step.weight.dtype).lerp(step.gradient, 1 - step.beta1)
        square = (step.square.to(step.weight.dtype) * step.beta2).addcmul(step.gradient, step.gradient, value=1 - step.beta2)
        step.mean.copy_(mean)
        step.square.copy_(square)
        step.weight.mul_(step.keep).addcdiv_(mean, square.sqrt_().mul_(step.unbias).add_(step.eps), value=step.rate)


def adamw_in_place(steps: Sequence[AdamWStep]) -> None:
    """As the reference, in one pass over memory: by our kernel on a CPU, on a card by Triton."""
    wide = [tensor for step in steps for tensor in (step.weight, step.gradient)]
    narrow = [tensor for step in steps for tensor in (step.mean, step.square)]
    if not all(tensor.is_contiguous() for tensor in (*wide, *narrow)):
        adamw_reference(steps)
    elif steps and all(has_triton(step.weight.device) for step in steps):
        from cadre.kernels.adamw_triton import adamw_on_card

        adamw_on_card(steps)
    elif training_kernels_take(*wide) and is_plain(*narrow, dtype=torch.bfloat16):
        kernels().cadre_adamw((structs.AdamWStep * len(steps))(*map(_native, steps)), len(steps), torch.get_num_threads())
    else:
        adamw_reference(steps)


def _native(step: AdamWStep) -> structs.AdamWStep:
    pointers = (tensor.data_ptr() for tensor in (step.weight, step.gradient, step.mean, step.square))
    numbers = step.beta1, step.beta2, step.eps, step.keep, step.rate, step.unbias
    return structs.AdamWStep(*pointers, step.weight.numel(), *numbers)
