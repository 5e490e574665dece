"""`report.html`, its pictures and `results.json`: a study on one self-contained page.

python -m cadre.study.report DIR...        page, pictures and verdict anew from each folder's results.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cadre.errors import RunError, UsageError, writing
from cadre.files import read_json_object, replace_file
from cadre.study import figures
from cadre.study.match import SAID
from cadre.study.results import results
from cadre.study.state import State, write_json
from cadre.study.verdict import best, in_some_seeds, listed, possessive, verdict
from cadre.train.figures import inline_svg
from cadre.units import compact

# Within what must stay on one line.
_TO = "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}"
PAGE, NUMBERS = "report.html", "results.json"
PICTURES = {
    "loss-flops": "Held-out bits per byte against training FLOPs",
    "loss-seconds": "Held-out bits per byte against seconds",
    "decode": "Decode rate by context and batch",
}


def write_report(state: State) -> Path:
    """Writes the study's page, PNGs and JSON from what its runs have left so far; the page's path. Raises `RunError` if the
    disk refuses."""
    return _write(state.path, results(state), PICTURES)


def renew(folder: Path) -> Path:
    """Writes page, verdict and the PNGs that are there anew from the `results.json` of a folder: what was measured stays as
    it is, what is said of it is today's. The page's path. Raises `UsageError` for a folder without, or with a damaged one."""
    found = read_json_object(folder / NUMBERS)
    try:
        return _write(folder, found, [name for name in PICTURES if (folder / f"{name}.png").exists()])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{folder / NUMBERS}: not a study's results ({type(error).__name__}: {error})") from None


def _write(folder: Path, found: dict[str, Any], kept: Iterable[str]) -> Path:
    found["verdict"] = verdict(found)
    drawn = {
        "loss-flops": figures.loss_figure(found, "flops"),
        "loss-seconds": figures.loss_figure(found, "seconds"),
        "decode": figures.decode_figure(found),
    }
    pictures = {name: figure and inline_svg(figure, name, PICTURES[name]) for name, figure in drawn.items()}
    page = render(found, pictures)
    with writing(folder):
        for name in kept:
            if (figure := drawn[name]) is not None:
                replace_file(folder / f"{name}.png", figures.png(figure))
        replace_file(folder / PAGE, page.encode())
    write_json(folder / NUMBERS, found)
    return folder / PAGE


def render(found: dict[str, Any], pictures: dict[str, Any]) -> str:
    """The page of `results` with its `verdict`."""
    from cadre.html import page_environment

    environment = page_environment("cadre.study")
    names = list(found["arms"])
    return environment.get_template("compare.html.j2").render(
        study=found,
        verdict=found["verdict"],
        pictures=pictures,
        cards=_cards(found),
        colours={name: figures.colour(number) for number, name in enumerate(names)},
        columns=["total parameters", "active", "FLOPs/token", "cache bytes/token, bfloat16", "matched"],
        shapes=[[name, *_shape(arm)] for name, arm in found["arms"].items()],
        races=[[name, *_race(arm)] for name, arm in found["arms"].items()],
        matrices=[(axis, [[_factor(found, a, b, axis) for b in names] for a in names]) for axis in ("seconds", "flops")],
        decode=_decode(found, names),
        decoded=_decoded(found),
        budget=" ".join(f"{compact(amount)} {unit}" for unit, amount in found["budget"].items()),
        held={**SAID, "seconds": "seconds of training", "price": "price of training"}[found["held"]],
    )


def _cards(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value, note: the best arm, the pace, the clock, the price."""
    name = best(found)
    if name is None:
        return []
    arm = found["arms"][name]
    cards = [("Lowest held-out loss", f"{arm['bits_per_byte_all_held_out']['mean']:.4f}", f"bits per byte, {name}")]
    pace = found["sooner"][name].get(found["first"]) if name != found["first"] else None
    if pace and pace["seconds"]:
        seconds, flops = pace["seconds"]["mean"], pace["flops"]["mean"]
        note = (f"{'less' if seconds >= 1 else 'more'} time; {max(flops, 1 / flops):.2f}x "
                f"{'fewer' if flops >= 1 else 'more'} FLOPs")  # fmt: skip
        note = ", ".join(filter(None, [note, in_some_seeds(pace)]))
        cards.append((f"To {possessive(found['first'])} loss", f"{max(seconds, 1 / seconds):.2f}x", note))
    cards.append(("A run of it", f"{arm['seconds']:,.0f} s", f"of steps; {compact(arm['tokens'])} tokens"))
    cards.append(("Price of that run", f"${arm['usd']:.2g}", f"at ${found['rent_usd_per_hour']:g} an hour"))
    return cards


