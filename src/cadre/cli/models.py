"""The models that commands are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cadre.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.cli.options import Quantization
    from cadre.model.transformer import Transformer
    from cadre.train.recipe import Recipe


def load_with_tokenizer(path: Path, quantize: Quantization | None = None, exact: bool = False) -> tuple[Transformer, Tokenizer]:
    """Load a model for commands that read or write text: float32 weights on a card as bfloat16, which it multiplies much
    faster, unless they are to stay `exact`. Raises `UsageError` for one without a tokenizer."""
    import torch

    from cadre.hub.directory import model_directory
    from cadre.hub.load import load, stored_dtype
    from cadre.infer.quantize import load_quantized
    from cadre.kernels.allocator import keep_freed_memory
    from cadre.kernels.limits import default_device

    keep_freed_memory()
    tell_kernels()
    device, dtype = default_device(), None
    if device.type == "cuda" and not exact and stored_dtype(model_directory(path)) == torch.float32:
        typer.echo("note: float32 weights, held as bfloat16 on this card", err=True)
        dtype = torch.bfloat16
    read = load if quantize is None else partial(load_quantized, kind=quantize.value)
    model, tokenizer = read(path, dtype=dtype, device=device)
    if tokenizer is None:
        raise UsageError(f"{path}: the model has no tokenizer.json, and text needs one")
    if quantize is not None and device.type == "cuda":
        typer.echo("note: on a card --quantize saves memory but not time: weights are widened at each use", err=True)
    return model, tokenizer


_on_standard_error = partial(typer.echo, err=True)


def tell_kernels(say: Callable[[str], None] = _on_standard_error) -> None:
    """Say, on standard error or as `say` does, that the C++ kernels are being compiled, or why all is slower without them; else
    nothing."""
    from cadre.kernels.limits import default_device
    from cadre.kernels.native.library import must_compile, why_missing

    if default_device().type != "cpu":
        return
    if must_compile():
        say("compiling the C++ kernels for this machine, once: about half a minute")
    missing = why_missing()
    if missing is not None:
        say(f"C++ kernels are missing, all is slower: {missing}")


def vocabulary(recipe: Recipe) -> int:
    """The vocabulary that the run's tokenizer will have."""
    from cadre.data.prepare import DEFAULT_VOCAB_SIZE
    from cadre.data.shards import TokenData
    from cadre.data.sources import token_data
    from cadre.hub.tokenizer import load_tokenizer, vocabulary_size

    if (made := token_data(recipe.data.source)) is not None:
        return TokenData.open(made).vocab_size
    if recipe.data.tokenizer is None:
        return recipe.data.vocab_size or DEFAULT_VOCAB_SIZE
    return vocabulary_size(load_tokenizer(recipe.data.tokenizer))
