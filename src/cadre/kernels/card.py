"""What a card offers our kernels."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can be had: on NVIDIA's cards, where torch brought it along."""
    return device.type == "cuda" and torch.version.hip is None and importlib.util.find_spec("triton") is not None


@functools.cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether kernels in Triton can multiply FP8 there: from Ada and Hopper on."""
    return has_triton(device) and torch.cuda.get_device_capability(device) >= (8, 9)
