"""Which way to spread a training run over devices: of the layouts that fit in memory, those whose steps are predicted to be
the fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

from cadre.plan.count import count
from cadre.plan.layout import Layout, Pipeline, Workload, cut, layouts
from cadre.plan.memory import GRADIENT_BYTES, RECOMPUTE, Memory, memory
from cadre.plan.step import step


@dataclass(frozen=True)
class Prediction:
    """A layout with its memory and time. `terms`: seconds of a step by cause, which add up to it. `hidden`: seconds of
    communication behind computation, which cost nothing."""

    layout: Layout
    memory: Memory
    terms: dict[str, float]
    hidden: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def search(work: Workload, devices: int, keep: int = 10) -> list[Prediction]:
    """The `keep` fastest layouts on `devices` or a few less that fit in memory, the fastest first; empty when none fits.

    Degrees divide devices, so an odd number of them may do better if some stay idle; a recipe's processes all take part. A
    pair that differs only in what costs no time is decided by memory.
    """
    room, counts = work.device.memory_bytes, _rounder(devices) if work.degrees is None else [devices]
    found: list[tuple[float, float, Pipeline, Layout, Memory]] = []
    worst = float("inf")
    for cuts, layout in chain.from_iterable(layouts(work, used) for used in counts):
        held = memory(cuts, layout)
        if held.total > room:
            continue
        seconds = sum(step(cuts, layout)[0].values())
        if seconds <= worst:
            found.append((seconds, held.total, cuts, layout, held))
            if len(found) > 4 * keep:
                found = sorted(found, key=lambda entry: entry[:2])[:keep]
                worst = found[-1][0]
    best = sorted(found, key=lambda entry: entry[:2])[:keep]
    return [predict(cuts, layout, held) for _, _, cuts, layout, held in best]


def _rounder(devices: int) -> list[int]:
    """The number itself, the multiples of some powers of two next below it, and the power of two below."""
    multiples = (devices // n * n for n in (8, 64, 256, 1024) if n <= devices)
    return sorted({devices, 1 << (devices.bit_length() - 1), *multiples})


def predict(cuts: Pipeline, layout: Layout, held: Memory | None = None) -> Prediction:
    """The prediction for one layout."""
    work = cuts.work
    terms, hidden = step(cuts, layout)
    return Prediction(layout, held or memory(cuts, layout), terms, hidden, work.batch * work.context)


def smallest(work: Workload, devices: int) -> Prediction | None:
    """The layout that needs the least memory, fitting or not; None if the batch is too small for any."""
    options = [(memory(cuts, layout), cuts, layout) for cuts, layout in layouts(work, devices)]
    if not options:
        return None
    held, cuts, layout = min(options, key=lambda option: option[0].total)
    return predict(cuts, layout, held)


def fits(work: Workload, devices: int) -> bool:
    """Whether any layout on `devices` fits in memory."""
    each = work.held_bytes + GRADIENT_BYTES + work.state_bytes
    if count(work.shape).total_parameters * each > devices * work.device.memory_bytes:
        return False  # not even spread with nothing twice
    return any(memory(cuts, layout).total <= work.device.memory_bytes for cuts, layout in layouts(work, devices))


def activations(work: Workload, layout: Layout) -> dict[str, float]:
    """Activation bytes of the fullest device if this layout recomputed otherwise: nothing, cheap parts, or whole blocks."""
    cuts = cut(work, layout.pipeline, layout.schedule)
    names = ("without_recomputation", "with_selective_recomputation", "with_recomputation")
    return {
        f"activations_{name}": memory(cuts, replace(layout, recompute=recompute)).activations
        for recompute, name in zip(RECOMPUTE, names, strict=True)
    }
