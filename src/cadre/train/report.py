"""`report.html`: a run on one self-contained page, and its two pictures on their own.

python -m cadre.train.report RUN --pictures DIR      writes DIR/training-curve.svg and DIR/expert-load.svg
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cadre.errors import RunError, UsageError, writing
from cadre.files import replace_file
from cadre.train import figures
from cadre.train.figures import Record, curve_figure, load_figure, series
from cadre.train.metrics import read_metrics, well_formed
from cadre.units import duration, short, si, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EVENTS_SHOWN = 30
# Where `cadre routes RUN` puts its page, the report's link to it, and what stands in the link's place until then.
ROUTES_PAGE = "routes.html"
ROUTES_LINK = f'<p class="lead">What they took up: <a href="{ROUTES_PAGE}">tokens, contexts and documents by expert</a>.</p>'
NO_ROUTES_YET = "<!-- cadre routes -->"
SMALL = ("mfu", "learning_rate", "grad_norm")

LAYER_COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("max_vio_window", "MaxVio", "{:.2f}".format),
    ("load_entropy", "Entropy", "{:.1%}".format),
    ("dead_experts", "Dead", str),
    ("bias_range", "Bias range", "{:.3f}".format),
    ("logit_scale", "Logit scale", "{:.2f}".format),
]

Summary = dict[str, Any]


def write_report(run_dir: Path, summary: Summary) -> Path:
    """Writes `run_dir/report.html` atomically from the run's metrics and `summary`; returns its path.

    `summary` needs "name"; its optional parts are command, config, recipe (by section), counts, data, machine, result, samples
    (each a prompt and the text that follows it), model_dir, load_line, cost and prediction (rows of `cadre.plan.here.compare`).
    Whatever is missing, there or in the metrics, or malformed in these, leaves its section out. The page makes no outside
    request. Raises RunError if the disk refuses, UsageError if the metrics are damaged.
    """
    from markupsafe import Markup

    from cadre.html import page_environment

    records = well_formed(read_metrics(run_dir))
    environment = page_environment("cadre.train")
    result = summary.get("result") or {}
    events = _events(records)
    with figures.style():
        page = environment.get_template("report.html.j2").render(
            name=summary["name"],
            command=summary.get("command"),
            stopped=result.get("stopped"),
            cards=_cards(summary, records),
            curves=_curves(records),
            layer_columns=[name for _, name, _ in LAYER_COLUMNS],
            load=_load(records),
            alarms=_alarms(records),
            routes=Markup(ROUTES_LINK if (run_dir / ROUTES_PAGE).is_file() else NO_ROUTES_YET),
            samples=summary.get("samples") or [],
            tables=_tables(summary),
            events=events[-EVENTS_SHOWN:],
            events_left_out=max(0, len(events) - EVENTS_SHOWN),
            model_dir=summary.get("model_dir"),
            load_line=summary.get("load_line"),
        )
    path = run_dir / "report.html"
    with writing(path):
        # A lone surrogate in hostile text has no UTF-8: a question mark stands in.
        replace_file(path, page.encode("utf-8", errors="replace"))
    return path


def link_routes(run_dir: Path) -> None:
    """Have a report that was written before the run's `routes.html` link to it. Raises RunError if the disk refuses."""
    path = run_dir / "report.html"
    with writing(path):
        page = path.read_bytes() if path.is_file() else b""
        if NO_ROUTES_YET.encode() in page:
            replace_file(path, page.replace(NO_ROUTES_YET.encode(), ROUTES_LINK.encode()))


def _cards(summary: Summary, records: Sequence[Record]) -> list[dict[str, str]]:
    """The headline numbers there are: label, value, note."""
    result, counts, data, machine = (summary.get(key) or {} for key in ("result", "counts", "data", "machine"))
    held_out = series(records, "bits_per_byte")[1]
    found = {key: _last(records, key) for key in ("seconds", "tokens_per_second", "mfu", "tokens")}
    found |= {"bits_per_byte": held_out[-1] if held_out.size else None, "steps": _last(records, "step")}
    found |= {key: value for key, value in result.items() if value is not None}
    steps = found["steps"]
    total, active = counts.get("total_parameters"), counts.get("active_parameters")
    cache, cache_mha = counts.get("kv_cache_bytes_per_token"), counts.get("kv_cache_bytes_per_token_mha")
    documents, share = data.get("held_out_documents"), result.get("read_share", 1)
    unseen = documents and f"{documents:,} unseen documents" + (f", {share:.1%} of their text" if share < 1 else "")
    cores = machine.get("cores")
    peak = machine.get("gemm_flops_per_second")
    cards = [
        ("Held-out bits per byte", found["bits_per_byte"], "{:.3f}".format, unseen),
        ("Training time", found["seconds"], duration, steps and f"{steps:,} steps, {short(found['tokens'] or 0)} tokens"),
        ("Tokens per second", found["tokens_per_second"], "{:,.0f}".format,
         cores and f"on {cores} CPU cores, {machine.get('dtype', '')}"),
        ("MFU", found["mfu"], "{:.1%}".format, peak and f"of {si(peak, 'FLOP/s')} in matrix products"),
        ("Parameters", total, short, active and total and f"{short(active)} active, {active / total:.0%}"),
        (
            "Cache per token", cache, size,
            cache and cache_mha and cache_mha != cache
            and f"MHA: {size(cache_mha)}, {cache_mha / cache:.3g} times as much",
        ),
    ]  # fmt: skip
    return [
        {"label": label, "value": show(value), "note": (note or "").rstrip(", ")}
        for label, value, show, note in cards
        if value is not None and math.isfinite(value)
    ]


