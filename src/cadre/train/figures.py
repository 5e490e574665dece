"""Pictures of a run's metrics, as matplotlib figures and as SVG that reads on light and dark pages alike.

Shapes: T time columns, L sparse layers, E experts.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cadre.errors import UsageError
from cadre.train.loads import load_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Floats = NDArray[np.float64]

MAP_COLUMNS = 200
CURVE_POINTS = 1000
NAMED_LAYERS = 8

# Mid-tones, legible on white and on near-black; on the report's page INK becomes the theme's own text colour.
INK, BLUE, ORANGE, GREEN, ROSE = "#7f8084", "#3b82d6", "#e0782f", "#2a9d7f", "#c9548a"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cadre",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
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
    "axes.xmargin": 0.01,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class LoadHistory:
    """Expert load over training, averaged in time columns: `ratio` [T, L, E] is load / mean load, 1 is balance."""

    first_step: int
    last_step: int
    layers: list[int]
    ratio: Floats


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
    ratio_TLE = total_TLE[known_T] / counts_T[known_T, None, None]
    return LoadHistory(first, last, loads[-1].get("load_layers") or list(range(shape[0])), ratio_TLE)


def series(records: Sequence[Record], key: str) -> tuple[Floats, Floats]:
    """Steps and values of the records that have a number under `key`."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float))]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def held_out_scores(records: Sequence[Record]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Steps and bits per byte of all evaluations, and which of them were a run's last, of all held-out text."""
    final = [bool(r.get("final")) for r in records if isinstance(r.get("bits_per_byte"), (int, float))]
    return *series(records, "bits_per_byte"), np.array(final, dtype=bool)


def curve_figure(records: Sequence[Record]) -> "Figure":
    """Training loss and, beside it, held-out bits per byte over steps. Raises UsageError if there is no loss."""
    if not series(records, "loss")[0].size:
        raise UsageError("no training loss in these metrics: nothing to draw before the first logged step")
    held_out = held_out_scores(records)
    with style():
        figure = blank(880 if held_out[0].size else 440, 250)
        axes = figure.subplots(1, 2 if held_out[0].size else 1, squeeze=False)[0]
        draw_loss(axes[0], records)
        axes[0].set_title("Training loss, nats per token")
        if held_out[0].size:
            draw_held_out(axes[1], *held_out)
            axes[1].set_title("Held-out bits per byte")
            step_axis(axes[1])
    return figure


