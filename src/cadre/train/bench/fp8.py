"""What a step gains by experts that multiply in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cadre.kernels.limits import default_device, training_dtype
from cadre.model.config import ModelConfig
from cadre.train.bench.step import check_length, circumstances
from cadre.train.bench.worker import ours, race, result
from cadre.train.checks import check_fp8, check_memory


def bench_fp8(
    config: ModelConfig, *, batch: int, seq_len: int, steps: int, dtype: torch.dtype | None, note: Callable[[str], None]
) -> dict[str, Any]:
    """Time a step with experts in `dtype` and in FP8, in turn.

    Returns `plain` and `fp8`, each with median step and peak memory, and `speed_ratio`, the plain step over FP8's. Raises
    `UsageError` for a model without experts, and on a card without FP8.
    """
    device = default_device()
    check_fp8(config, device, "--fp8")
    check_length(config, seq_len)
    check_memory(config, device, beside=config)
    if device.type == "cpu":
        note("no processor multiplies FP8: what is timed is the reference that computes the same in float32")
    dtype = dtype or training_dtype(device)
    shape: dict[str, Any] = {"batch": batch, "seq_len": seq_len}
    builds = {
        "experts": ours(config, **shape, dtype=dtype),
        "experts in FP8": ours(config, **shape, dtype=dtype, fp8_experts=True),
    }
    taken = race(builds, steps, lambda turn: note(f"turn {turn}"))
    plain, narrow = (result(config, **shape, taken=one) for one in taken)
    return {
        "plain": plain,
        "fp8": narrow,
        "speed_ratio": plain["step_seconds_median"] / narrow["step_seconds_median"],
        **circumstances(batch, seq_len, dtype, device),
    }
