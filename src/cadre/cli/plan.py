"""`cadre plan`: what a model holds, and what training and serving it would take."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadre.cli.models import vocabulary
from cadre.cli.options import Json, Set, counts, token_count
from cadre.errors import UsageError

if TYPE_CHECKING:
    from cadre.plan.planner import Request
    from cadre.plan.shape import Shape
    from cadre.train.recipe import Recipe


# What is planned for unless a recipe or the caller says otherwise.
_CARD = "h100"
# What a recipe is planned for: the first of these that has the precision and holds the training.
_FOR_RECIPES = ("cpu-2core", "cpu-2core-bf16", _CARD)
# The precision of a recipe's `train.dtype`; "auto" leaves it to the device.
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


class Precision(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"
    fp32 = "fp32"


class Optimizer(StrEnum):
    adamw = "adamw"
    adamw_bf16 = "adamw-bf16"
    muon = "muon"


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Catalogue name, config.json, recipe, model or run directory.")],
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens to train on: 14.8T, 300B, 5e9.")] = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help="Device. [default: h100; of a recipe cpu-2core, if that can hold it]")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", parser=counts(), help="How many. [default: the fewest that do]")
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", parser=counts(), help="Tokens a sequence. [default: 4096 or the recipe's]")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", parser=counts(), help="Sequences a training step. [default: 8 a device]")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Compute in. [default: a recipe's, else bf16]")] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="Whose states to hold. [default: a recipe's, else adamw]")] = None,
    mfu: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of peak reached. [default: predicted]")] = None,
    rent: Annotated[float | None, typer.Option(metavar="USD", help="Dollars a device-hour. [default: the catalogue's]")] = None,
    mtp: Annotated[
        bool | None,
        typer.Option("--mtp/--no-mtp", help="Count multi-token prediction. [default: as the file says; catalogue: no]"),
    ] = None,
    set_: Set = None,
    here: Annotated[bool, typer.Option("--here", help="Measure this machine (up to 30 s), predict training on it.")] = False,
    explain: Annotated[bool, typer.Option(help="Show every term of a step and the next best layouts.")] = False,
    json_output: Json = False,
) -> None:
    """Count a model and predict memory, time, price and decoding rate before anything runs."""
    from cadre.plan.hardware import hardware as device
    from cadre.plan.planner import Request, check, make_plan

    if here:
        _refuse_with_here(hardware=hardware, devices=devices, mfu=mfu, rent=rent)
    read = _read(model, mtp, set_)
    recipe, notes = read.recipe, read.notes
    if set_ and recipe is None:
        raise UsageError(f"--set changes a recipe, and {model} is none: give a recipe or a run")
    if mtp and not read.shape.extra:
        notes += ("--mtp changes nothing: this model has no modules of multi-token prediction",)
    own = _PRECISIONS.get(recipe.train.dtype) if recipe else None
    request = Request(
        name=read.name,
        source=read.source,
        shape=read.shape,
        ignored=read.ignored,
        notes=notes,
        device=device(_first(hardware, _FOR_RECIPES[0] if recipe else _CARD)),
        context=_first(context, recipe.data.seq_len if recipe else None, 4096),
        devices=_first(devices, 1 if recipe and hardware is None else None),
        precision=_first(precision, own),
        batch=_first(batch, recipe.train.batch if recipe else None),
        micro_batch=recipe.train.micro_batch if recipe else None,
        degrees=recipe.parallel.degrees() if recipe else None,
        mtp_share=recipe.train.mtp_rows_share if recipe else 1.0,
        optimizer=_first(optimizer, recipe.optimizer.name if recipe else None, "adamw"),
        tokens=_recipe_tokens(recipe) if tokens is None else token_count(tokens),
        mfu=mfu,
        rent=rent,
    )
    check(request)
    if recipe and hardware is None and not here:
        request = _where_it_fits(request, devices)
    rates = request.device.flops
    if recipe and precision is None and own is not None and own not in rates and not here:
        said = f"train.dtype is {recipe.train.dtype}, for which {request.device.name} has no rate"
        request = replace(request, precision=None, notes=(*request.notes, f"{said}: planned in {next(iter(rates))}"))
    if here:
        _plan_here(model, request, recipe, mtp, context, json_output)
        return
    made = make_plan(request)
    if json_output:
        typer.echo(json.dumps(made, ensure_ascii=False))
        return
    from cadre.cli.plan_tables import show

    show(made, explain)


def _refuse_with_here(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"--here and --{name} exclude each other: --here is about this machine")


def _plan_here(
    model: str, request: Request, recipe: Recipe | None, mtp: bool | None, context: int | None, json_output: bool
) -> None:
    from cadre.cli.here import plan_here, show
    from cadre.hub.directory import load_config
    from cadre.plan import catalogue
    from cadre.train.run import continued

    if recipe is not None and "from" not in recipe.model:
        config = recipe.config(request.shape.vocab_size)
    elif catalogue.lookup(model) is not None:
        raise UsageError(f"--here {model}: trains blocks to measure them; give a recipe, a run or a config.json")
    else:
        config = load_config(model) if recipe is None else continued(recipe)
    if mtp is False:
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    if context is None and recipe is None:
        request = replace(request, context=min(request.context, config.max_position_embeddings))
    made = plan_here(request, config, recipe)
    if json_output:
        typer.echo(json.dumps(made, ensure_ascii=False))
    else:
        show(made)


def _first(*values: Any) -> Any:
    """The first value that is there."""
    return next((value for value in values if value is not None), None)


def _where_it_fits(request: Request, devices: int | None) -> Request:
    """A request for the first of `_FOR_RECIPES`, or for the first of the others that suits it; a note then says why."""
    from cadre.plan.hardware import hardware

    why = _unfit(request, devices or 1)
    if why is None:
        return request
    small = [replace(request, device=hardware(name)) for name in _FOR_RECIPES[1:-1]]
    card = replace(request, device=hardware(_CARD), devices=devices)
    found = next((other for other in small if not _unfit(other, devices or 1)), card)
    said = f"{devices or 1} x {request.device.name} {why}: planned for {found.device.name} instead"
    return replace(found, notes=(*request.notes, said))


def _unfit(request: Request, devices: int) -> str | None:
    """Why so many of the device are not for this training, if they are not: the precision that is asked for, or memory."""
    from cadre.plan.planner import exceeds

    if request.precision is not None and request.precision not in request.device.flops:
        return f"has no {request.precision}"
    return "cannot hold this recipe's training" if exceeds(request, devices) else None


@dataclass(frozen=True)
class _Read:
    """What MODEL names: its shape and where that comes from, and the recipe if it is one or a run of one."""

    name: str
    source: str
    shape: Shape
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = None


def _read(model: str, mtp: bool | None, overrides: list[str] | None) -> _Read:
    """What is known by the name `model`. Raises `UsageError` if nothing is."""
    from cadre.hub.directory import lacks_modules
    from cadre.plan import catalogue
    from cadre.plan.families import read_config, read_shape
    from cadre.train.recipe import shipped

    if not model:
        raise UsageError("MODEL is empty: give a catalogue name, a config.json, a recipe, or a model or run directory")
    path = Path(model)
    entry = catalogue.lookup(model)
    if entry is not None:
        notes: tuple[str, ...] = ()
        if entry.shape.extra and mtp is None:
            notes = ("multi-token prediction is left out, as in the published totals; --mtp counts it",)
        shape = entry.shape if mtp else entry.shape.without_extra()
        return _Read(entry.name, entry.source, shape, notes=notes)
    if model in shipped() or path.suffix == ".toml":
        return _of_recipe(model, model, mtp, overrides)
    if path.is_dir():
        recipe = path / "recipe.toml"
        if recipe.exists():
            return _of_recipe(str(recipe), str(path), mtp, overrides)
    elif not path.exists():
        if path.suffix == ".json" or len(path.parts) > 1:
            known = catalogue.lookup(path.name)  # as a hub names it
            raise UsageError(f"{model}: no such file" + (f"; did you mean {known.name}?" if known is not None else ""))
        raise UsageError(_unknown(model, [*catalogue.names(), *shipped()]))
    values, where = read_config(path)
    reading = read_shape(values, where)
    shape, notes = reading.shape if mtp is not False else reading.shape.without_extra(), reading.notes
    if shape.extra and mtp is None and lacks_modules(path, len(shape.blocks)):
        shape = shape.without_extra()
        notes += ("multi-token prediction is announced, but none of its weights are stored: left out; --mtp counts it",)
    return _Read(path.name or where, where, shape, reading.ignored, notes)


def _unknown(model: str, names: list[str]) -> str:
    """Neither a file nor a name: the nearest names, or all of them."""
    close = difflib.get_close_matches(model.lower(), names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"names: {', '.join(names)}"
    return f"{model}: not in the catalogue, no recipe, file or directory; {hint}"


def _of_recipe(source: str, name: str, mtp: bool | None, overrides: list[str] | None) -> _Read:
    """A recipe's model, with the vocabulary that its data section asks for."""
    from cadre.plan.families import read_config, read_shape
    from cadre.plan.shape import Shape
    from cadre.train.recipe import read_recipe

    recipe = read_recipe(source, overrides)
    notes: list[str] = []
    if "from" in recipe.model:
        values, where = read_config(recipe.model["from"])
        reading = read_shape(values, where)
        shape, ignored = reading.shape, reading.ignored
        notes += reading.notes
    else:
        words = recipe.model.get("vocab_size") or vocabulary(recipe)
        shape, ignored = Shape.from_config(recipe.config(vocab_size=words)), ()
    if mtp is False:
        shape = shape.without_extra()
    if shape.extra and recipe.train.mtp_share < 1:
        notes.append(f"multi-token prediction is trained on {recipe.train.mtp_rows_share:.0%} of the sequences")
    if recipe.train.fp8_experts:
        notes.append("train.fp8_experts is not counted: experts are planned in the precision of all else")
    return _Read(name, f"recipe {recipe.name}", shape, ignored, tuple(notes), recipe)


def _recipe_tokens(recipe: Recipe | None) -> float | None:
    if recipe is None or recipe.train.steps is None:
        return None
    return recipe.train.steps * recipe.train.batch * recipe.data.seq_len
