"""`cadre generate`: continue a prompt."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadre.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.model.transformer import Transformer


class Quantization(StrEnum):
    int8 = "int8"
    int4 = "int4"


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


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; may be empty; - reads it.", show_default=False)
    ],
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.8,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="S", help="End before this text; may be repeated.", show_default=False)
    ] = None,
    speculative: Annotated[
        bool, typer.Option("--speculative", help="Draft with the model's multi-token prediction modules: the same text.")
    ] = False,
    quantize: Quantize = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Continue a prompt; the text is printed as the model writes it, without the prompt."""
    from cadre.cli.progress import printable
    from cadre.infer.generate import pieces, prepare
    from cadre.infer.sampling import Sampling

    if prompt == "-" and sys.stdin is not None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    loaded, tokenizer = load_with_tokenizer(model, quantize)
    drafts = max(1, len(loaded.mtp)) if speculative else 0
    sampling = Sampling(temperature, top_p, top_k, seed=seed)
    engine = prepare(loaded, tokenizer, prompt, max_tokens, sampling, stop or (), drafts)
    if json_output:
        result: dict[str, Any] = {"prompt": prompt, "text": "".join(pieces(engine))}
        if speculative:
            result |= {"drafts_proposed": engine.stats.drafts_proposed, "drafts_accepted": engine.stats.drafts_accepted}
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    shown = printable if sys.stdout.isatty() else str  # what is piped is exactly what was written
    for piece in pieces(engine):
        typer.echo(shown(piece), nl=False)
    typer.echo()
    if speculative:
        stats = engine.stats
        share = stats.drafts_accepted / stats.drafts_proposed if stats.drafts_proposed else 0.0
        typer.echo(f"drafts: {stats.drafts_accepted} of {stats.drafts_proposed} accepted ({share:.0%}); "
                   f"{stats.generated_tokens} tokens in {stats.steps} passes", err=True)  # fmt: skip


def load_with_tokenizer(path: Path, quantize: Quantization | None = None) -> tuple[Transformer, Tokenizer]:
    """Load a model for commands that read or write text. Raises `UsageError` for one without a tokenizer."""
    from cadre.hub.load import load
    from cadre.infer.quantize import quantize_model
    from cadre.kernels.allocator import keep_freed_memory
    from cadre.kernels.limits import default_device

    keep_freed_memory()
    tell_kernels()
    model, tokenizer = load(path, device=default_device())
    if tokenizer is None:
        raise UsageError(f"{path}: the model has no tokenizer.json, and text needs one")
    if quantize is not None:
        quantize_model(model, quantize.value)
    return model, tokenizer


def tell_kernels() -> None:
    """Say on standard error that the C++ kernels are being compiled, or why all is slower without them; else nothing."""
    from cadre.kernels.limits import default_device
    from cadre.kernels.native.library import must_compile, why_missing

    if default_device().type != "cpu":
        return
    if must_compile():
        typer.echo("compiling the C++ kernels for this machine, once: about half a minute", err=True)
    missing = why_missing()
    if missing is not None:
        typer.echo(f"C++ kernels are missing, all is slower: {missing}", err=True)
