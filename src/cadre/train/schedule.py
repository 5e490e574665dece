"""Learning rate over a run, as a factor on the peak."""

from __future__ import annotations

import math

from cadre.train.recipe import ScheduleSection


def rate(schedule: ScheduleSection, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate at step 0 <= step < total_steps: linear warm-up, then the schedule's kind."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "steps":
        share = step / total_steps
        return schedule.step_factor ** sum(share >= at for at in schedule.step_at)
    if schedule.kind == "cosine":
        done = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
        return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    start = max(total_steps * (1 - schedule.decay_share), schedule.warmup_steps)
    done = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    return 1 - (1 - schedule.final) * done
