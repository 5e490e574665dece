"""The collapse alarm: says which layer's experts go unused for long, and what to change.

A layer is in trouble when, over all steps since the last logged one, or over more where these have too few tokens to tell a
dead expert from an unlucky one,

    an expert is dead               load below 1% of the mean, or
    the busiest takes too much      MaxVio of 4 or more, or
    half the experts would do       exp(entropy of the load) below half the number of experts;

the alarm sounds when it has been for 100 steps in a row, once, and again only after the layer has recovered. The start of
a run is rough (docs/balance.md): shorter trouble is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cadre.train.loads import dead_experts, effective_share, max_violation
from cadre.train.recipe import BalanceSection

MAX_VIO_AT_MOST = 4.0
EFFECTIVE_AT_LEAST = 0.5
LASTING = 100
# Choices an expert has on average before a load is judged: below that, many a healthy one has none by chance.
_ENOUGH = 10

# Root mean square of a router's logits beyond which sigmoids and softmaxes are flat: no gradient moves them any more.
_SATURATED = 10.0
# Sigmoid affinities lie between 0 and 1: biases further apart than that already decide every choice by themselves.
_BIAS_DECIDES = 1.0


@dataclass
class CollapseAlarm:
    """`section`, `router_lr_scale`: the recipe's, for the remedy. `since`: for each sparse layer the step from which it has
    been in trouble, or None. `sounding`: whether it has been said. `held_LE`, `held_steps`: loads that wait to be judged, and
    of how many steps."""

    layers: list[int]
    section: BalanceSection
    router_lr_scale: float = 1.0
    since: list[int | None] = field(default_factory=list)
    sounding: list[bool] = field(default_factory=list)
    held_LE: NDArray[Any] | None = None
    held_steps: int = 0

    def __post_init__(self) -> None:
        self.since = [None] * len(self.layers)
        self.sounding = [False] * len(self.layers)

    def check(
        self, step: int, steps: int, load_LE: ArrayLike, bias_range: list[float | None], logit_scale: list[float]
    ) -> list[dict[str, Any]]:
        """Look at the loads of the `steps` steps up to `step`. Returns the events "collapse" and "recovered", each with
        layer and message."""
        events: list[dict[str, Any]] = []
        load_LE, steps = np.asarray(load_LE) + (0 if self.held_LE is None else self.held_LE), steps + self.held_steps
        if any(0 < load_E.mean() < _ENOUGH for load_E in load_LE):
            self.held_LE, self.held_steps = load_LE, steps
            return events
        self.held_LE, self.held_steps = None, 0
        for place, (layer, load_E) in enumerate(zip(self.layers, load_LE, strict=True)):
            trouble = _trouble(load_E) if load_E.sum() else None
            if trouble is None:
                if self.sounding[place]:
                    events.append({"event": "recovered", "layer": layer, "message": f"layer {layer}: all experts in use again"})
                self.since[place], self.sounding[place] = None, False
                continue
            since = self.since[place]
            if since is None:
                since = self.since[place] = step - steps
            if step - since >= LASTING and not self.sounding[place]:
                self.sounding[place] = True
                remedy = self._remedy(bias_range[place], logit_scale[place])
                message = f"layer {layer}: {trouble} for {step - since} steps: {remedy}"
                events.append({"event": "collapse", "layer": layer, "message": message})
        return events

    def state(self) -> dict[str, Any]:
        held = None if self.held_LE is None else self.held_LE.tolist()
        return {"since": self.since, "sounding": self.sounding, "held": held, "held_steps": self.held_steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.since, self.sounding = list(state["since"]), list(state["sounding"])
        held = state.get("held")
        self.held_LE, self.held_steps = None if held is None else np.array(held), state.get("held_steps", 0)

    def _remedy(self, bias_range: float | None, logit_scale: float) -> str:
        """The one change most likely to help, as `--set` takes it."""
        section = self.section
        if logit_scale > _SATURATED:
            weight = 3 * section.z_weight or 0.001
            return f"the router's logits are {logit_scale:.0f} on average: resume with --set balance.z_weight={weight:g}"
        if bias_range is None:
            name = max(("batch_weight", "global_weight", "sequence_weight"), key=lambda name: getattr(section, name))
            weight = 3 * getattr(section, name)
            if weight < 0.01:
                name, weight = "batch_weight", 0.01
            return f"resume with --set balance.{name}={weight:g}"
        if not section.use_bias:
            return "resume with --set balance.use_bias=true --set balance.bias_update=sign"
        if section.bias_update == "none":
            return "resume with --set balance.bias_update=sign"
        if not section.bias_speed:
            return "resume with --set balance.bias_speed=0.001"
        if bias_range > _BIAS_DECIDES:
            lower = f"balance.bias_speed={section.bias_speed / 3:.1g}"
            return f"the biases ({bias_range:.1f} apart) overshoot: resume with --set {lower}"
        if self.router_lr_scale > 0.1:
            slower = f" --set optimizer.router_lr_scale={max(0.1, self.router_lr_scale / 10):g}"
        else:
            slower = ""
        faster = min(1.0, 3 * section.bias_speed)  # all that a recipe takes
        return f"the biases cannot keep up: resume with --set balance.bias_speed={faster:.1g}{slower}"


def _trouble(load_E: ArrayLike) -> str | None:
    """What is wrong with a load, in words; None if nothing is."""
    experts = np.shape(load_E)[-1]
    dead, vio, share = int(dead_experts(load_E)), float(max_violation(load_E)), float(effective_share(load_E))
    if dead:
        return f"{dead} of {experts} experts dead (MaxVio {vio:.1f})"
    if vio >= MAX_VIO_AT_MOST:
        return f"MaxVio {vio:.1f}"
    if share < EFFECTIVE_AT_LEAST:
        return f"as if {share * experts:.1f} of {experts} experts were used (MaxVio {vio:.1f})"
    return None
