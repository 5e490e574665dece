"""TOML files of checked sections, shipped by name or one's own by path: what recipes and studies have in common."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from cadre.errors import UsageError, did_you_mean, explain, shorten


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Whole = TypeVar("_Whole", bound=Section)


def shipped(package: str) -> list[str]:
    """Names of the files inside the package."""
    return sorted(p.name[:-5] for p in resources.files(package).iterdir() if p.name.endswith(".toml"))


def text_of(kind: str, package: str, name_or_path: str, folder: Path = Path()) -> tuple[str, str]:
    """The text and the name of a file shipped in `package`, or of one's own, looked for in `folder`. `kind`: what it is called
    in the `UsageError` that is raised if there is none."""
    name, known = name_or_path, shipped(package)
    if name in known:
        return (resources.files(package) / f"{name}.toml").read_text(encoding="utf-8"), name
    path = folder / name
    try:
        return path.read_text(encoding="utf-8-sig"), path.stem  # Windows' editors begin a file with a byte order mark
    except FileNotFoundError:
        hint = f"{did_you_mean(name, known)} ({', '.join(known)})"
        raise UsageError(f"{kind} {name!r} is neither a file nor a shipped {kind}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{kind} {name!r} cannot be read ({error})") from None


def parse(text: str, where: str) -> dict[str, Any]:
    """The values that a text holds. Raises `UsageError`, which says `where`."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number may be too long for the reader, brackets too deep
        raise UsageError(f"{where}: not valid TOML: {error}") from None


def check(kind: type[_Whole], values: dict[str, Any], where: str) -> _Whole:
    """The values as what they should be. Raises `UsageError` for the first thing wrong with them."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(kind, error)}") from None


def _explain(kind: type[Section], error: ValidationError) -> str:
    first, *others = error.errors()
    if first["type"] == "missing":  # it may be there under a name with a slip in it
        first = next((each for each in others if each["type"] == "extra_forbidden"), first)
    name = shorten(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        fields = _fields_beside(kind, first["loc"])
        hint = did_you_mean(str(first["loc"][-1]), fields)
        return f"unknown key {name}{hint}; known here: {', '.join(fields)}"
    if first["type"] == "value_error" and name:
        return f"{name}: {explain(first)}"
    return explain(first)


def _fields_beside(kind: Any, place: tuple[int | str, ...]) -> Iterable[str]:
    """The fields of the section in which this place is."""
    for part in place[:-1]:
        kind = get_args(kind)[-1] if get_origin(kind) is dict else kind.model_fields[str(part)].annotation
    fields: dict[str, Any] = kind.model_fields
    return fields
