"""What a card offers our kernels."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can be had: on NVIDIA's cards, where torch brought it along."""
    return device.type == "cuda" and torch.version.hip is None and importlib.util.find_spec("triton") is not None


@functools.cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether kernels in Triton can multiply FP8 there: from Ada and Hopper on."""
    return has_triton(device) and torch.cuda.get_device_capability(device) >= (8, 9)


def launches(*tensors: Tensor) -> bool:
    """Whether kernels in Triton can be given these: whole tensors on the current card, computed now and not traced."""
    device = tensors[0].device
    if not has_triton(device) or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    whole = all(type(x) in (Tensor, torch.nn.Parameter) and x.device == device for x in tensors)
    return whole and device.index == torch.cuda.current_device()  # which is where Triton starts them
