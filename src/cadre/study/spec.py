"""Studies: which architectures race, over what budget, and what is held equal, as a TOML file checked before anything runs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cadre import sections
from cadre.errors import UsageError
from cadre.sections import Section
from cadre.train import recipe
from cadre.train.recipe import Recipe, dump_toml, parse_recipe, read_recipe

Quantity = Literal["active_flops", "total_parameters", "cache_bytes"]
Held = Literal["active_flops", "total_parameters", "cache_bytes", "seconds", "price"]
QUANTITIES: tuple[Quantity, ...] = ("cache_bytes", "total_parameters", "active_flops")

# What an arm may choose for itself. Text, tokenizer, batches and their order, seed, length and evaluation are the study's.
ARM_SECTIONS = ("model", "optimizer", "schedule", "balance", "train")
ARM_TRAIN_KEYS = ("mtp_weight", "mtp_weight_final", "mtp_share", "clip", "micro_batch")
_LETTERS = set("abcdefghijklmnopqrstuvwxyz0123456789-_.")


class Budget(Section):
    """What each run of an arm may use, in one of these. `flops` are training FLOPs, `seconds` those of optimizer steps,
    `usd` such seconds at the rent."""

    flops: float | None = Field(default=None, gt=0)
    seconds: float | None = Field(default=None, gt=0)
    tokens: float | None = Field(default=None, gt=0)
    usd: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("needs exactly one of flops, seconds, tokens, usd")
        return self

    @property
    def unit(self) -> str:
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def amount(self) -> float:
        return float(getattr(self, self.unit))


class Sweep(Section):
    """Short runs of the first seed with the arm's learning rates times each factor, over `share` of its budget."""

    factors: list[float] = Field(default=[0.5, 1.0, 2.0], min_length=1)
    share: float = Field(default=0.15, gt=0, le=1)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if min(self.factors) <= 0 or len(set(self.factors)) < len(self.factors):
            raise ValueError(f"factors are {self.factors}; they must be above 0 and differ")
        return self


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]


class Quick(Section):
    """The first answer: the whole study in about `minutes`, whatever the machine, by as short runs as that takes."""

    minutes: float = Field(default=10, gt=0)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    factors: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    arms: list[str] | None = None


class Decode(Section):
    """Where decoding is timed."""

    contexts: list[Count] = Field(default=[512, 2048], min_length=1)
    batches: list[Count] = Field(default=[1, 8], min_length=1)


class Arm(Section):
    """Differences to the base recipe, by section. A `model` with a `model_type` is a whole model, another is laid over the
    base's. `solve`: which whole-number field of the model is free to make which quantity equal the base's. `held`: what
    must be equal in this arm, if not what the study holds. `to`: the arm before it that it is matched to, if not the first.
    `share` of the budget is what the arm gets."""

    to: str | None = None
    held: list[Quantity] | None = None
    solve: dict[Quantity, str] = Field(default={})
    share: float = Field(default=1.0, gt=0, le=1)
    model: dict[str, Any] = Field(default={})
    optimizer: dict[str, Any] = Field(default={})
    schedule: dict[str, Any] = Field(default={})
    balance: dict[str, Any] = Field(default={})
    train: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        for key in self.train:
            if key not in ARM_TRAIN_KEYS:
                raise ValueError(f"train.{key} is the same in every arm; an arm may set {', '.join(ARM_TRAIN_KEYS)}")
        return self


