"""How the cost of a step grows: its time and memory against experts, width, sequence length and batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cadre.errors import RunError, UsageError
from cadre.kernels.limits import default_device, training_dtype
from cadre.model.config import ModelConfig
from cadre.plan.count import count
from cadre.train.bench.step import changed, circumstances
from cadre.train.bench.tax import with_experts
from cadre.train.bench.worker import TimeLeft, ours, race, result

EXPERTS = (8, 16, 32, 64, 128, 256)
WIDTHS = (0.5, 0.75, 1, 1.5, 2)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BATCHES = (0.125, 0.25, 0.5, 1, 2)
# What `quick` keeps of each.
QUICK_EXPERTS, QUICK_WIDTHS, QUICK_LENGTHS, QUICK_BATCHES = (8, 32, 128), (0.5, 1), (256, 1024, 4096), (0.25, 0.5, 1)

# An exponent this much above that of the arithmetic is within what repeated measurements differ by.
TOLERANCE = 0.05

# Hidden sizes and widths of scaled models are multiples of it, as those of real ones.
_ALIGNED = 16


@dataclass(frozen=True)
class Point:
    """One model at one size of batch. `value` is where it lies on its axis."""

    axis: str
    value: int
    config: ModelConfig
    batch: int
    seq_len: int

    @property
    def flops(self) -> int:
        """The counted arithmetic of a step."""
        return count(self.config, context=self.seq_len).training_flops_per_token * self.batch * self.seq_len

    @property
    def key(self) -> tuple[str, int, int]:
        """The same for points of different axes that are the same measurement."""
        return self.config.model_dump_json(), self.batch, self.seq_len


def points(config: ModelConfig, batch: int, seq_len: int, quick: bool = False) -> list[Point]:
    """Every point of every axis through `config` at `batch` x `seq_len`:

    experts: 8 to 256 of them, of which a token takes as many and as wide ones as ever (none for a dense model).
    width: hidden size, heads, latents and feed-forward widths, all scaled alike.
    sequence: 256 to 8,192 positions, at the same tokens a step.
    batch: an eighth of `batch` to twice as much.
    """
    tokens = batch * seq_len
    top_k, width = config.num_experts_per_tok or 0, config.moe_intermediate_size or 0
    config = changed(config, max_position_embeddings=max(config.max_position_embeddings, *LENGTHS, seq_len))
    found = []
    if config.has_experts:
        for experts in QUICK_EXPERTS if quick else EXPERTS:
            if experts >= top_k:
                found.append(Point("experts", experts, with_experts(config, experts, top_k, width), batch, seq_len))
    for factor in QUICK_WIDTHS if quick else WIDTHS:
        wide = scaled(config, factor)
        found.append(Point("width", wide.hidden_size, wide, batch, seq_len))
    for length in QUICK_LENGTHS if quick else LENGTHS:
        if length <= tokens:
            found.append(Point("sequence", length, config, tokens // length, length))
    for some in sorted({max(1, round(batch * factor)) for factor in (QUICK_BATCHES if quick else BATCHES)}):
        found.append(Point("batch", some, config, some, seq_len))
    return found


def scaled(config: ModelConfig, factor: float) -> ModelConfig:
    """The config with all its widths times `factor`: more heads of the same size, the same depth and number of experts."""
    if factor == 1:
        return config
    changes: dict[str, int] = {}
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"):
        value = getattr(config, name)
        if value is not None:
            step = _ALIGNED if value * factor >= _ALIGNED else 1
            changes[name] = max(1, step * round(value * factor / step))
    groups = config.num_key_value_heads or 1
    changes["num_key_value_heads"] = max(1, round(groups * factor))
    changes["num_attention_heads"] = changes["num_key_value_heads"] * (config.num_attention_heads // groups)
    return changed(config, **changes)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """p of the power law y ~ x^p that fits best: the slope of log y over log x by least squares. None where fewer than two
    points differ in x."""
    if len(set(xs)) < 2:
        return None
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def bench_sweep(
    config: ModelConfig,
    *,
    batch: int,
    seq_len: int,
    steps: int,
    dtype: torch.dtype | None,
    quick: bool = False,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Time every point of `points`, each in a process of its own.

    Returns `axes`, by name: `points` (value, shape, `speed`, peak memory, counted FLOPs and parameters, or `reason` where
    one could not run) and what `growth` says of them.
    """
    device = default_device()
    dtype = dtype or training_dtype(device)
    every = points(config, batch, seq_len, quick)
    work = {point.key: point.flops for point in every}
    left = TimeLeft(sum(work.values()))
    measured: dict[tuple[str, int, int], dict[str, Any]] = {}
    for point in every:
        if point.key not in measured:
            where = f"{point.axis} {point.value:,}"
            note(f"{where}: {len(measured)} of {len(work)} done, {left} left")
            measured[point.key] = _measure(point, steps, dtype)
            left.add(point.flops)
    axes = {}
    for axis in dict.fromkeys(point.axis for point in every):
        rows = [{"value": point.value, **measured[point.key]} for point in every if point.axis == axis]
        axes[axis] = {"points": rows, **growth([row for row in rows if "reason" not in row])}
    return {"axes": axes, **circumstances(batch, seq_len, dtype, device)}


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the numbers of an axis grow with its value: `exponents`, fitted over all of it, and `last_exponents`, between the
    last two points, where what is constant hides least. Of `seconds` and of the counted arithmetic (`flops`), of `memory`
    (what the step added to the process) and of the `parameters`. `faster`: whether time grows faster than the arithmetic,
    None where there are too few points to say."""
    xs = [row["value"] for row in rows]
    columns = {
        "seconds": [row["step_seconds_median"] for row in rows],
        "flops": [row["flops"] for row in rows],
        "memory": [max(1, row["memory_bytes"]) for row in rows],
        "parameters": [row["total_parameters"] for row in rows],
    }
    fits = {name: exponent(xs, ys) for name, ys in columns.items()}
    time, arithmetic = fits["seconds"], fits["flops"]
    return {
        "exponents": fits,
        "last_exponents": {name: exponent(xs[-2:], ys[-2:]) for name, ys in columns.items()},
        "faster": None if time is None or arithmetic is None else time > arithmetic + TOLERANCE,
    }


def _measure(point: Point, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    shape: dict[str, Any] = {"batch": point.batch, "seq_len": point.seq_len}
    known = {**shape, "total_parameters": count(point.config).total_parameters, "flops": point.flops}
    try:
        (taken,) = race({f"{point.axis} {point.value}": ours(point.config, **shape, dtype=dtype)}, steps)
    except (UsageError, RunError) as error:  # the largest points may be too large for the machine; the others count
        return {**known, "reason": str(error)}
    return {
        **known,
        **result(point.config, **shape, taken=taken),
        "memory_bytes": taken.memory.peak - taken.memory.before,
    }
