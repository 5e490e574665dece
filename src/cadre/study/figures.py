"""Pictures of a study: held-out loss against FLOPs and against seconds, and decode rates."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from cadre.train import figures
from cadre.units import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the arms in order. Mid-tones, legible on white and on near-black, of which neighbours are easily told apart.
COLOURS = ("#3b82d6", "#e0782f", "#2a9d7f", "#c9548a", "#8a6fd1", "#b39222", "#4aa3b8", "#9a5b3c")
_WIDTH = 440
# What an arm's line or bar in the legend takes with the gaps beside it, and at most a letter of its name.
_KEY, _LETTER = 44, 5.5
AXES = {"flops": "training FLOPs", "seconds": "seconds of optimizer steps"}


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def loss_figure(results: dict[str, Any], axis: str) -> Figure | None:
    """Held-out bits per byte of every run against "flops" or "seconds", on a logarithmic axis: seeds pale, a name at the
    end. None if no run has a curve."""
    if not any(arm["curves"] for arm in results["arms"].values()):
        return None
    with figures.style():
        figure = figures.blank(_WIDTH, 280)
        axes = figure.subplots()
        _draw_loss(axes, results, axis)
        _name_arms(figure, axes)
    return figure


def _draw_loss(axes: Axes, results: dict[str, Any], axis: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ends, tops = [], []
    for number, (name, arm) in enumerate(results["arms"].items()):
        for place, curve in enumerate(arm["curves"].values()):
            label = name if place == 0 else None
            axes.plot(curve[axis], curve["bits_per_byte"], color=colour(number), label=label, linewidth=1.4,
                      alpha=1.0 if len(arm["curves"]) == 1 else 0.75)  # fmt: skip
            axes.plot(curve[axis][-1:], curve["bits_per_byte"][-1:], color=colour(number), marker="o", markersize=3.5)
            ends.append(min(curve["bits_per_byte"]))
            # The steep fall of the first evaluations would flatten all that matters.
            tops.append(curve["bits_per_byte"][min(len(curve["bits_per_byte"]) - 1, len(curve["bits_per_byte"]) // 6)])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    span = max(max(tops) - min(ends), 0.02)
    axes.set_ylim(min(ends) - 0.06 * span, max(tops) + 0.06 * span)
    axes.set_xlabel(AXES[axis])


def decode_figure(results: dict[str, Any]) -> Figure | None:
    """Decode rate by context and batch, a bar an arm; None if none was measured."""
    rows = [row for row in results["decode"] if row.get("tokens_per_second")]
    if not rows:
        return None
    points = sorted({(row["context"], row["batch"]) for row in rows})
    rate = {(row["arm"], row["context"], row["batch"]): row["tokens_per_second"] for row in rows}
    wide = 0.8 / len(results["arms"])
    with figures.style():
        figure = figures.blank(_WIDTH, 240)
        axes = figure.subplots()
        for number, name in enumerate(results["arms"]):
            places = [i for i, point in enumerate(points) if (name, *point) in rate]
            axes.bar([i - 0.4 + wide * (number + 0.5) for i in places], [rate[name, *points[i]] for i in places], wide * 0.9,
                     color=colour(number), label=name)  # fmt: skip
        axes.set_xticks(range(len(points)), [f"{context:,} x {batch}" for context, batch in points])
        axes.set_xlabel("context x batch")
        axes.set_ylabel("tokens/s")
        _name_arms(figure, axes)
    return figure


def _name_arms(figure: Figure, axes: Axes) -> None:
    """The legend, above the axes, where no arm can be behind it: in one row if it fits, else in columns."""
    handles, names = axes.get_legend_handles_labels()
    wide = [_KEY + _LETTER * len(name) for name in names]
    columns = len(names) if sum(wide) <= _WIDTH else max(1, int(_WIDTH / max(wide)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, fontsize=9, columnspacing=1.5)


def png(figure: Figure) -> bytes:
    """The figure on white, for where no page can be shown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with figures.style():
        figure.set_facecolor("white")
        figure.set_dpi(2 * figure.dpi)
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
