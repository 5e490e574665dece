"""A run directory: what is in it, who may write to it, and whether it can go on.

    recipe.toml      every choice, fully resolved
    model/           the model so far, in the Hugging Face layout
    checkpoints/     what `--resume` continues from
    metrics.jsonl    one object per logged step; tensorboard/ has the same
    report.html      the run on one page
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cadre.data.shards import TokenData, prepare
from cadre.data.tokenizer import check_vocabulary, special_ids, tokenizer_hash
from cadre.errors import RunError, UsageError
from cadre.hub.load import load, load_config
from cadre.hub.save import check_expressible
from cadre.kernels.limits import best_dtype
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.train.checkpoint import checkpoints, read_state
from cadre.train.recipe import Recipe, parse_recipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    """A run ready to train: recipe resolved, data prepared, model built (not yet restored from `checkpoint`)."""

    path: Path
    recipe: Recipe
    config: ModelConfig
    data: TokenData
    model: Transformer
    dtype: torch.dtype
    checkpoint: Path | None

    def identity(self) -> dict[str, Any]:
        """What must not change between checkpoint and resume."""
        return {"model": self.config.to_hf(), "tokenizer": tokenizer_hash(self.data.tokenizer)}


def start(recipe: Recipe, path: Path, device: torch.device, note: Callable[[str], None]) -> Run:
    """Prepare a new run in `path`. Raises `UsageError` if `path` holds anything already, or the recipe cannot be run."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        held = "another run: continue it with --resume, or" if (path / "recipe.toml").is_file() else "other files:"
        raise UsageError(f"--out {path}: holds {held} choose an empty folder")
    data_section = recipe.data
    source: Path | None = None
    if "from" in recipe.model:
        source = Path(recipe.model["from"])
        if data_section.tokenizer is None and data_section.vocab_size is None:
            data_section = data_section.model_copy(update={"tokenizer": str(source)})
    data = _prepare(data_section, recipe.model.get("vocab_size"), note)
    if source is not None:
        config = load_config(source)
        check_vocabulary(data.tokenizer, config.vocab_size)
    else:
        bos, eos = special_ids(data.tokenizer)
        try:
            config = recipe.config(recipe.model.get("vocab_size") or data.vocab_size, bos_token_id=bos, eos_token_id=eos)
        except ValueError as error:
            raise UsageError(str(error)) from None
        check_vocabulary(data.tokenizer, config.vocab_size)
    check_expressible(config)
    if source is not None:
        model, _ = load(source, dtype=torch.float32)
    else:
        model = Transformer(config).initialize(recipe.train.seed)
    dtype = best_dtype(device) if recipe.train.dtype == "auto" else _DTYPES[recipe.train.dtype]
    train = recipe.train.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    fields = {k: v for k, v in config.model_dump(exclude_none=True).items()}
    rope = config.rope_parameters.model_dump(exclude_none=True)
    resolved = recipe.model_copy(update={"train": train, "data": data_section, "model": {**fields, "rope_parameters": rope}})
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write(path / "recipe.toml", resolved.to_toml())
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None
    return Run(path, resolved, config, data, model.to(device), dtype, None)


def resume(path: Path, wanted: Recipe | None, overrides: list[str], device: torch.device, note: Callable[[str], None]) -> Run:
    """Open a run to continue it from its newest checkpoint, or from the start if it has none.

    `wanted` (a recipe named beside --resume) and `overrides` may change how training goes on, but not the model, its data
    or the batches: a difference there raises `UsageError` and is named.
    """
    if not (path / "recipe.toml").is_file():
        raise UsageError(f"--resume {path}: is no run directory (it has no recipe.toml)")
    text = (path / "recipe.toml").read_text(encoding="utf-8")
    held = parse_recipe(text, str(path / "recipe.toml"))
    recipe = parse_recipe(text, str(path / "recipe.toml"), overrides)
    if wanted is not None:
        _refuse_difference(path, held, wanted)
        recipe = wanted.model_copy(update={"model": held.model, "data": held.data, "name": held.name})
    _refuse_difference(path, held, recipe)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": held.train.dtype})})
    data = _prepare(recipe.data, recipe.model["vocab_size"], note)
    config = recipe.config(recipe.model["vocab_size"])
    saved = checkpoints(path)
    run = Run(path, recipe, config, data, Transformer(config), _DTYPES[recipe.train.dtype], saved[-1] if saved else None)
    if run.checkpoint is not None:
        identity, then = run.identity(), read_state(run.checkpoint)["identity"]
        for field in sorted({*identity["model"], *then["model"]}):
            now, before = identity["model"].get(field), then["model"].get(field)
            if now != before:
                raise UsageError(f"--resume {path}: model.{field} is {now}, but the checkpoint was trained with {before}")
        if identity["tokenizer"] != then["tokenizer"]:
            raise UsageError(
                f"--resume {path}: the tokenizer has changed (now {identity['tokenizer'][:12]}, checkpoint "
                f"{then['tokenizer'][:12]}): restore the corpus or tokenizer file that the run began with"
            )
    else:
        run.model.initialize(recipe.train.seed)
    run.model.to(device)
    _write(path / "recipe.toml", recipe.to_toml())
    return run


def _prepare(section: Any, vocab_size: int | None, note: Callable[[str], None]) -> TokenData:
    vocab_size = section.vocab_size or (None if section.tokenizer else vocab_size or 4096)
    return prepare(
        section.source, tokenizer=section.tokenizer, vocab_size=vocab_size, held_out=section.held_out, progress=note
    )


def _refuse_difference(path: Path, held: Recipe, wanted: Recipe) -> None:
    """Name the first field of model, data or batch order that differs."""
    fixed = ("seq_len", "source", "tokenizer", "vocab_size", "held_out", "separate_documents")
    pairs = [(f"data.{name}", getattr(held.data, name), getattr(wanted.data, name)) for name in fixed]
    pairs += [(f"train.{name}", getattr(held.train, name), getattr(wanted.train, name)) for name in ("batch", "seed")]
    pairs += [(f"model.{name}", held.model.get(name), value) for name, value in wanted.model.items() if name != "from"]
    pairs += [("optimizer.name", held.optimizer.name, wanted.optimizer.name)]
    for name, before, now in pairs:
        if isinstance(now, dict) and isinstance(before, dict):
            before = {k: before.get(k) for k in now}
        if now != before:
            raise UsageError(f"--resume {path}: {name} is {now!r}, but the run began with {before!r}: start a new run instead")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
