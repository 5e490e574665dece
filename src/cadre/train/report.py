"""`report.html`: a run on one self-contained page, and its two pictures on their own.

    python -m cadre.train.report RUN --pictures DIR      writes DIR/training-curve.svg and DIR/expert-load.svg

Shapes: T time columns, L sparse layers, E experts.
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cadre.errors import RunError, UsageError
from cadre.train.metrics import load_colours, load_ratio, read_metrics, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Floats = NDArray[np.float64]

MAP_COLUMNS = 200
CURVE_POINTS = 1000
EVENTS_SHOWN = 30
NAMED_LAYERS = 8

# Mid-tones, legible on white and on near-black; on the page INK becomes the theme's own text colour.
INK, BLUE, ORANGE, GREEN = "#7f8084", "#3b82d6", "#e0782f", "#2a9d7f"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cadre",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class LoadHistory:
    """Expert load over training, averaged in time columns: `ratio_TLE` is load / mean load, 1 is balance."""

    first_step: int
    last_step: int
    layers: list[int]
    ratio_TLE: Floats


def write_report(run_dir: Path, summary: dict[str, Any]) -> Path:
    """Writes `run_dir/report.html` atomically from the run's metrics and `summary`; returns its path.

    `summary` needs "name"; its optional parts are command, config, counts, data, machine, result, samples, model_dir,
    load_line and cost. Whatever is missing, in it or in the metrics, leaves its section out. The page makes no outside
    request. Raises RunError if the disk refuses, UsageError if the metrics are damaged.
    """
    import jinja2

    records = read_metrics(run_dir)
    with _style():
        figures = _figures(records)
        history = load_history(records)
        load = _load_section(history, records) if history else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    events = _events(records)
    page = environment.get_template("report.html.j2").render(
        name=summary["name"],
        command=summary.get("command"),
        stopped=(summary.get("result") or {}).get("stopped"),
        cards=_cards(summary, records),
        figures=figures,
        load=load,
        tables=_tables(summary),
        samples=_samples(summary.get("samples") or []),
        events=events[-EVENTS_SHOWN:],
        events_left_out=max(0, len(events) - EVENTS_SHOWN),
        model_dir=summary.get("model_dir"),
        load_line=summary.get("load_line"),
    )
    path = run_dir / "report.html"
    try:
        # Lone surrogates in hostile text have no UTF-8; a question mark stands in.
        replace_file(path, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def curve_figure(records: Sequence[Record]) -> "Figure":
    """Training loss and, beside it, held-out bits per byte over steps. Raises UsageError if there is no loss."""
    if not _series(records, "loss")[0].size:
        raise UsageError("these metrics hold no training loss to draw; train for at least one logged step")
    with _style():
        evaluated = _series(records, "bits_per_byte")[0].size > 1
        figure = _blank(880 if evaluated else 440, 250)
        axes = figure.subplots(1, 2 if evaluated else 1, squeeze=False)[0]
        _draw_loss(axes[0], records)
        axes[0].set_title("training loss, nats per token")
        if evaluated:
            _draw_held_out(axes[1], *_series(records, "bits_per_byte"))
            axes[1].set_title("held-out bits per byte")
    return figure


def load_figure(records: Sequence[Record]) -> "Figure":
    """Heat-maps of load / mean load, one per sparse layer: x step, y expert. Raises UsageError if there is no load."""
    history = load_history(records)
    if history is None:
        raise UsageError("these metrics hold no expert load to draw; a dense model has none")
    with _style():
        columns = min(4, len(history.layers))
        rows = math.ceil(len(history.layers) / columns)
        figure = _blank(max(440, 215 * columns), 130 * rows + 46)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for index, ax in enumerate(axes):
            ax.set_visible(index < len(history.layers))
            if ax.get_visible():
                _draw_load(ax, history, index)
                ax.set_title(f"layer {history.layers[index]}: expert by step", fontsize=10)
        key = figure.add_subfigure if False else None
        del key
    return figure


def load_history(records: Sequence[Record]) -> LoadHistory | None:
    """The loads of all training records in at most 200 time columns; None if there are none."""
    loads = [r for r in records if r.get("load")]
    if not loads:
        return None
    shape = np.shape(loads[-1]["load"])
    loads = [r for r in loads if np.shape(r["load"]) == shape]
    first, last = loads[0]["step"], loads[-1]["step"]
    columns = min(MAP_COLUMNS, len(loads))
    total_TLE = np.zeros((columns, *shape))
    counts_T = np.zeros(columns, dtype=int)
    for record in loads:
        column = min(columns - 1, (record["step"] - first) * columns // max(1, last - first))
        total_TLE[column] += load_ratio(record["load"])
        counts_T[column] += 1
    # Unevenly logged steps leave columns empty: the last known load stands there.
    known_T = np.maximum.accumulate(np.where(counts_T > 0, np.arange(columns), 0))
    ratio_TLE = (total_TLE[known_T].T / counts_T[known_T]).T
    layers = loads[-1].get("load_layers") or list(range(shape[0]))
    return LoadHistory(first, last, layers, ratio_TLE)