def load_figure(records: Sequence[Record]) -> "Figure":
    """Heat-maps of load / mean load, one per sparse layer: x step, y expert. Raises UsageError if there is no load."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    history = load_history(records)
    if history is None:
        raise UsageError("no expert load in these metrics: a dense model has none to draw")
    count = len(history.layers)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    with style():
        figure = blank(max(440, 220 * columns), 130 * rows + 40)
        axes_L = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, axes in enumerate(axes_L):
            axes.set_visible(index < count)
            if index < count:
                draw_load(axes, history, index)
                axes.set_title(f"Layer {history.layers[index]}: experts", fontsize=10)
        scale = ScalarMappable(Normalize(0, 2), ListedColormap(load_colours(np.linspace(0, 2, 41))))
        bar = figure.colorbar(scale, ax=list(axes_L), orientation="horizontal", shrink=0.5, aspect=60, ticks=[0, 1, 2])
        bar.ax.set_xticklabels(["no load", "mean load", "twice the mean or more"])
        bar.ax.tick_params(length=0)
        bar.outline.set_linewidth(0.4)
        for cells in bar.ax.collections:
            cells.set(edgecolor="none", linewidth=0)
    return figure


def draw_loss(axes: "Axes", records: Sequence[Record]) -> None:
    """Training loss, raw behind smoothed, and the smoothed loss of each MTP module; axis cut to what came to stay."""
    steps, loss = series(records, "loss")
    smooth = _smooth(loss, falling=True)
    axes.plot(*_thin(steps, loss), color=BLUE, alpha=0.28, linewidth=0.8)
    axes.plot(*_thin(steps, smooth), color=BLUE, label="next token")
    tops, bottoms = [smooth[_settled(loss)]], [loss.min()]
    depth = max((len(r.get("mtp_loss") or []) for r in records), default=0)
    for module in range(depth):
        rows = [{"step": r["step"], "loss": m[module]} for r in records if len(m := r.get("mtp_loss") or []) > module]
        mtp_steps, mtp_loss = series(rows, "loss")
        if mtp_steps.size:
            mtp_smooth = _smooth(mtp_loss, falling=True)
            axes.plot(*_thin(mtp_steps, mtp_smooth), color=ORANGE, alpha=0.8**module, label=f"MTP {module + 1}")
            tops.append(mtp_smooth[_settled(mtp_loss)])
            bottoms.append(mtp_smooth.min())
    if depth:
        axes.legend(loc="upper right", ncols=depth + 1)
    span = max(tops) - min(bottoms)
    if span > 0:
        axes.set_ylim(min(bottoms) - 0.05 * span, max(tops) + 0.12 * span)
    step_axis(axes)


def draw_held_out(axes: "Axes", x: Floats, bits_per_byte: Floats, final: NDArray[np.bool_]) -> None:
    """Bits per byte at each evaluation, the last one labelled. A final one, of all held-out text, is a ring beside the curve of
    those on the way, which read a sample: the two do not compare."""
    axes.plot(x[~final], bits_per_byte[~final], color=GREEN, marker="o", markersize=3 if len(x) < 60 else 0)
    axes.plot(x[final], bits_per_byte[final], color=GREEN, marker="o", markersize=5, markerfacecolor="none", linestyle="none")
    axes.annotate(
        f"{bits_per_byte[-1]:.3f}", (x[-1], bits_per_byte[-1]), (-2, 8), textcoords="offset points",
        ha="right", va="bottom", color=GREEN, fontweight="bold",
    )  # fmt: skip
    top = max(bits_per_byte[_settled(bits_per_byte)], bits_per_byte[-1])
    span = max(top - bits_per_byte.min(), 0.02)
    axes.set_ylim(bits_per_byte.min() - 0.08 * span, top + 0.15 * span)


def draw_line(axes: "Axes", x: Floats, y: Floats, colour: str, noisy: bool = True) -> None:
    """A quantity from zero up; if noisy, raw behind smoothed, with room for all but the rarest spikes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    smooth = _smooth(y) if noisy else y
    if noisy:
        axes.plot(*_thin(x, y), color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(*_thin(x, smooth), color=colour)
    top = max(1.15 * np.quantile(y, 0.99), 1.05 * smooth.max()) or 1
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if top > 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if top < 0.01:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-")))


def draw_max_vio(axes: "Axes", records: Sequence[Record]) -> None:
    """Smoothed MaxVio of each sparse layer, coloured by depth."""
    from matplotlib.colors import LinearSegmentedColormap

    rows = [(r["step"], r["max_vio"], r.get("load_layers")) for r in records if r.get("max_vio")]
    layers = rows[-1][2] or list(range(len(rows[-1][1])))
    named = np.linspace(0, len(layers) - 1, min(len(layers), NAMED_LAYERS)).round()
    depth = LinearSegmentedColormap.from_list("depth", [BLUE, ROSE, ORANGE])
    top = 0.0
    for index, layer in enumerate(layers):
        pairs = [{"step": step, "value": vio[index]} for step, vio, _ in rows if index < len(vio)]
        steps, value = series(pairs, "value")
        if steps.size:
            smooth = _smooth(value)
            top = max(top, smooth[_settled(smooth) :].max())
            colour = depth(index / max(1, len(layers) - 1))
            label = f"layer {layer}" if index in named else None
            axes.plot(*_thin(steps, smooth), color=colour, linewidth=1.2, label=label)
    axes.set_ylim(0, 1.08 * top or 1)
    axes.legend(loc="upper right", ncols=2, fontsize=9, handlelength=1.2)
    step_axis(axes)


def draw_load(axes: "Axes", history: LoadHistory, index: int) -> None:
    """One layer's heat-map: x step, y expert, transparent where the load is the mean."""
    experts = history.ratio.shape[2]
    last = max(history.last_step, history.first_step + 1)
    axes.imshow(
        load_colours(history.ratio[:, index].T), aspect="auto", interpolation="none", origin="lower",
        extent=(history.first_step, last, -0.5, experts - 0.5),
    )  # fmt: skip
    axes.spines[:].set(visible=True, linewidth=0.4)
    axes.grid(False)
    axes.set_yticks(sorted({0, experts // 2, experts - 1}))
    step_axis(axes, ticks=3)


def load_colours(ratio: ArrayLike) -> Floats:
    """Colours [..., 4] (RGBA in 0..1) of loads relative to their mean: blue starved, orange twice the mean or more.

    Balance (1) is transparent, so that one picture suits light and dark pages.
    """
    excess = np.nan_to_num(np.clip(np.asarray(ratio, dtype=float) - 1, -1, 1))
    blue, orange = (0.16, 0.47, 0.84), (0.93, 0.42, 0.13)
    colours = np.where(excess[..., None] < 0, blue, orange)
    return np.concatenate([colours, np.abs(excess)[..., None] ** 0.8], axis=-1)


def load_scale() -> list[str]:
    """The CSS colours of a legend beside such maps: no load, half the mean, the mean, half as much again, twice the mean."""
    return [f"rgb({r:.0%} {g:.0%} {b:.0%} / {a:.0%})" for r, g, b, a in load_colours([0, 0.5, 1, 1.5, 2])]


def step_axis(axes: "Axes", ticks: int = 6) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """1500 -> "1,500", 200000 -> "200k"."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e5):
            return f"{value / unit:g}{name}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def import_drawing() -> None:
    """Import what drawing takes: who predicts this process's memory wants it there."""
    import matplotlib.backends.backend_svg
    import matplotlib.cm
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.ticker  # noqa: F401


def blank(width: float, height: float) -> "Figure":
    """An empty figure whose SVG measures width x height."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def svg(figure: "Figure") -> str:
    """The figure as an SVG document with real text in the reader's system font, the same bytes for the same data."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with style():
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif")


def inline_svg(figure: "Figure", name: str, label: str) -> str:
    """The figure as an <svg> element for a page: as wide as its column, in `var(--ink)`, its ids prefixed by `name`.

    Safe HTML: the label is escaped, the figures hold no foreign text.
    """
    from markupsafe import Markup, escape

    head, body = svg(figure).split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", body).replace(INK, "var(--ink)")
    return Markup(f'{head} role="img" aria-label="{escape(label)}">{body}')


def _settled(values: Floats) -> int:
    """Where an axis may start looking: after the first 2 % of a long run, whose fall would flatten all the rest."""
    return len(values) // 50


def _smooth(values: Floats, falling: bool = False) -> Floats:
    """Moving average over 1/30 of the run; of falling values less at first, where they change too fast for that."""
    index = np.arange(len(values))
    half = np.minimum(len(values) // 60, index // 4 if falling else len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high] - sums[low]) / (high - low)


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most about 1,000 points: each stretch keeps its lowest and its highest, so that no spike is lost."""
    if len(x) <= CURVE_POINTS:
        return x, y
    edges = np.linspace(0, len(x), CURVE_POINTS // 2 + 1).astype(int)
    stretches = [(a, y[a:b]) for a, b in pairwise(edges)]
    keep = np.unique([a + pick(part) for a, part in stretches for pick in (np.argmin, np.argmax)])
    return x[keep], y[keep]
