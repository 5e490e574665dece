"""A plan as tables for people, readable at 80 columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cadre.errors import printable
from cadre.plan.memory import RESERVE
from cadre.units import compact, gigabytes

_TERMS = {
    "compute": "computing", "recompute": "computing again", "all_to_all": "all-to-all, exposed",
    "tensor": "tensor parallelism", "pipeline": "hand-over between stages", "bubble": "pipeline bubble",
    "gradients": "gradients and weights, exposed", "optimizer": "optimizer",
}  # fmt: skip
_SCHEDULES = {"none": "no pipeline", "1f1b": "1F1B", "interleaved": "interleaved 1F1B", "dualpipe": "DualPipe",
              "zbv": "ZB-V", "dualpipev": "DualPipeV"}  # fmt: skip


# Columns of what goes to a file or another program, where rich would wrap at 80: addresses and tables stay whole.
_UNWRAPPED = 1000


def show(plan: dict[str, Any], explain: bool = False, console: Console | None = None) -> None:
    """Print a plan of `cadre.plan.planner.make_plan`; with `explain`, every term of the step and the next best layouts.
    `console`: standard output unless given; a given one has its own width."""
    out = console or Console(highlight=False, markup=False, emoji=False)
    if console is None and not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _UNWRAPPED
    out.print(Text(f"{plan['model']}  ({plan['model_type']}; {plan['source']})", style="bold"))
    for note in plan["notes"]:
        out.print(f"note: {note}")
    if plan["ignored"]:
        out.print(printable(f"ignored: {', '.join(plan['ignored'])}"))
    _parameters(out, plan)
    _compute(out, plan)
    _training(out, plan, explain)
    _decoding(out, plan, explain)
    _assumptions(out, plan)


def _table(out: Console, title: str, rows: Sequence[Sequence[str]], headers: Sequence[str] = ()) -> None:
    """A table whose first column is words and the others numbers."""
    table = Table(box=None, show_header=bool(headers), pad_edge=False)
    for column in range(len(rows[0])):
        table.add_column(headers[column] if headers else "", justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*row)
    out.print()
    out.print(Text(title, style="bold"))
    out.print(table)


def _parameters(out: Console, plan: dict[str, Any]) -> None:
    total = plan["total_parameters"]
    rows = [(part.replace("_", " "), f"{n:,}", f"{n / total:.1%}") for part, n in plan["parameters"].items() if n]
    rows.append(("total", f"{total:,}", ""))
    for name, key in (
        ("active a token", "active_parameters"),
        ("active without input embedding", "active_parameters_without_input_embedding"),
        ("active without embeddings", "active_parameters_without_embeddings"),
    ):
        rows.append((name, f"{plan[key]:,}", f"{plan[key] / total:.1%}"))
    _table(out, "Parameters", rows)


def _compute(out: Console, plan: dict[str, Any]) -> None:
    context, cache = plan["context"], plan["kv_cache_bytes_per_token"]
    rows: list[tuple[str, ...]] = [
        (f"training FLOPs a token at context {context:,}", compact(plan["training_flops_per_token"], 4, " ")),
        (f"forward FLOPs a token at context {context:,}", compact(plan["forward_flops_per_token"], 4, " ")),
        (f"decoding FLOPs a token after {context:,} tokens", compact(plan["decode_flops_per_token"], 4, " ")),
        ("cache bytes a token", f"{cache:,}"),
    ]
    for name, key in (("multi-head attention", "mha"), ("8 groups", "gqa8")):
        other = plan[f"kv_cache_bytes_per_token_{key}"]
        rows.append((f"  as {name} of this width", f"{other:,} ({other / cache:.2g}x)"))
    _table(out, "Compute and cache", rows)


def _training(out: Console, plan: dict[str, Any], explain: bool) -> None:
    where = f"Training on {plan['devices']:,} x {plan['hardware']}, {plan['precision']}, {plan['batch']:,} sequences a step"
    rows: list[tuple[str, ...]] = []
    if plan["layout"]:
        rows.append(("best layout", describe(plan["layout"])))
        if plan["idle_devices"]:
            rows.append(("idle, for a better layout", f"{plan['idle_devices']:,}"))
        rows.append(("step", f"{_time(plan['step_seconds'])}"))
    if plan["tokens_per_second"] is None:
        rows.append(("tokens a second", "unknown: no layout to predict from"))
    else:
        speed = "tokens a second" if plan["fits"] else "tokens a second, if it fitted"
        rows.append((speed, f"{plan['tokens_per_second']:,.0f} (MFU {plan['mfu']:.1%})"))
    if plan["tokens"] is not None:
        rows.append(("tokens", compact(plan["tokens"], 4, " ").replace("G", "B")))
    if plan["device_hours"] is None and plan["tokens"] is not None:
        rows.append(("device-hours, price, energy", "unknown; --mfu sets a share of the peak"))
    elif plan["device_hours"] is not None:
        rows += [
            ("device-hours", f"{_round(plan['device_hours'])} ({_days(plan['days'])})"),
            ("price", f"${_round(plan['cost_usd'])}"),
            ("energy", f"{_round(plan['energy_kwh'])} kWh"),
        ]
    _table(out, where, rows)
    memory = plan["memory_per_device_bytes"]
    if memory:
        free = RESERVE * memory["capacity"]
        parts = ("weights", "gradients", "optimizer", "activations")
        rows = [(name, gigabytes(memory[name])) for name in parts]
        rows += [("buffers", gigabytes(memory["buffers"] - free)), ("kept free", gigabytes(free))]
        rows += [(name, gigabytes(memory[name])) for name in ("total", "capacity")]
        for name in ("without_recomputation", "with_selective_recomputation", "with_recomputation"):
            rows.append((f"activations {name.replace('_', ' ')}", gigabytes(memory[f"activations_{name}"])))
        _table(out, "Memory of the fullest device" if plan["fits"] else "Memory of the leanest layout: does not fit", rows)
    if explain and plan["layout"]:
        _explain(out, plan)


def _explain(out: Console, plan: dict[str, Any]) -> None:
    seconds, hidden = plan["step_seconds"], plan["step_hidden_seconds"]
    rows = [(_TERMS[name], _time(value), f"{value / seconds:.1%}") for name, value in plan["step_terms_seconds"].items()]
    rows.append(("step", _time(seconds), "100%"))
    for name, label in (("all_to_all", "all-to-all"), ("pipeline", "hand-over"), ("gradients", "gradients and weights")):
        if hidden[name]:
            rows.append((f"hidden behind computing: {label}", _time(hidden[name]), ""))
    _table(out, "Where a step's time goes", rows)
    others = [(describe(one), _time(one["step_seconds"]), gigabytes(one["memory_bytes"])) for one in plan["layouts"]]
    _table(out, "The fastest layouts that fit", others, ("layout", "step", "memory"))


def describe(layout: dict[str, Any]) -> str:
    """A layout in a few words: degrees, schedule, and what else differs from the plainest."""
    degrees = ", ".join(f"{name} {layout[name]}" for name in ("data", "expert", "pipeline", "tensor"))
    words = [degrees if layout["devices"] > 1 else "one device"]
    if layout["replicas"] > 1:
        words.append(f"replicas {layout['replicas']}")
    if layout["schedule"] != "none":
        chunks = f" x{layout['chunks']}" if layout["chunks"] > 1 else ""
        words.append(_SCHEDULES[layout["schedule"]] + chunks)
    if layout["sharded"]:
        words.append("weights sharded")
    if layout["recompute"] != "none":
        words.append(f"{layout['recompute']} recomputation")
    if layout["micro_batch"] > 1:
        words.append(f"micro-batch {layout['micro_batch']}")
    return ", ".join(words)


def _decoding(out: Console, plan: dict[str, Any], explain: bool) -> None:
    decode = plan["decode"]
    if decode is None:
        out.print(f"\nDecoding: one copy with one user at context {plan['context']:,} does not fit on these devices")
        return
    copies = f"{decode['copies']:,} x {decode['devices_per_copy']} {plan['hardware']}"
    title = f"Decoding at context {decode['context']:,}, {plan['precision']}, copies on {copies} (upper bound)"
    rows = []
    for one in decode["steps"]:
        rates = (one["tokens_per_second_per_user"], one["tokens_per_second"])
        row = [f"{one['users']:,}", f"{rates[0]:,.1f}", f"{rates[1]:,.0f}", one["bound"]]
        if explain:
            row.append(f"{one['experts']:.1f}" if one["experts"] else "-")
            row += [_time(one[name]) for name in ("memory", "compute", "links")]
        rows.append(row)
    headers = ("users a copy", "tokens/s each", "tokens/s a copy", "bound by")
    _table(out, title, rows, (*headers, "experts", "memory", "compute", "links") if explain else headers)
    if plan["parameters"]["routed_experts"] and decode["devices_per_copy"] > 1:
        shared = decode["devices_per_set_of_weights"]
        holders = "each device holds" if shared == 1 else f"every {shared} devices share"
        out.print(f"{holders} all weights but routed experts, which a copy's devices share")
    out.print(f"all copies full: {decode['users']:,} users, {decode['tokens_per_second']:,.0f} tokens/s")


def _assumptions(out: Console, plan: dict[str, Any]) -> None:
    """What was assumed, with a number for each source, and the sources below."""
    sources: list[str] = []
    rows = []
    for one in plan["assumptions"]:
        if one["source"] not in sources:
            sources.append(one["source"])
        value = one["value"] if isinstance(one["value"], str) else _number(one["value"])
        rows.append((one["name"], value, one["option"] or "", f"[{sources.index(one['source']) + 1}]"))
    _table(out, "Assumptions", rows, ("", "", "change with", "source"))
    for number, source in enumerate(sources, 1):
        out.print(f"[{number}] {source}")
    out.print(f"\nNot included: {'; '.join(plan['excluded'])}.")


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return compact(value, 4, " ")
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    if days >= 1 / 24:
        return f"{days * 24:.1f} hours"
    return f"{days * 1440:.1f} minutes" if days >= 1 / 1440 else f"{days * 86400:.1f} seconds"


def _time(seconds: float) -> str:
    if seconds >= 1 or seconds == 0:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
