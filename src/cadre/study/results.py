"""What a study found, as numbers: curves, final losses, who reaches whose loss how much sooner, memory, cache, price."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cadre.study.match import SAID, Matched
from cadre.study.state import State, read_json
from cadre.study.worker import read_curve


@dataclass(frozen=True)
class Curve:
    """Held-out bits per byte over training, of one run. `flops` and `seconds` a step make its two other axes: seconds are
    the arm's step time measured in turn with the other arms, so they hold no evaluation and no one's bad luck."""

    steps: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    flops: float
    seconds: float

    @property
    def final(self) -> float:
        return self.bits_per_byte[-1]

    def first_step_at(self, bits_per_byte: float) -> float | None:
        """The step at which the run first had this loss, linear between the evaluations over the logarithm of the step; None
        if it never did. A loss that the first evaluation has already reached counts as reached there."""
        points = list(zip(self.steps, self.bits_per_byte, strict=True))
        if points[0][1] <= bits_per_byte:
            return float(points[0][0])
        for (step, above), (later, below) in itertools.pairwise(points):
            if below <= bits_per_byte:
                part = (above - bits_per_byte) / (above - below)
                return math.exp(math.log(step) + part * (math.log(later) - math.log(step)))
        return None


def sooner(fast: Curve, slow: Curve) -> dict[str, float] | None:
    """By which factors in FLOPs and in seconds `fast` reaches the final loss of `slow` sooner than `slow` does; None if it
    never does. Factors below 1 say later. Where rates decay at the end of a run, this understates: `fast` has not decayed
    there yet."""
    step = fast.first_step_at(slow.final)
    if step is None:
        return None
    return {
        "flops": slow.steps[-1] * slow.flops / (step * fast.flops),
        "seconds": slow.steps[-1] * slow.seconds / (step * fast.seconds),
    }


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, least and most; None of nothing."""
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values)} if values else None


def curves(state: State) -> dict[str, dict[int, Curve]]:
    """Of each arm, by seed, the curves of the finished runs that did not diverge."""
    turns = read_json(state.path / "turns.json")
    clock = turns["step_seconds"] if turns else state.step_seconds
    found: dict[str, dict[int, Curve]] = {name: {} for name in state.arms}
    for job in state.jobs:
        result = state.result(job)
        if job.kind != "run" or result is None or result["diverged"]:
            continue
        points = read_curve(state.path / job.folder)
        if points:
            arm = state.arms[job.arm]
            tokens = arm.recipe.train.batch * arm.recipe.data.seq_len
            steps, values = zip(*points, strict=True)
            found[job.arm][job.seed] = Curve(steps, values, arm.flops_per_token * tokens, clock[job.arm])
    return found


def results(state: State) -> dict[str, Any]:
    """Plain values for `results.json`, the page and the verdict; of an unfinished study, what there is so far."""
    drawn, turns = curves(state), read_json(state.path / "turns.json")
    arms = {name: _arm(state, arm, drawn[name]) for name, arm in state.arms.items()}
    done = sum(state.result(job) is not None for job in state.jobs)
    return {
        "study": state.study.name, "title": state.study.title, "question": state.study.question, "quick": state.quick,
        "held": state.study.held, "budget": {state.study.budget.unit: state.amount}, "seeds": state.study.seeds,
        "first": state.study.first, "complete": turns is not None and done == len(state.jobs), "runs_done": done,
        "runs": len(state.jobs), "machine": state.machine, "dtype": state.dtype, "rent_usd_per_hour": state.rent,
        "rent_source": state.rent_source,
        "seconds_used": "steps x the arm's step time, measured in turn with the other arms "
        + ("after the runs (median of rounds); no evaluation" if turns else "before the runs (the last timing is to come)"),
        "arms": arms,
        "sooner": {a: {b: _sooner(drawn[a], drawn[b]) for b in arms if b != a} for a in arms},
        "decode": read_json(state.path / "decode.json") or [],
    }  # fmt: skip


