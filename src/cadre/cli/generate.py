"""`cadre generate`: continue a prompt."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Json, MaxTokens, Model, Quantize, Seed, Temperature, TopK, TopP


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
    json_output: Json = False,
) -> None:
    """Continue a prompt; the text is printed as the model writes it, without the prompt."""
    from cadre.cli.progress import from_standard_input, shown
    from cadre.infer.generate import pieces, prepare
    from cadre.infer.sampling import Sampling

    if prompt == "-" and sys.stdin is not None and not sys.stdin.isatty():
        prompt = from_standard_input(sys.stdin.read)
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
    for piece in pieces(engine):
        typer.echo(shown(piece), nl=False)
    typer.echo()
    if speculative:
        stats = engine.stats
        share = stats.drafts_accepted / stats.drafts_proposed if stats.drafts_proposed else 0.0
        typer.echo(f"drafts: {stats.drafts_accepted} of {stats.drafts_proposed} accepted ({share:.0%}); "
                   f"{stats.generated_tokens} tokens in {stats.steps} passes", err=True)  # fmt: skip