def _curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The curves there is data for: title, note, small, svg."""
    (scored_at, scores, final), seconds = figures.held_out_scores(records), series(records, "seconds")
    unit, unit_seconds = _time_unit(seconds[1].max(initial=0))

    def held_out_by_step(axes: "Axes") -> None:
        figures.draw_held_out(axes, scored_at, scores, final)
        figures.step_axis(axes)

    def held_out_by_time(axes: "Axes") -> None:
        figures.draw_held_out(axes, np.interp(scored_at, *seconds) / unit_seconds, scores, final)

    def line(key: str, colour: str, scale: float = 1, noisy: bool = True) -> "Callable[[Axes], None]":
        def draw(axes: "Axes") -> None:
            steps, values = series(records, key)
            figures.draw_line(axes, steps, values * scale, colour, noisy)
            figures.step_axis(axes)

        return draw

    # Where both kinds are drawn.
    ring = "; the ring is of all held-out text, the curve of a sample of it" if final.any() and not final.all() else ""
    plots: list[tuple[str, str, str, Callable[[Axes], None]]] = [
        ("loss", "Training loss", "nats per token, by step", partial(figures.draw_loss, records=records)),
        ("bits_per_byte", "Held-out score", f"bits per byte, by step{ring}", held_out_by_step),
        ("seconds", "Held-out score over time", f"bits per byte, by {unit} of training", held_out_by_time),
        ("tokens_per_second", "Throughput", "tokens per second, by step", line("tokens_per_second", figures.BLUE)),
        ("mfu", "MFU", "% of the machine's GEMM rate, by step", line("mfu", figures.GREEN, scale=100)),
        ("learning_rate", "Learning rate", "by step", line("learning_rate", figures.ORANGE, noisy=False)),
        ("grad_norm", "Gradient norm", "before clipping, by step", line("grad_norm", figures.ROSE)),
    ]
    drawn = []
    for name, title, note, draw in plots:
        known = series(records, name)[0].size and (name != "seconds" or scored_at.size)
        if known:
            small = name in SMALL
            drawn.append({"title": title, "note": note, "small": small, "svg": _draw(name, title, draw, small)})
    return drawn


def _load(records: Sequence[Record]) -> dict[str, Any] | None:
    """Expert load: a heat-map per sparse layer, MaxVio, and the last tenth of the run in numbers. None if dense."""
    history = figures.load_history(records)
    if history is None:
        return None
    maps = []
    for index, layer in enumerate(history.layers):
        draw = partial(figures.draw_load, history=history, index=index)
        maps.append({"layer": layer, "svg": _draw(f"map{layer}", f"Expert load, layer {layer}", draw, True)})
    late = history.ratio[-max(1, len(history.ratio) // 10) :].mean(axis=0)
    vio = [v for r in records if r.get("max_vio") for v in [[x for x in r["max_vio"] if x is not None]] if v]
    vio = vio[-max(1, len(vio) // 10) :]
    return {
        "maps": maps,
        "max_vio": _draw("max_vio", "MaxVio", partial(figures.draw_max_vio, records=records), False) if vio else None,
        "layers": _layers(next(r for r in reversed(records) if r.get("load"))),
        "late_max_vio": f"{np.mean([np.mean(v) for v in vio]):.2f}" if vio else None,
        "least": f"{late.min():.2f}",
        "most": f"{late.max():.2f}",
        "experts": history.ratio.shape[2],
        "scale": figures.load_scale(),
    }


def _layers(record: Record) -> list[list[str]]:
    """The last record's balance, a row per sparse layer: number, then what `LAYER_COLUMNS` names; none if it has none."""
    if not all(record.get(key) for key in ("load_layers", *(key for key, _, _ in LAYER_COLUMNS))):
        return []
    rows = zip(record["load_layers"], *(record[key] for key, _, _ in LAYER_COLUMNS), strict=True)
    shows = [show for _, _, show in LAYER_COLUMNS]
    return [
        [str(layer), *("none" if v is None else show(v) for show, v in zip(shows, values, strict=True))]
        for layer, *values in rows
    ]


def _draw(name: str, title: str, draw: "Callable[[Axes], None]", small: bool) -> str:
    # Drawn about as wide as a phone's column, so that the text stays readable there.
    figure = figures.blank(290, 130) if small else figures.blank(400, 214)
    draw(figure.subplots())
    return figures.inline_svg(figure, name, title)