def _arm(state: State, arm: Matched, drawn: dict[int, Curve]) -> dict[str, Any]:
    name = arm.name
    jobs = [job for job in state.jobs if job.kind == "run" and job.arm == name]
    ended = [(job, result) for job in jobs if (result := state.result(job)) is not None]
    whole = [result for _, result in ended if not result["diverged"]]
    sweep = state.sweep(name)
    factor = state.factor(jobs[0]) if not sweep or len(sweep) == len(state.study.sweep.factors) else None
    first = state.arms[state.study.arms[name].to or state.study.first]
    seconds = next(iter(drawn.values())).seconds if drawn else state.step_seconds[name]
    steps = jobs[0].steps
    acceptance = [result["acceptance"] for result in whole if result.get("acceptance")]
    drafting = [result["drafting"] for result in whole if result.get("drafting")]
    return {
        "model_type": arm.config.model_type,
        "solved": arm.solved,
        "held": {
            SAID[q]: {"here": arm.quantity(q), "there": first.quantity(q), "of": first.name}
            for q in state.study.held_by(name) if name != first.name
        },
        "total_parameters": arm.count.total_parameters,
        "active_parameters": arm.count.active_parameters,
        "active_parameters_without_embeddings": arm.count.active_parameters_without_embeddings,
        "training_flops_per_token": arm.flops_per_token,
        "kv_cache_bytes_per_token": arm.count.kv_cache_bytes_per_token,
        "learning_rate": None if factor is None else arm.recipe.optimizer.matrices_lr * factor,
        "learning_rate_factor": factor,
        "sweep": [{"factor": f, "bits_per_byte": score} for f, score in sweep.items()],
        "share_of_budget": state.study.arms[name].share,
        "steps": steps,
        "tokens": steps * arm.recipe.train.batch * arm.recipe.data.seq_len,
        "passes": steps * arm.recipe.train.batch * arm.recipe.data.seq_len / state.train_tokens,
        "flops": steps * arm.recipe.train.batch * arm.recipe.data.seq_len * arm.flops_per_token,
        "step_seconds": seconds,
        "step_seconds_before": state.step_seconds[name],
        "seconds": steps * seconds,
        "wall_seconds": spread([r["wall_seconds"] for r in whole]),
        "cpu_seconds": spread([r["cpu_seconds"] for r in whole]),
        "usd": steps * seconds / 3600 * state.rent,
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in whole), default=None),
        "bits_per_byte": spread([curve.final for curve in drawn.values()]),
        "bits_per_byte_all_held_out": spread([r["bits_per_byte"] for r in whole if r["bits_per_byte"] is not None]),
        "finals": {
            str(job.seed): r["bits_per_byte"] for job, r in ended if not r["diverged"] and r["bits_per_byte"] is not None
        },
        "acceptance": [statistics.fmean(depth) for depth in zip(*acceptance, strict=True)],
        "drafting": {key: statistics.fmean(one[key] for one in drafting) for key in ("plain", "drafted")} if drafting else None,
        "diverged": [{"seed": job.seed, "message": r["diverged"]} for job, r in ended if r["diverged"]],
        "curves": {
            str(seed): {
                "steps": list(curve.steps), "bits_per_byte": list(curve.bits_per_byte),
                "flops": [step * curve.flops for step in curve.steps],
                "seconds": [step * curve.seconds for step in curve.steps],
            }
            for seed, curve in drawn.items()
        },
    }  # fmt: skip


def _sooner(fast: dict[int, Curve], slow: dict[int, Curve]) -> dict[str, Any]:
    """Factors over the seeds that both have; `reached` of `seeds` runs got there at all."""
    pairs = [sooner(fast[seed], slow[seed]) for seed in sorted(fast.keys() & slow.keys())]
    there = [pair for pair in pairs if pair is not None]
    return {
        "seeds": len(pairs),
        "reached": len(there),
        "flops": spread([pair["flops"] for pair in there]),
        "seconds": spread([pair["seconds"] for pair in there]),
    }
