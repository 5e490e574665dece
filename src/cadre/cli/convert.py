"""`cadre convert`: a model as other programs want it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cadre.errors import UsageError
from cadre.files import kind_of, require_local


class Format(StrEnum):
    gguf = "gguf"
    hf = "hf"


class Dtype(StrEnum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A model directory, a run directory or a GGUF file.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A file NAME.gguf, or a folder.", show_default=False)],
    to: Annotated[
        Format | None,
        typer.Option(help="GGUF for llama.cpp, or a Hugging Face directory. [default: by DST's ending]", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the matrices; q8_0 is GGUF's 8 bits. [default: as they are stored]", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a model that is there.")] = False,
) -> None:
    """Write a model as GGUF, which llama.cpp reads, or as a Hugging Face directory: of another dtype, or of a GGUF file."""
    from cadre.hub.directory import recover

    require_local(target)
    recover(target)
    there = kind_of(target)
    if not force and there is not None and (there != "folder" or any(target.iterdir())):
        raise UsageError(f"{target}: is there already: choose another name, or give --force to write over it")
    if (to or (Format.gguf if target.suffix == ".gguf" else Format.hf)) == Format.gguf:
        _to_gguf(source, target, dtype)
    else:
        _to_directory(source, target, dtype)
    size = sum(file.stat().st_size for file in ([target] if target.is_file() else target.iterdir()))
    typer.echo(f"written to {target}: {size / 2**20:,.1f} MiB")


def _to_gguf(source: Path, target: Path, dtype: Dtype | None) -> None:
    from cadre.hub.gguf import write_gguf

    if kind_of(source) == "file":
        raise UsageError(f"{source}: is a file; GGUF is written of a model directory")
    if kind_of(target) == "folder":
        raise UsageError(f"{target}: is a folder; a GGUF model is a file, such as {target / 'model.gguf'}")
    write_gguf(source, target, dtype.value if dtype else None, _progress if sys.stderr.isatty() else lambda *_: None)


def _to_directory(source: Path, target: Path, dtype: Dtype | None) -> None:
    import torch

    from cadre.hub.directory import model_directory
    from cadre.hub.gguf_read import read_gguf, tokenizer_files
    from cadre.hub.load import load
    from cadre.hub.save import save

    if dtype == Dtype.q8_0:
        raise UsageError("--dtype q8_0 is for GGUF; a Hugging Face directory takes f32, f16 or bf16")
    kinds = {Dtype.f32: torch.float32, Dtype.f16: torch.float16, Dtype.bf16: torch.bfloat16}
    wanted = kinds[dtype] if dtype else None
    with ExitStack() as stack:
        if kind_of(source) == "file":
            read = read_gguf(source, wanted)
            model, tokenizer, like = read.model, read.tokenizer, stack.enter_context(tokenizer_files(read))
            large = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
            if large:
                raise UsageError(f"{source}: {large[0]} holds numbers too large for float16; take bf16 or f32")
        else:
            model, tokenizer = load(source, dtype=wanted)
            like = model_directory(source)
        save(model, target, tokenizer, like=like)


def _progress(done: int, total: int) -> None:
    typer.echo(f"\r{done:,} of {total:,} tensors", err=True, nl=done == total)
