"""What a study runs: which run of which arm, over how many steps, in which order, and how long all of it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cadre.errors import UsageError
from cadre.study.match import Matched
from cadre.study.spec import Budget, Study
from cadre.train.recipe import Recipe

# Below this a run says nothing, and measuring its step took as long as the run would.
LEAST_STEPS = 20
# Starting a process, opening the text, building the model, saving it: seconds a run takes beside its steps.
START_SECONDS = 12.0
# What follows the runs: timing an arm's steps and its decoding, seconds an arm.
AFTER_SECONDS = 20.0
# An evaluation only runs forward, a third of a step's arithmetic, in small batches.
_FORWARD = 0.4


@dataclass(frozen=True)
class Job:
    """One training run. `factor` multiplies the arm's learning rates; None for the best one of the sweep. `kind`: "sweep"
    runs end with the short evaluation, "run" with one of all held-out text too."""

    kind: str
    arm: str
    seed: int
    steps: int
    factor: float | None

    @property
    def folder(self) -> str:
        """Where in the study's directory it is."""
        return f"sweep/{self.arm}-x{self.factor:g}" if self.kind == "sweep" else f"runs/{self.arm}-seed{self.seed}"


def plan_jobs(
    study: Study, arms: list[Matched], step_seconds: dict[str, float], rent: float, amount: float | None = None
) -> list[Job]:
    """The runs, in order: sweeps by arm, then seed by seed every arm. `step_seconds` by arm is what a step takes here;
    `amount` replaces the budget's, in its unit. Raises `UsageError` for a budget of too few steps."""
    steps = {arm.name: steps_of(study, arm, step_seconds[arm.name], rent, amount) for arm in arms}
    sweeping = len(study.sweep.factors) > 1
    for arm in arms:
        part = study.sweep.share if sweeping else 1.0
        if round(steps[arm.name] * part) < LEAST_STEPS:
            shortest = paid_for(study, arm, step_seconds[arm.name], rent, amount) * part
            what = f"a sweep over {study.sweep.share:.0%} of it" if sweeping else "it"
            raise UsageError(
                f"study {study.name}: the budget of {_said(study.budget, amount)} is too small: {what} is {shortest:.3g} steps "
                f"of arm {arm.name}, fewer than the {LEAST_STEPS} that calibrating takes; give at least "
                f"{max(2, math.ceil(LEAST_STEPS / shortest)):,} times as much"
            )
    jobs = [
        Job("sweep", arm.name, study.seeds[0], round(steps[arm.name] * study.sweep.share), factor)
        for arm in arms for factor in study.sweep.factors if sweeping
    ]  # fmt: skip
    fixed = None if sweeping else study.sweep.factors[0]
    return jobs + [Job("run", arm.name, seed, steps[arm.name], fixed) for seed in study.seeds for arm in arms]


def steps_of(study: Study, arm: Matched, step_seconds: float, rent: float, amount: float | None = None) -> int:
    """Steps of the arm that its share of the budget pays for."""
    return int(paid_for(study, arm, step_seconds, rent, amount) + 1e-9)


def paid_for(study: Study, arm: Matched, step_seconds: float, rent: float, amount: float | None = None) -> float:
    """The same, the fraction of one step more included."""
    budget = (study.budget.amount if amount is None else amount) * study.arms[arm.name].share
    return budget / _cost_of_step(study.budget, arm, step_seconds, rent)


def _cost_of_step(budget: Budget, arm: Matched, step_seconds: float, rent: float) -> float:
    tokens = arm.recipe.train.batch * arm.recipe.data.seq_len
    return {
        "flops": arm.flops_per_token * tokens,
        "tokens": float(tokens),
        "seconds": step_seconds,
        "usd": step_seconds / 3600 * rent,
    }[budget.unit]


