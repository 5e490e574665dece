"""`cadre generate`: continue a prompt, or a file of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Json, MaxTokens, Model, Quantize, Seed, Temperature, TopK, TopP
from cadre.cli.prompts import answer_all, read_answers, read_prompts, told
from cadre.errors import UsageError
from cadre.files import read_json_object


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; may be empty; - reads it.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of PROMPT, many: a line each (.txt), or objects with a field prompt (.jsonl).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --prompts: the .jsonl file of what came of each; one begun before is completed.",
            show_default=False,
        ),
    ] = None,
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.8,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: Annotated[float, typer.Option(metavar="P", help="Only tokens this many times as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: tokens of prompt and text become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(metavar="X", help="Taken from the logits of tokens in the text.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(metavar="X", help="The same, for each time they are in it.")] = 0.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="S", help="End before this text; may be repeated.", show_default=False)
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON schema that the text must follow.", show_default=False)
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="R", help="An expression that the whole text must match.", show_default=False)
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="With --json or --out: each token's log-probability, and the K likeliest.", show_default=False
        ),
    ] = None,
    speculative: Annotated[
        bool, typer.Option("--speculative", help="Draft with the model's multi-token prediction modules: the same text.")
    ] = False,
    quantize: Quantize = None,
    json_output: Json = False,
) -> None:
    """Continue a prompt, printed as the model writes it and without the prompt; or a file of prompts, many at a time."""
    from cadre.cli.progress import from_standard_input, shown
    from cadre.infer.generate import complete, engine_for, pieces, requests_for
    from cadre.infer.sampling import Sampling

    if (prompt is None) == (prompts is None):
        raise UsageError("give a PROMPT to continue, or --prompts FILE with many: one of them")
    if (prompts is None) != (out is None):
        raise UsageError("--prompts FILE and --out FILE go together: what is read, and what is written")
    if json_output and prompts is not None:
        raise UsageError("--json is for one PROMPT; what comes of --prompts is JSON in --out")
    if logprobs is not None and not json_output and prompts is None:
        raise UsageError("--logprobs are told with --json, or in --out")
    schema = None if json_schema is None else json.dumps(read_json_object(json_schema))
    sampling = Sampling(
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed=seed,
        logprobs=logprobs,
        json_schema=schema,
        regex=regex,
    )
    if prompt == "-" and sys.stdin is not None and not sys.stdin.isatty():
        prompt = from_standard_input(sys.stdin.read)
    asked = [{"prompt": prompt or ""}] if prompts is None else read_prompts(prompts)
    answered = {} if prompts is None or out is None else read_answers(out, asked, prompts)
    loaded, tokenizer = load_with_tokenizer(model, quantize)
    drafts = max(1, len(loaded.mtp)) if speculative else 0
    requests = requests_for(loaded, tokenizer, [each["prompt"] for each in asked], max_tokens, sampling, stop or ())
    requests = [request for place, request in enumerate(requests) if place not in answered]
    engine = engine_for(loaded, tokenizer, requests, drafts)
    if out is not None:
        answer_all(engine, requests, asked, answered, out, tokenizer)
    elif json_output:
        (completion,) = complete(engine, requests)
        result = told(asked[0], completion, tokenizer, logprobs is not None)
        if speculative:
            result |= {"drafts_proposed": engine.stats.drafts_proposed, "drafts_accepted": engine.stats.drafts_accepted}
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    else:
        engine.add(requests[0])
        for piece in pieces(engine):
            typer.echo(shown(piece), nl=False)
        typer.echo()
    if speculative:
        stats = engine.stats
        share = stats.drafts_accepted / stats.drafts_proposed if stats.drafts_proposed else 0.0
        typer.echo(f"drafts: {stats.drafts_accepted} of {stats.drafts_proposed} accepted ({share:.0%}); "
                   f"{stats.generated_tokens} tokens in {stats.steps} passes", err=True)  # fmt: skip
