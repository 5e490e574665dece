"""What this machine can do at most, measured: the ruler that every speed is held against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cadre.kernels.linear import product
from cadre.kernels.native.library import own_products_faster, training_library

# How much faster products of bfloat16 must be to be taken.
_WORTH = 1.2
# How near ours must come to torch's to be taken for what else they bring: no copies of factors, experts in one pass.
_NEAR = 0.6
# FLOP/s that any CPU exceeds that multiplies bfloat16 itself. Where it is emulated six large products take minutes.
_EMULATED = 5e9
_STATUS = Path("/proc/self/status")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_name(dtype: torch.dtype) -> str:
    """As configs and recipes write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_flops_per_second(dtype: torch.dtype, device: torch.device, size: int | None = None, repeats: int = 5) -> float:
    """Rate of one large square matrix product, FLOP/s: the best of `repeats`, multiply and add counted as two. The best,
    not the median: it stands for what the machine can do, and other work can only lower it."""
    if size is None:
        size = 8192 if device.type == "cuda" else 2048
        if device.type == "cpu" and dtype == torch.bfloat16 and _rate((torch.mm,), dtype, device, 256, 1) < _EMULATED:
            size = 256
    # Of float32 also ours, where that is the faster one.
    ours = (product,) if device.type == "cpu" and dtype == torch.float32 and own_products_faster(narrow=False) else ()
    return _rate((torch.mm, *ours), dtype, device, size, repeats)


def _rate(ways: tuple[Callable[..., Any], ...], dtype: torch.dtype, device: torch.device, size: int, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    return 2 * size**3 / min(_seconds(partial(multiply, a, b, out=out), device, repeats) for multiply in ways)


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The least that it takes."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_bytes_per_second(device: torch.device, size: int | None = None, repeats: int = 5) -> float:
    """Rate of adding up one large block, bytes/s: the best of `repeats`. The limit of work that only reads, as decoding does
    its weights; processors often read less a second than they read and write together."""
    if size is None:
        size = 2**30 if device.type == "cuda" else 2**29
    block = torch.ones(size // 4, device=device)
    return block.nbytes / _seconds(block.sum, device, repeats)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are faster than float32's, float32 elsewhere (CPUs that only emulate it)."""
    if device.type == "cuda":
        return torch.bfloat16
    rate = {dtype: gemm_flops_per_second(dtype, device, 768, 3) for dtype in (torch.bfloat16, torch.float32)}
    return torch.bfloat16 if rate[torch.bfloat16] > _WORTH * rate[torch.float32] else torch.float32


def training_dtype(device: torch.device) -> torch.dtype:
    """What to train in: on a CPU with kernels of ours bfloat16 if they multiply its factors, and faster than anyone does
    float32, else float32, which is all that they take otherwise; without them what is `best_dtype`."""
    if device.type == "cuda" or training_library() is None:
        return best_dtype(device)
    if not own_products_faster(narrow=True):
        return torch.float32
    narrow = _rate((partial(product, narrow=True),), torch.float32, device, 768, 3)
    return torch.bfloat16 if narrow > _WORTH * gemm_flops_per_second(torch.float32, device, 768, 3) else torch.float32


@functools.cache
def products_keep_up() -> bool:
    """Whether our products of bfloat16 factors are about as fast here as torch's of bfloat16, which some processors have units
    for (AMX)."""
    if not own_products_faster(narrow=True):
        return False
    device = torch.device("cpu")
    ours = _rate((partial(product, narrow=True),), torch.float32, device, 768, 3)
    return ours > _NEAR * gemm_flops_per_second(torch.bfloat16, device, 768, 3)


def memory_bytes_per_second(device: torch.device, size: int | None = None, repeats: int = 5) -> float:
    """Rate of scaling one large block in place, bytes/s: the best of `repeats`; what is read and what is written both count.
    `size`: bytes of the block; by default 256 MiB (1 GiB on an accelerator), beyond what caches keep from pass to pass.

    In place, because a processor fetches the lines of another block before it overwrites them: a copy moves half as much
    again as it is counted for, and states too low a limit.
    """
    if size is None:
        size = 2**30 if device.type == "cuda" else 2**28
    block = torch.ones(size // 4, device=device)
    return 2 * block.nbytes / _seconds(partial(block.mul_, 1.0), device, repeats)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the accelerator if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage would give the peak of the process that started this one where that was higher.
    return _high_water_mark() or _usage_peak()


def _high_water_mark() -> int | None:
    """Linux keeps the peak of this program alone; None where it does not say."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _usage_peak() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