def amount_for(
    study: Study, arms: list[Matched], step_seconds: dict[str, float], rent: float, seconds: float, held_out_tokens: int
) -> float:
    """The budget, in its unit, with which the whole study takes `seconds`. Raises `UsageError` if no budget does."""
    sweeping = len(study.sweep.factors) > 1
    runs_per_arm = len(study.seeds) + (len(study.sweep.factors) * study.sweep.share if sweeping else 0)
    number = len(arms) * (len(study.seeds) + (len(study.sweep.factors) if sweeping else 0))
    fixed = slope = 0.0
    for arm in arms:
        fixed += evaluating(study, arm, step_seconds[arm.name], held_out_tokens)
        cost = _cost_of_step(study.budget, arm, step_seconds[arm.name], rent)
        slope += runs_per_arm * step_seconds[arm.name] * study.arms[arm.name].share / cost
    fixed += number * START_SECONDS + len(arms) * AFTER_SECONDS
    least = max(_cost_of_step(study.budget, arm, step_seconds[arm.name], rent) / study.arms[arm.name].share for arm in arms)
    least *= LEAST_STEPS / (study.sweep.share if sweeping else 1) + 1
    needed = fixed + slope * least
    if seconds < needed:
        raise UsageError(
            f"study {study.name}: {seconds / 60:g} minutes are too few: its {number} runs need at least "
            f"{math.ceil(needed / 60)} minutes on this machine"
        )
    return (seconds - fixed) / slope


def evaluating(study: Study, arm: Matched, step_seconds: float, held_out_tokens: int) -> float:
    """Seconds that all evaluations of all runs of an arm take: one short one at the end of a sweep's, short ones along the way
    of full runs, and all held-out text at their end, read twice (its context slides by half)."""
    short = min(arm.recipe.eval.tokens, held_out_tokens)
    tokens = len(study.seeds) * ((study.evaluations + 1) * short + 2 * held_out_tokens)
    if len(study.sweep.factors) > 1:
        tokens += len(study.sweep.factors) * short
    return tokens / (arm.recipe.train.batch * arm.recipe.data.seq_len) * step_seconds * _FORWARD


def seconds_of(job: Job, step_seconds: float, evaluation_seconds: float) -> float:
    """What a run is expected to take. `evaluation_seconds`: of this run."""
    return START_SECONDS + job.steps * step_seconds + evaluation_seconds


def recipe_of(job: Job, recipe: Recipe, factor: float, evaluations: int, dtype: str) -> Recipe:
    """The recipe of a job: the arm's, over the job's steps and with its seed and rates. The schedule keeps its shape; a short
    run's warm-up is at most a tenth of it. Nobody reads a run's best model: keeping it would cost an evaluation more."""
    steps = job.steps
    rates = {"lr": recipe.optimizer.lr * factor}
    if recipe.optimizer.adamw_lr is not None:
        rates["adamw_lr"] = recipe.optimizer.adamw_lr * factor
    warmup = min(recipe.schedule.warmup_steps, max(1, steps // 10))
    train = {
        "steps": steps,
        "minutes": None,
        "seed": job.seed,
        "dtype": dtype,
        "log_every": max(1, steps // 100),
        "wandb": None,
    }
    # Of a sweep only the end counts.
    every = steps if job.kind == "sweep" else max(1, math.ceil(steps / evaluations))
    return recipe.model_copy(update={
        "name": f"{job.arm}-seed{job.seed}" if job.kind == "run" else f"{job.arm}-x{factor:g}",
        "train": recipe.train.model_copy(update=train),
        "optimizer": recipe.optimizer.model_copy(update=rates),
        "schedule": recipe.schedule.model_copy(update={"warmup_steps": warmup}),
        "eval": recipe.eval.model_copy(update={"every": every, "prompts": []}),
        "checkpoint": recipe.checkpoint.model_copy(update={"every": max(50, steps // 10), "keep": 1, "best": False}),
    })  # fmt: skip


def _said(budget: Budget, amount: float | None) -> str:
    return f"{budget.amount if amount is None else amount:.3g} {budget.unit}"
