"""Fair shapes: each arm's free width is solved so that what the study holds equal is equal, by `cadre.count`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.plan.count import Count, count
from cadre.study.spec import ARM_SECTIONS, Quantity, Study
from cadre.train.recipe import Recipe, dump_toml, make_way, parse_recipe

# Widths are multiples of the first of these that comes within the tolerance: round widths compute faster.
_STEPS = (32, 16, 8, 4, 2, 1)
# Free fields that are widths: every quantity grows steadily in them, so they are found by bisection up to _WIDEST. Of any other
# field values are tried one by one up to _ONE_BY_ONE, then every fourth, which is near enough there, up to _LARGEST.
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank")
_WIDEST = 1 << 18
_ONE_BY_ONE, _LARGEST = 512, 1 << 13

SAID = {
    "active_flops": "training FLOPs per token",
    "total_parameters": "total parameters",
    "cache_bytes": "cache bytes per token",
}


@dataclass(frozen=True)
class Matched:
    """An arm ready to train: its recipe with the free widths filled in, the model's counts at the training length, and
    `flops_per_token`, which training spends on a token, multi-token prediction by its share of the sequences included."""

    name: str
    recipe: Recipe
    config: ModelConfig
    count: Count
    flops_per_token: float
    solved: dict[str, int]

    def quantity(self, which: Quantity) -> float:
        """active_flops, total_parameters or cache_bytes: see `SAID`."""
        if which == "active_flops":
            return self.flops_per_token
        return self.count.total_parameters if which == "total_parameters" else self.count.kv_cache_bytes_per_token


def match(study: Study, base: Recipe, vocab_size: int) -> list[Matched]:
    """The arms in order, each matched to the first or to the one it names. Raises `UsageError` naming the first arm that is
    impossible or unmatched."""
    where = f"study {study.name}, arm {study.first}"
    first = counted(where, study.first, arm_recipe(study, base, study.first, {}), vocab_size, {})
    matched = {first.name: first}
    for name, arm in study.arms.items():
        if name != first.name:
            matched[name] = _match(study, base, name, matched[arm.to or first.name], vocab_size)
    return list(matched.values())


def arm_recipe(study: Study, base: Recipe, name: str, solved: dict[str, int]) -> Recipe:
    """The base recipe with the arm's differences and the fields that were solved."""
    arm, values = study.arms[name], base.model_dump(exclude_none=True)
    if "from" in values["model"]:
        raise UsageError(f"study {study.name}: model.from starts from a trained model; arms must start from nothing")
    for section in ARM_SECTIONS:
        own: dict[str, Any] = getattr(arm, section)
        whole = section == "model" and "model_type" in own
        values[section] = {**({} if whole else values.get(section, {})), **own}
    make_way(values, {f"optimizer.{key}" for key in arm.optimizer})
    values["model"] = {**values["model"], **solved}
    values["name"] = name
    return parse_recipe(dump_toml(values), f"study {study.name}, arm {name}", name=name)


def _match(study: Study, base: Recipe, name: str, other: Matched, vocab_size: int) -> Matched:
    arm = study.arms[name]
    solved: dict[str, int] = {}
    for quantity in study.held_by(name):
        field = arm.solve.get(quantity)
        if field is not None:
            solved[field] = _solve(study, base, name, quantity, field, other.quantity(quantity), solved, vocab_size)
    # A field that serves a later quantity may not spoil an earlier one, so all are checked at last.
    matched = counted(f"study {study.name}, arm {name}", name, arm_recipe(study, base, name, solved), vocab_size, solved)
    for quantity in study.held_by(name):
        there, here = other.quantity(quantity), matched.quantity(quantity)
        if abs(here / there - 1) > study.tolerance:
            free = [field for q, field in arm.solve.items() if q == quantity]
            remedy = (f"{free[0]} = {solved[free[0]]} comes nearest" if free
                      else f"name a free width in arms.{name}.solve.{quantity}, or raise tolerance")  # fmt: skip
            raise UsageError(
                f"study {study.name}, arm {name}: {SAID[quantity]} cannot be matched: {here:,.0f} against {there:,.0f} of "
                f"{other.name} ({here / there - 1:+.1%}, allowed {study.tolerance:.1%}); {remedy}"
            )
    return matched


def _solve(
    study: Study, base: Recipe, name: str, quantity: Quantity, field: str, target: float, solved: dict[str, int],
    vocab_size: int,
) -> int:  # fmt: skip
    """The value of the field that brings the quantity nearest to `target`."""
    if field not in ModelConfig.model_fields:
        raise UsageError(f"study {study.name}: arms.{name}.solve.{quantity} is {field!r}; it must be a field of a model")

    def off(value: int) -> float:
        recipe = arm_recipe(study, base, name, {**solved, field: value})
        return counted(f"study {study.name}, arm {name}", name, recipe, vocab_size, {}).quantity(quantity) / target - 1

    if field not in _WIDTHS:
        return _nearest(study, name, field, off)
    best: tuple[float, int] | None = None
    for step in _STEPS:
        low, high = 1, _WIDEST // step
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if off(middle * step) < 0 else (low, middle)
        found = min((abs(off(k * step)), k * step) for k in {max(1, low - 1), low})
        best = found if best is None or found[0] < best[0] else best
        if best[0] <= study.tolerance / 2:
            break
    assert best is not None
    return best[1]


def _nearest(study: Study, name: str, field: str, off: Callable[[int], float]) -> int:
    best: tuple[float, int] | None = None
    refusal: UsageError | None = None
    possible = 0
    for value in (*range(1, _ONE_BY_ONE), *range(_ONE_BY_ONE, _LARGEST + 1, 4)):
        try:
            distance = abs(off(value))
        except UsageError as error:  # heads that do not divide, odd rotary widths
            refusal = error
            if value - possible >= _ONE_BY_ONE:
                break
            continue
        possible = value
        best = (distance, value) if best is None or distance < best[0] else best
        if distance > 4 and best[0] < distance and value > best[1] + 8:
            break
    if best is None:
        raise UsageError(f"study {study.name}, arm {name}: no value of {field} gives a possible model ({refusal})")
    return best[1]


def counted(where: str, name: str, recipe: Recipe, vocab_size: int, solved: dict[str, int]) -> Matched:
    """The arm of a recipe whose widths are settled. Raises `UsageError` for an impossible model."""
    try:
        config = recipe.config(recipe.model.get("vocab_size") or vocab_size)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    cost = count(config, context=recipe.data.seq_len)
    return Matched(name, recipe, config, cost, cost.training_flops(recipe.train.mtp_rows_share), solved)
