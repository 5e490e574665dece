"""The page of `cadre routes`: self-contained HTML, readable on a phone, in light and dark.

Letters in names: E expert (rows of a picture), X what its columns are.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from cadre.train.figures import load_colours, load_scale

# A picture's letters are this wide and a column of it at least this wide, in units of its viewBox.
_LETTER, _LEAST = 5.4, 9.0
_WIDTH, _NAMED = 300.0, 16
_LONGEST_NAME = 22
# Paths between layers are told apart up to this lift, and down to its inverse.
_PATH_SCALE = 8

Study = dict[str, Any]


def render(study: Study) -> str:
    """The page for what `cadre.study.routes.study` found, with the keys the command adds: "model", "data", "top_k",
    "shared_experts", "parameters", "documents", "complete"."""
    from cadre.html import page_environment

    environment = page_environment("cadre.study")
    environment.filters["shown"] = shown
    environment.filters["marked"] = marked
    groups, layers = study["groups"], study["layers"]
    experts = len(layers[0]["experts"])
    loads = np.array([layer["load"] for layer in layers])
    names, numbers = [group["name"] for group in groups], [str(expert) for expert in range(experts)]
    return environment.get_template("routes.html.j2").render(
        study=study,
        experts=experts,
        most=max(1.0, experts / study["top_k"]),
        load=picture(
            loads * experts, [str(layer["layer"]) for layer in layers], numbers,
            "Load of each expert by layer, relative to the mean", rows="layer", columns="expert", height=14.0,
        ),
        by_group=[
            picture(
                np.array([expert["groups"] for expert in layer["experts"]]), numbers, names,
                f"Layer {layer['layer']}: lift of each group of documents for each expert", rows="expert",
            )
            for layer in layers
        ] if len(names) > 1 else [],
        between=[
            (layer, picture(
                1 + np.log(np.maximum(layer["coactivation"], 1e-9)) / np.log(_PATH_SCALE), numbers, numbers,
                f"From the experts of layer {layer['layer']} to those of layer {layer['next_layer']}",
                rows=f"layer {layer['layer']}", columns=f"layer {layer['next_layer']}", square=True,
            ), strongest(layer["coactivation"]))
            for layer in layers if layer["coactivation"]
        ],
        spark=lambda expert: sparkline(expert["groups"], names),
        path_scale=_PATH_SCALE,
        scale=load_scale(),
    )  # fmt: skip


def shown(text: str) -> Markup:
    """A token as a chip shows it: its first space left out, where it lacks one a faint mark that it continues a word, line
    ends and the like as signs."""
    joined = bool(text) and text[0].isalnum()
    body = text.removeprefix(" ") if text.strip() else text.replace(" ", "\u2423")
    body = body.replace("\n", "\u21b5").replace("\r", "\u240d").replace("\t", "\u21e5")
    mark = Markup('<i class="joined">\u2011</i>') if joined else Markup("")
    return mark + (escape(body) if body else Markup('<i class="joined">empty</i>'))


def marked(context: dict[str, Any]) -> Markup:
    """A context with its token marked: white space before it is not, white space alone is shown as a sign."""
    token = context["token"]
    own = token.strip(" ") if token.strip() else token
    space = token[: len(token) - len(token.lstrip(" "))] if token.strip() else ""
    sign = own.replace("\n", "\u21b5").replace("\t", "\u21e5") if own.strip() else shown(own)
    return escape(context["before"] + space) + Markup("<mark>") + escape(sign) + Markup("</mark>") + escape(context["after"])


def strongest(lift_EF: list[list[float]], count: int = 5) -> list[tuple[int, int, float]]:
    """The pairs of experts that follow each other most above chance: from, to, lift."""
    lift = np.array(lift_EF)
    best = np.argsort(-lift, axis=None, kind="stable")[:count]
    return [(int(i) // lift.shape[1], int(i) % lift.shape[1], float(lift.flat[i])) for i in best if lift.flat[i] > 1]


def sparkline(lift_X: list[float], names: list[str]) -> Markup:
    """Bars up from the line of chance where lift is above 1, down from it where below; full at 1.5 and 0.5."""
    bars = []
    for place, lift in enumerate(lift_X):
        size = 13 * min(1.0, 2 * abs(lift - 1))
        top, side = (14 - size, "up") if lift > 1 else (14.0, "down")
        bars.append(f'<rect class="{side}" x="{place * 10 + 1}" y="{top:.1f}" width="8" height="{max(size, 0.4):.1f}"/>')
    best = int(np.argmax(lift_X))
    label = f"most often in {names[best]}: {lift_X[best]:.1f} times as often as chance"
    width = 10 * len(lift_X)
    return Markup(
        f'<svg class="spark" viewBox="0 0 {width} 28" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<title>{escape(label)}</title><path d="M0 14H{width}"/>{"".join(bars)}</svg>'
    )


def picture(
    ratio_EX: np.ndarray, row_names: list[str], column_names: list[str], label: str, *, rows: str, columns: str = "",
    height: float = 11.0, square: bool = False,
) -> Markup:  # fmt: skip
    """A matrix of lifts (1 is blank, blue below, orange above up to 2) as an SVG around one pixel per cell, with its rows
    and columns named as far as there is room."""
    e, x = ratio_EX.shape
    names = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "\u2026" for name in column_names]
    left = 14 + _LETTER * max(len(name) for name in row_names) + 4
    width = _WIDTH - left
    cell = width / x
    tall = width if square else min(max(e * height, 40.0), 420.0)
    slanted = max(len(name) for name in names) * _LETTER > cell and not names[-1].isdigit()
    bottom = 8 + (0.8 * _LETTER * max(len(name) for name in names) if slanted else 10) + (12 if columns else 0)
    texts = []
    for place in range(0, e, -(-e // min(e, max(_NAMED, int(tall / _LEAST))))):
        y = (place + 0.5) * tall / e + 3
        texts.append(f'<text x="{left - 4:.1f}" y="{y:.1f}" text-anchor="end">{escape(row_names[place])}</text>')
    wide = 1.5 * _LEAST if slanted else max(_LEAST, _LETTER * max(len(name) for name in names) + 2)
    for place in range(0, x, -(-x // max(1, min(x, int(width / wide))))):
        at, below = left + (place + 0.5) * cell, tall + 11
        turn = f' transform="rotate(-50 {at + 2:.1f} {below:.1f})" text-anchor="end"' if slanted else ' text-anchor="middle"'
        texts.append(f'<text x="{at + (2 if slanted else 0):.1f}" y="{below:.1f}"{turn}>{escape(names[place])}</text>')
    middle = tall / 2
    texts.append(f'<text class="axis" x="9" y="{middle:.1f}" transform="rotate(-90 9 {middle:.1f})" text-anchor="middle">'
                 f"{escape(rows)}</text>")  # fmt: skip
    if columns:
        texts.append(f'<text class="axis" x="{left + width / 2:.1f}" y="{tall + bottom - 2:.1f}" text-anchor="middle">'
                     f"{escape(columns)}</text>")  # fmt: skip
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH + 2:g} {tall + bottom + 2:.1f}" role="img" aria-label="{escape(label)}">'
        f'<image x="{left:.1f}" y="0.5" width="{width:.1f}" height="{tall:.1f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{_png(ratio_EX)}"/>'
        f'<rect class="frame" x="{left:.1f}" y="0.5" width="{width:.1f}" height="{tall:.1f}"/>{"".join(texts)}</svg>'
    )


def _png(ratio_EX: np.ndarray) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, load_colours(ratio_EX), format="png")
    return base64.b64encode(buffer.getvalue()).decode()