def _tables(summary: Summary) -> list[dict[str, Any]]:
    """Key-value tables: title, rows. Unknown values and empty tables are left out."""
    counts, result, data, machine, cost = (summary.get(key) or {} for key in ("counts", "result", "data", "machine", "cost"))
    shows: dict[str, tuple[str, Callable[[Any], str]]] = {
        "seconds_per_step": ("Seconds a step", "{:.4g} s".format), "peak_memory_bytes": ("Peak memory", size),
    }  # fmt: skip
    tables: dict[str, list[tuple[str, Any, Callable[[Any], str]]]] = {
        "Counts and cost": [
            ("Total parameters", counts.get("total_parameters"), "{:,}".format),
            ("Active parameters", counts.get("active_parameters"), "{:,}".format),
            ("… without input embedding", counts.get("active_parameters_without_input_embedding"), "{:,}".format),
            ("… without embeddings", counts.get("active_parameters_without_embeddings"), "{:,}".format),
            ("Training FLOPs per token", counts.get("training_flops_per_token"), partial(si, unit="FLOP")),
            ("KV cache per token", counts.get("kv_cache_bytes_per_token"), size),
            ("KV cache per token, MHA", counts.get("kv_cache_bytes_per_token_mha"), size),
            ("Training FLOPs", result.get("total_flops"), partial(si, unit="FLOP")),
            ("Tokens trained on", result.get("tokens"), "{:,}".format),
            ("Final training loss", result.get("loss"), "{:.4f} nats/token".format),
            ("Peak memory", result.get("peak_memory_bytes"), size),
            ("Device hours", cost.get("device_hours"), "{:,.3g}".format),
            ("Note", cost.get("note"), str),
        ],
        "Prediction and fact": [
            (shows[row["name"]][0], row, partial(_predicted, show=shows[row["name"]][1]))
            for row in summary.get("prediction") or []
        ],
        "Data": [
            ("Source", data.get("source"), str),
            ("Documents", data.get("documents"), "{:,}".format),
            ("… held out", data.get("held_out_documents"), "{:,}".format),
            ("Tokens", data.get("tokens"), "{:,}".format),
            ("Text", data.get("bytes"), size),
            ("Bytes per token", data.get("bytes_per_token"), "{:.2f}".format),
            ("Vocabulary", data.get("vocab_size"), "{:,}".format),
        ],
        "Machine": [
            ("CPU", machine.get("cpu"), str),
            ("Cores", machine.get("cores"), str),
            ("Threads", machine.get("threads"), str),
            ("Memory", machine.get("memory_bytes"), size),
            ("Compute dtype", machine.get("dtype"), str),
            ("GEMM rate", machine.get("gemm_flops_per_second"), partial(si, unit="FLOP/s")),
            ("PyTorch", machine.get("torch"), str),
        ],
        "Recipe": [
            (f"{section}.{key}", value, _plain)
            for section, values in (summary.get("recipe") or {}).items()
            for key, value in values.items()
        ],
        "Config": [(key, value, _plain) for key, value in (summary.get("config") or {}).items()],
    }
    shown = {
        title: [(label, show(value)) for label, value, show in rows if value is not None] for title, rows in tables.items()
    }
    return [{"title": title, "rows": rows} for title, rows in shown.items() if rows]


def _predicted(row: dict[str, Any], show: Callable[[Any], str]) -> str:
    return f"{show(row['predicted'])} predicted, {show(row['measured'])} measured ({row['off']:+.0%})"


def _events(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """What happened besides training, in order: step, event, message."""
    return [(f"{r['step']:,}", r["event"], r.get("message") or "") for r in records if r.get("event")]


def _alarms(records: Sequence[Record]) -> list[str]:
    """What the collapse alarm last said of each layer that has not recovered since."""
    sounding = {}
    for record in records:
        if record.get("event") in ("collapse", "recovered"):
            sounding[record.get("layer")] = record.get("message") if record["event"] == "collapse" else None
    return [message for message in sounding.values() if message]


def _last(records: Sequence[Record], key: str) -> float | None:
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _time_unit(seconds: float) -> tuple[str, int]:
    if seconds < 300:
        return "seconds", 1
    return ("minutes", 60) if seconds < 4 * 3600 else ("hours", 3600)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a run's pictures; returns the exit status (2 for bad input, also of a place to write to; 1 for a failure)."""
    parser = argparse.ArgumentParser(prog="python -m cadre.train.report", description="Draw a run's pictures as SVG.")
    parser.add_argument("run", type=Path, help="run directory, which holds metrics.jsonl")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="where the pictures go")
    options = parser.parse_args(arguments)
    try:
        records = well_formed(read_metrics(options.run))
        if not records:
            raise UsageError(f"{options.run} holds no metrics.jsonl with records; give a run directory")
        pictures = {"training-curve.svg": curve_figure(records)}
        if any(r.get("load") for r in records):
            pictures["expert-load.svg"] = load_figure(records)
        with writing(options.pictures):
            options.pictures.mkdir(parents=True, exist_ok=True)
            for name, figure in pictures.items():
                replace_file(options.pictures / name, figures.svg(figure).encode())
                print(options.pictures / name)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
