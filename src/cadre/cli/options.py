"""Options that several commands have, and what their values mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cadre.errors import UsageError, shorten

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_MOST = 10**18  # beyond any count of ours


def _number(text: str) -> Decimal | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d{1,3})?)([kmbt]?)", text.strip().lower().replace(",", "").replace("_", ""))
    return Decimal(match[1]) * _UNITS[match[2]] if match else None


def counts(least: int = 1) -> Callable[[str], int]:
    """Reads an option that is a whole number, written as it is or as 4k or 1.5M, of at least so much."""

    def count(text: str) -> int:
        number = _number(str(text))
        if number is None or number != int(number) or not least <= number <= _MOST:
            wanted = f"must be a whole number such as 4096, 4k or 1.5M, at least {least}"
            raise typer.BadParameter(f"{shorten(str(text))}: {wanted}")
        return int(number)

    return count


class Quantization(StrEnum):
    int8 = "int8"
    int4 = "int4"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Peer(StrEnum):
    transformers = "transformers"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory or a run directory.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(metavar="N", parser=counts(), help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="Randomness; 0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Draw among the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Draw among the K likeliest tokens; 0 for all.")]
Quantize = Annotated[
    Quantization | None,
    typer.Option(help="Round the weights: less memory, faster where bytes are the limit.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(metavar="S", help="The same seed gives the same text.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="section.key=value, over the recipe's.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def torch_dtype(choice: DType) -> Any:
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def token_count(text: str) -> float:
    """What `--tokens` says. Raises `UsageError` for what is no number of tokens."""
    number = _number(text)
    if number is None or not 1 <= number < Decimal("1e300"):
        raise UsageError(f"--tokens {text}: must be a number such as 14.8T, 300B, 5e9 or 1500000")
    return float(number)
