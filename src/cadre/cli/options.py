"""Options that several commands have, and what their values mean."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cadre.errors import UsageError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


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
MaxTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="Randomness; 0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Draw among the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Draw among the K likeliest tokens; 0 for all.")]
Quantize = Annotated[
    Quantization | None,
    typer.Option(help="Round the weights: less memory, faster where bytes are the limit.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(metavar="S", help="The same seed gives the same text.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def torch_dtype(choice: DType) -> Any:
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def token_count(text: str) -> float:
    """What `--tokens` says. Raises `UsageError` for what is no number of tokens."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)([kmbt]?)", text.strip().lower().replace(",", "").replace("_", ""))
    if not match or not 1 <= float(match[1]) * _UNITS[match[2]] < float("inf"):
        raise UsageError(f"--tokens {text}: must be a number such as 14.8T, 300B, 5e9 or 1500000")
    return float(match[1]) * _UNITS[match[2]]
