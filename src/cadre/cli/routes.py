"""`cadre routes`: what the experts of a model took up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Model, counts
from cadre.errors import UsageError, writing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cadre.data.sources import Document

# Longer windows cost more time and memory than they tell.
_LONGEST_CONTEXT = 2048


def routes(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Files or folders of .txt .md .jsonl .parquet, plain or .gz; or sotu. [default: a run's held-out text]",
            show_default=False,
        ),
    ] = None,
    # An option takes one value: the files after the first arrive as arguments.
    more: Annotated[list[str] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Where the page goes. [default: routes.html in the run, else here]", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", parser=counts(), help="Read at most so many tokens, spread evenly over the text.")
    ] = 200_000,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else; a page only with --out.")
    ] = False,
) -> None:
    """What each expert took up: its typical tokens, contexts and documents, and who follows whom, as a page or JSON."""
    from cadre.cli.progress import counting
    from cadre.data.conversations import template_of_model
    from cadre.files import kind_of, replace_file, require_local
    from cadre.hub.directory import display_name, load_config, run_of
    from cadre.study.excerpts import held_out_text, read_text, sample
    from cadre.study.routes import LETTERS_PER_PLACE, LETTERS_PER_TOKEN, gather, sparse_layers, study
    from cadre.study.routes_page import render
    from cadre.train.report import ROUTES_PAGE, link_routes

    if out is not None:
        require_local(out)
        if kind_of(out) == "folder":
            raise UsageError(f"--out {out}: is a folder; give a file, such as {out / ROUTES_PAGE}")
    run = run_of(model)
    home = model if run == model else None  # whose page it is: not that of another of the run's models
    source = [*(data or []), *(more or [])]
    documents: Iterable[Document]
    if source:
        documents = read_text(source, template_of_model(model))
    elif run is not None:
        documents = held_out_text(run)
    else:
        load_config(model)  # which says so if there is nothing
        raise UsageError(f"{model}: is no run with text held out: say with --data what to read")
    if not load_config(model).has_experts:
        raise UsageError(f"{model}: the model is dense: it has no experts whose routes could be read")
    loaded, tokenizer = load_with_tokenizer(model, exact=True)
    sparse_layers(loaded)
    context = min(loaded.config.max_position_embeddings, _LONGEST_CONTEXT)
    if context < 2:
        raise UsageError(
            f"{model}: max_position_embeddings is {context}: there is no room for a token and what comes before it"
        )
    chosen = sample(documents, LETTERS_PER_TOKEN * max_tokens, LETTERS_PER_PLACE * context)
    with counting("read") as progress:
        gathered = gather(loaded, tokenizer, chosen, context=context, max_tokens=max_tokens, progress=progress)
    found: dict[str, Any] = {
        "model": display_name(model),
        "data": " ".join(source) or "its held-out text",
        "documents": chosen.documents,
        "complete": chosen.complete,
        "context": context,
        "top_k": loaded.config.num_experts_per_tok,
        "shared_experts": loaded.config.n_shared_experts,
        **study(gathered, tokenizer),
    }
    if json_output:
        typer.echo(json.dumps(found, ensure_ascii=False))
    if json_output and out is None:
        return
    path = out or (home or Path()) / ROUTES_PAGE
    with writing(path):
        replace_file(path, render(found).encode("utf-8", errors="replace"))
    if home is not None and path.resolve() == (home / ROUTES_PAGE).resolve():
        link_routes(home)
    if not json_output:
        sizes = f"{len(found['layers'])} x {len(found['layers'][0]['experts'])} experts"
        typer.echo(f"{path}: {sizes} on {found['tokens']:,} tokens, documents: {found['documents']:,}")
