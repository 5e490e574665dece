"""The results of `cadre bench train` as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cadre.units import size


def lines(result: dict[str, Any]) -> list[str]:
    """By the result's `mode`."""
    show = {"train": _train, "peer": _peer, "tax": _tax, "sweep": _sweep, "fp8": _fp8, "profile": _profile}[result["mode"]]
    return list(show(result))


def _train(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['tokens_per_second']:,.0f} tokens/s, {result['step_seconds_median']:.3f} s a step ({result['dtype']})"
    yield (f"{result['model_flops_per_second'] / 1e9:,.1f} GFLOP/s of {result['gemm_flops_per_second'] / 1e9:,.1f} in a "
           f"large GEMM: MFU {result['mfu']:.1%}")  # fmt: skip
    yield f"peak memory {size(result['peak_memory_bytes'])}"


def _peer(result: dict[str, Any]) -> Iterator[str]:
    peer, ours = result["peer"], result["ours"]
    best = ", ".join(value for value in peer["mode"].values() if value)
    rows = [("", "s a step", "tokens/s", "MFU", "peak memory", "mode")]
    for name, side, mode in ((f"{peer['name']} {peer['version']}", peer, best), ("cadre", ours, result["dtype"])):
        rows.append((name, f"{side['step_seconds_median']:.3f}", f"{side['tokens_per_second']:,.0f}", f"{side['mfu']:.1%}",
                     size(side["peak_memory_bytes"]), mode))  # fmt: skip
    yield from _table(rows)
    yield f"cadre's step is {result['speed_ratio']:.2f} times as fast, with {result['memory_ratio']:.2f} of the peak memory"
    for probe in result["probe"]:
        if "reason" in probe:
            yield f"not run: {probe['experts'] or 'dense'}, {probe['dtype']}: {probe['reason']}"


def _tax(result: dict[str, Any]) -> Iterator[str]:
    rows = [("experts", "top", "width", "s a step", "dense twin", "ratio", "peak memory", "dense twin")]
    for row in result["rows"]:
        sparse, dense = row["sparse"], row["dense"]
        rows.append((row["experts"], row["top_k"], row["expert_width"], f"{sparse['step_seconds_median']:.3f}",
                     f"{dense['step_seconds_median']:.3f}", f"{row['ratio']:.3f}", size(sparse["peak_memory_bytes"]),
                     size(dense["peak_memory_bytes"])))  # fmt: skip
    yield from _table(rows)
    worst = max(result["rows"], key=lambda row: row["ratio"])
    yield f"routing tax: at most {worst['ratio']:.3f} ({worst['experts']} experts, top {worst['top_k']}), {result['dtype']}"


def _fp8(result: dict[str, Any]) -> Iterator[str]:
    rows = [("experts", "s a step", "tokens/s", "peak memory")]
    for name, side in ((result["dtype"], result["plain"]), ("fp8", result["fp8"])):
        rows.append((name, f"{side['step_seconds_median']:.3f}", f"{side['tokens_per_second']:,.0f}",
                     size(side["peak_memory_bytes"])))  # fmt: skip
    yield from _table(rows)
    yield f"a step with experts in FP8 is {result['speed_ratio']:.2f} times as fast"


def _sweep(result: dict[str, Any]) -> Iterator[str]:
    for axis, found in result["axes"].items():
        rows = [(axis, "batch", "seq", "parameters", "TFLOP", "s a step", "peak memory")]
        for point in found["points"]:
            start = (f"{point['value']:,}", point["batch"], point["seq_len"], f"{point['total_parameters'] / 1e6:,.1f}M",
                     f"{point['flops'] / 1e12:.3f}")  # fmt: skip
            if "reason" in point:
                rows.append((*start, "-", "-"))
            else:
                rows.append((*start, f"{point['step_seconds_median']:.3f}", size(point["peak_memory_bytes"])))
        yield from _table(rows)
        for point in found["points"]:
            if "reason" in point:
                yield f"{point['value']:,} did not run: {point['reason']}"
        yield from _growth(axis, found)
        yield ""


def _growth(axis: str, found: dict[str, Any]) -> Iterator[str]:
    if found["faster"] is None:
        yield "too few points for an exponent"
        return
    for name, powers in (("all points", found["exponents"]), ("last two", found["last_exponents"])):
        yield (f"{name}: time ~ {axis}^{powers['seconds']:.2f}, arithmetic ^{powers['flops']:.2f}; memory "
               f"^{powers['memory']:.2f}, parameters ^{powers['parameters']:.2f}")  # fmt: skip
    yield "time grows faster than the arithmetic" if found["faster"] else "time grows no faster than the arithmetic"


def _profile(result: dict[str, Any]) -> Iterator[str]:
    rows = [("part", "ms", "share", "achieved", "limit", "of it")]
    for part in result["parts"]:
        start = (part["part"], f"{part['seconds'] * 1e3:,.1f}", f"{part['share']:.1%}")
        if "unit" not in part:
            rows.append((*start, "", "", ""))
            continue
        unit = "GFLOP/s" if part["unit"] == "flops" else "GB/s"
        achieved, limit = part["achieved_per_second"] / 1e9, part["limit_per_second"] / 1e9
        rows.append((*start, f"{achieved:,.1f} {unit}", f"{limit:,.1f} {unit}", f"{part['of_limit']:.0%}"))
    yield from _table(rows)
    yield (f"{result['watched_seconds']:.3f} s in all; unwatched steps take {result['step_seconds_median']:.3f} s "
           f"({result['difference']:+.1%}), MFU {result['mfu']:.1%} ({result['dtype']})")  # fmt: skip
    if result["distorted"]:
        yield "watched and unwatched steps differ by more than 5%: other work disturbs, or the steps are too short"


def _table(rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Columns side by side: the first one and words to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *rest = (cell.ljust(width) if not place else cell.rjust(width)
                        for place, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "  ".join((first, *rest)).rstrip()