class Study(Section):
    """A study as written. `base`: the first arm's recipe, a shipped name or a file, unless `recipe` holds one. The first
    arm is the one that the others are matched to and judged against."""

    name: str
    title: str
    question: str = ""
    base: str | None = None
    recipe: dict[str, Any] | None = None
    held: Held
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    budget: Budget
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    evaluations: int = Field(default=24, ge=4)
    rent: float | None = Field(default=None, gt=0)
    sweep: Sweep = Sweep()
    quick: Quick = Quick()
    decode: Decode = Decode()
    arms: dict[str, Arm] = Field(min_length=2)

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name in self.arms:
            if not name[:1].isalnum() or set(name) - _LETTERS:
                raise ValueError(
                    f"arms.{name}: an arm's name may have a-z, 0-9, - _ and ., and begins with one of the first two"
                )
        return self

    @model_validator(mode="after")
    def _held_by_the_budget(self) -> Self:
        wanted = {"seconds": "seconds", "price": "usd"}.get(self.held)
        if wanted and self.budget.unit != wanted:
            raise ValueError(f"held is {self.held!r}; then the budget must be in {wanted}, not {self.budget.unit}")
        return self

    @model_validator(mode="after")
    def _one_base(self) -> Self:
        if self.base is not None and self.recipe is not None:
            raise ValueError("give base or [recipe], not both")
        if self.base is None and self.recipe is None:
            raise ValueError("needs base (a recipe's name or file) or [recipe]")
        return self

    @model_validator(mode="after")
    def _quick_is_part_of_it(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.quick.seeds)) < len(self.quick.seeds):
            raise ValueError("seeds must differ from each other")
        for name, given in (("factors", self.quick.factors), ("arms", self.quick.arms or [])):
            if len(set(given)) < len(given):
                raise ValueError(f"quick.{name} are {given}; they must differ")
        for name in self.quick.arms or []:
            if name not in self.arms:
                raise ValueError(f"quick.arms: {name!r} is not an arm; arms are {', '.join(self.arms)}")
        if self.quick.arms is not None and (len(self.quick.arms) < 2 or self.first not in self.quick.arms):
            raise ValueError(f"quick.arms: needs at least two arms, {self.first!r} (the first) among them")
        return self

    @model_validator(mode="after")
    def _matched(self) -> Self:
        name, first = self.first, self.arms[self.first]
        if first.solve or first.held is not None or first.to:
            raise ValueError(f"arms.{name}: is the first, which the others are matched to: leave out its held, solve and to")
        names = list(self.arms)
        for place, (name, arm) in enumerate(self.arms.items()):
            if arm.to is not None and arm.to not in names[:place]:
                raise ValueError(f"arms.{name}.to is {arm.to!r}; it must be an arm before it ({', '.join(names[:place])})")
            if arm.to is not None and self.quick.arms and name in self.quick.arms and arm.to not in self.quick.arms:
                raise ValueError(f"quick.arms: {name!r} is matched to {arm.to!r}, which must be among them")
            for quantity in arm.solve:
                if quantity not in self.held_by(name):
                    held = ", ".join(self.held_by(name)) or "none"
                    raise ValueError(f"arms.{name}.solve.{quantity}: is not held equal in this arm (held there: {held})")
        return self

    @property
    def first(self) -> str:
        return next(iter(self.arms))

    def held_by(self, name: str) -> list[Quantity]:
        """Which quantities of the model's shape must be the first arm's; in the order in which they are solved."""
        arm = self.arms[name]
        held = arm.held if arm.held is not None else [self.held] if self.held in QUANTITIES else []
        return [quantity for quantity in QUANTITIES if quantity in held]

    def shortened(self) -> Study:
        """The study that `--quick` runs; the size of its budget is found once the machine's speed is known."""
        kept = {name: arm for name, arm in self.arms.items() if self.quick.arms is None or name in self.quick.arms}
        sweep = self.sweep.model_copy(update={"factors": self.quick.factors})
        return self.model_copy(update={"seeds": self.quick.seeds, "sweep": sweep, "arms": kept})

    def base_recipe(self) -> Recipe:
        """The recipe that arms differ from. Raises `UsageError`."""
        if self.recipe is not None:
            return parse_recipe(dump_toml(self.recipe), f"study {self.name}, [recipe]", name=self.name)
        return read_recipe(str(self.base))


def shipped() -> list[str]:
    """Names of the studies inside the package."""
    return sections.shipped("cadre.studies")


def read_study(name_or_path: str) -> tuple[Study, str]:
    """A shipped study by name or a TOML file by path, and the hash of its text.

    Raises `UsageError` for an unknown study, key, type or value, and for a recipe.
    """
    text, name = sections.text_of("study", "cadre.studies", name_or_path)
    return parse_study(text, name_or_path, name), hashlib.sha256(text.encode()).hexdigest()


def parse_study(text: str, where: str, name: str = "study") -> Study:
    """Check a study's text. `where` names it in error messages."""
    values = sections.parse(text, where)
    if "model" in values and "arms" not in values:
        raise UsageError(f"{where}: is a recipe: cadre train runs it; a study has [arms] to compare")
    values.setdefault("name", name)
    values.setdefault("title", name)
    base = values.get("base")
    if isinstance(base, str) and base and base not in recipe.shipped():  # a file beside the study's
        values["base"] = os.path.join(Path(where).parent, base)  # noqa: PTH118, which keeps a ./ before a shipped name
    return sections.check(Study, values, where)
