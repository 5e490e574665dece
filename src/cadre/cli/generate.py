"""`cadre generate`: continue a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadre.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.model.transformer import Transformer

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory or a run directory.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="Randomness; 0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Draw among the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Draw among the K likeliest tokens; 0 for all.")]
Seed = Annotated[int | None, typer.Option(metavar="S", help="The same seed gives the same text.", show_default=False)]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; may be empty.", show_default=False)],
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.8,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="S", help="End before this text; may be repeated.", show_default=False)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Continue a prompt; the text is printed as the model writes it, without the prompt."""
    from cadre.infer.generate import stream

    loaded, tokenizer = load_with_tokenizer(model)
    pieces = stream(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
    )
    if json_output:
        typer.echo(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False))
        return
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


def load_with_tokenizer(path: Path) -> tuple[Transformer, Tokenizer]:
    """Load a model for commands that read or write text. Raises `UsageError` for one without a tokenizer."""
    from cadre.hub.load import load
    from cadre.kernels.limits import default_device

    model, tokenizer = load(path, device=default_device())
    if tokenizer is None:
        raise UsageError(f"{path}: the model has no tokenizer.json, and text needs one")
    return model, tokenizer