def _shape(arm: dict[str, Any]) -> list[str]:
    matched = [f"{said} {pair['here'] / pair['there'] - 1:+.2%} of {pair['of']}" for said, pair in arm["held"].items()]
    matched += [f"{field} = {value}" for field, value in arm["solved"].items()]
    return [f"{arm['total_parameters']:,}", f"{arm['active_parameters']:,}", compact(arm["training_flops_per_token"]),
            f"{arm['kv_cache_bytes_per_token']:,}", "; ".join(matched) or "-"]  # fmt: skip


def _race(arm: dict[str, Any]) -> list[str]:
    memory = arm["peak_memory_bytes"]
    rate = arm["learning_rate"]
    return [
        _spread(arm["bits_per_byte"], "{:.4f}"), _spread(arm["bits_per_byte_all_held_out"], "{:.4f}"),
        "-" if rate is None else f"{rate:.3g}", f"{arm['steps']:,}", compact(arm["flops"]),
        f"{arm['step_seconds'] * 1000:,.1f}", f"{arm['seconds']:,.1f}", _spread(arm["wall_seconds"], "{:,.1f}"),
        _spread(arm["cpu_seconds"], "{:,.1f}"), "-" if memory is None else f"{memory / 2**20:,.0f}", f"{arm['usd']:.3g}",
    ]  # fmt: skip


def _factor(found: dict[str, Any], fast: str, slow: str, axis: str) -> str:
    if fast == slow:
        return "="
    pair = found["sooner"][fast][slow]
    if not pair["seeds"]:
        return "-"
    if not pair["reached"]:
        return "not reached"
    return ", ".join(filter(None, [_spread(pair[axis], "{:.2f}"), in_some_seeds(pair)]))


def _decode(found: dict[str, Any], names: list[str]) -> list[list[str]]:
    """A row per context and batch: what was measured of each arm."""
    rate = {(row["arm"], row["context"], row["batch"]): row for row in found["decode"]}
    points = sorted({(row["context"], row["batch"]) for row in found["decode"]})
    return [
        [f"{context:,}", str(batch), *(_rate(rate.get((name, context, batch), {})) for name in names)]
        for context, batch in points
    ]  # fmt: skip


def _rate(row: dict[str, Any]) -> str:
    if not row.get("tokens_per_second"):
        return "does not fit"
    over = row.get("over_first")
    range_ = f" ({over['low']:.2f}{_TO}{over['high']:.2f})" if over else ""
    return f"{row['tokens_per_second']:,.0f}{range_}"


def _decoded(found: dict[str, Any]) -> str:
    """What there is to say of how decoding was timed."""
    said = "Tokens a second over random weights, the arms in turn"
    if any(row.get("over_first") for row in found["decode"]):
        said += f"; in brackets how many times as fast as {found['first']} in the middle half of the rounds"
    twins: dict[str, list[str]] = {}
    for row in found["decode"]:
        if "same_as" in row and row["arm"] not in (others := twins.setdefault(row["same_as"], [])):
            others.append(row["arm"])
    shared = "".join(f" {listed([name, *others])} have one shape and were measured once." for name, others in twins.items())
    return f"{said}.{shared}"


def _spread(values: dict[str, float] | None, form: str) -> str:
    """Mean, and the range if there is one that shows."""
    if values is None:
        return "-"
    mean, least, most = (form.format(values[key]) for key in ("mean", "least", "most"))
    return mean if least == most else f"{mean} ({least} to {most})"


def main(folders: list[str]) -> int:
    """Exit status: 0, or that of the first folder that cannot be renewed."""
    if not folders:
        print("usage: python -m cadre.study.report DIR...", file=sys.stderr)
        return UsageError.status
    try:
        for folder in folders:
            print(renew(Path(folder)))
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
