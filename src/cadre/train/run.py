"""A run directory: what is in it, how it begins, and who may write to it. (`cadre.train.resume`: whether it can go on.)

recipe.toml      every choice resolved, but for "auto" in [parallel], which is chosen anew by whoever goes on
from.txt         of a run that began with a model, where that lies
model/           the model so far, in the Hugging Face layout
best/            with checkpoint.best, the model whose held-out loss was lowest
checkpoints/     what `--resume` continues from
metrics.jsonl    one object per logged step; tensorboard/ has the same
wandb.txt        with train.wandb, the run's id there; wandb/ keeps what is not sent yet
report.html      the run on one page
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from cadre.data.batches import Batches
from cadre.data.prepare import prepare
from cadre.data.shards import TokenData
from cadre.data.sources import SOTU
from cadre.errors import UsageError, writing
from cadre.files import replace_file, require_folder
from cadre.hub.directory import ending_at, load_config, model_directory
from cadre.hub.save import check_expressible
from cadre.hub.template import chat_template
from cadre.hub.tokenizer import check_vocabulary, load_tokenizer, special_ids, tokenizer_hash
from cadre.kernels.limits import dtype_name, training_dtype
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.plan.hardware import Device
from cadre.train.boards import check_wandb
from cadre.train.checks import advise, check_fp8, check_memory, check_samples, say_slow
from cadre.train.metrics import folder_gone
from cadre.train.parallel.auto import device_here, settle
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import ANY_VOCABULARY, DataSection, ParallelSection, Recipe

BEGUN_WITH = "from.txt"
# Samples at the end of a run, the letters that each begins with, and documents that are looked at for their beginnings.
_SAMPLES, _LETTERS, _MOST_READ = 3, 32, 100


@dataclass
class Run:
    """A run ready to train: recipe resolved, data prepared, model built (model and batches are not yet restored from
    `checkpoint`). `total_steps`: where it ends, unless the recipe's minutes end sooner. `source`: the model
    directory that it begins with."""

    path: Path
    recipe: Recipe
    config: ModelConfig
    data: TokenData
    batches: Batches
    model: Transformer
    dtype: torch.dtype
    checkpoint: Path | None
    total_steps: int
    parallel: Parallel
    source: Path | None = None

    def like(self) -> Path | None:
        """The model directory whose chat template and settings of generation this run's model keeps: what it has written so
        far, or the model that it began with; None of a run that began with none."""
        begun, own = self.path / BEGUN_WITH, self.path / "model"
        if not begun.is_file():
            return self.source
        if own.is_dir():
            return own
        return self.source or Path(begun.read_text(encoding="utf-8").rstrip("\n"))

    def prompts(self) -> list[str]:
        """What the samples at the end begin with: as the recipe says, else as the text does."""
        data, asked = self.data, self.recipe.eval.prompts
        if asked is not None:
            return asked
        if data.chat_template is not None:
            return ["Hello", "Who are you?"]
        if self.recipe.data.sources == [SOTU]:
            return ["The", "Fellow citizens", "Our"]
        words = dict.fromkeys(_first_words(document.text) for document in islice(data.read_held_out(), _MOST_READ))
        context = self.config.max_position_embeddings
        fitting = [text for text in words if text and len(data.tokenizer.encode(text).ids) < context]
        return fitting[:_SAMPLES] or ["The"]

    def identity(self) -> dict[str, Any]:
        """What must not change between checkpoint and resume."""
        corpus = self.data.manifest["inputs"]["text"]
        return {"model": self.config.to_hf(), "tokenizer": tokenizer_hash(self.data.tokenizer), "corpus": corpus}


def _first_words(text: str) -> str:
    """Of its first line, whole words of at most some letters; a longer first word is cut."""
    line = text.strip().partition("\n")[0].rstrip()
    words = line[: _LETTERS + 1].rsplit(maxsplit=1)
    return words[0] if len(line) > _LETTERS and len(words) == 2 else line[:_LETTERS]


def start(
    recipe: Recipe, path: Path, device: torch.device, note: Callable[[str], None], parallel: Parallel | None = None
) -> Run:
    """Prepare a new run in `path`. Raises `UsageError` if `path` holds anything already, or the recipe cannot be run."""
    parallel = parallel or Parallel()
    parallel.require_same(recipe)
    here = device_here(device, parallel)
    dtype = dtype_of(recipe.train.dtype, device, parallel)
    recipe = computing_in(recipe, dtype)
    with parallel.in_turn():
        if parallel.main:
            refuse_used(path)
            _require_folder(path)
            check_wandb(recipe.train.wandb)
        source = model_directory(recipe.model["from"]) if "from" in recipe.model else None
        begun = None if source is None else _begun(recipe, source)
        _check_before_text(recipe, begun, device, parallel)
        data_section = recipe.data
        if source is not None and data_section.tokenizer is None and data_section.vocab_size is None:
            data_section = data_section.model_copy(update={"tokenizer": str(source)})
        data = prepare_data(data_section, recipe.model.get("vocab_size"), note, parallel)
        if source is not None:
            _check_tokenizer(source, data.tokenizer)
            _check_template(source, data)
        config = ending_at(begun or _config(recipe, data), data.answer_ends)
        check_expressible(config)
        asked = recipe.parallel
        recipe, batches = ready(recipe, config, data, device, here, note, parallel)
        if recipe.train.fp8_experts and device.type == "cpu":
            note("no processor multiplies FP8: experts compute the same in float32, which takes several times as long")
        advise(recipe, config, note)
    say_slow(config, dtype, device, note)
    model = parallel.build(config, device, recipe.train.seed, source)
    resolved = recipe.model_copy(update={"data": data_section, "model": config.model_dump(exclude_none=True)})
    if parallel.main:
        _begin(path, resolved, asked, source)
    return Run(path, resolved, config, data, batches, model, dtype, None, recipe.train.most_steps, parallel, source)


def _check_before_text(recipe: Recipe, begun: ModelConfig | None, device: torch.device, parallel: Parallel) -> None:
    """Refuse what cannot be trained here before text is prepared for it: a layout that no text makes possible, and a model that
    is too large, of a new one if the recipe says its vocabulary. `begun`: the model that training goes on with."""
    words = recipe.model.get("vocab_size") or recipe.data.vocab_size
    config = begun or recipe.config(words or ANY_VOCABULARY)
    if begun or words:
        check_memory(config, device, recipe.optimizer.name, parallel.size)
    if recipe.parallel.open:
        recipe.parallel.degrees()
    else:
        parallel.check(recipe, config)
    if recipe.train.fp8_experts:
        check_fp8(config, device)


def _check_tokenizer(source: Path, tokenizer: Tokenizer) -> None:
    """Refuse another tokenizer than that of the model that training goes on with: every embedding would mean another token."""
    own = source / "tokenizer.json"
    if own.is_file() and tokenizer_hash(load_tokenizer(own)) != tokenizer_hash(tokenizer):
        raise UsageError(f"model.from {source}: the data has another tokenizer: leave data.tokenizer and data.vocab_size out")


def _check_template(source: Path, data: TokenData) -> None:
    """Refuse conversations that are written otherwise than those that the model will be asked to continue."""
    if data.chat_template is None:
        return
    own = chat_template(source)
    if own is not None and not own.untrained and not own.writes_as(data.chat_template):
        raise UsageError(
            f"model.from {source}: the conversations are written by another chat template than the model's: prepare them with "
            "its tokenizer, or take its template away"
        )


def refuse_used(path: Path) -> None:
    """Raise `UsageError` unless a new run may begin in `path`: there is nothing yet, or an empty folder."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            held = "another run: continue it with --resume, or" if (path / "recipe.toml").is_file() else "other files:"
            raise UsageError(f"--out {path}: holds {held} choose an empty folder")
    except OSError as error:
        raise _unusable(path, error) from None


def _require_folder(path: Path) -> None:
    try:
        require_folder(path)
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"--out {path}: cannot be used ({error.strerror}): choose another folder")


def continued(recipe: Recipe) -> ModelConfig:
    """The config of the model that `model.from` names, as far as its positions are to reach. Raises `UsageError`."""
    source = model_directory(recipe.model["from"])
    config = stored = load_config(source)
    changed = {name: value for name, value in recipe.model.items() if name != "from"}
    if changed:
        held = stored.model_dump(exclude_none=True)
        rope = changed.get("rope_parameters")
        if isinstance(rope, dict):
            changed["rope_parameters"] = {**held.get("rope_parameters", {}), **rope}
        try:
            config = ModelConfig(**{**held, **changed})
        except UsageError as error:
            raise UsageError(f"model.{error}") from None
        if config.rotary_dim != stored.rotary_dim:
            raise UsageError("model.rope_parameters: another partial_rotary_factor would make another model of it")
    if config.max_position_embeddings < recipe.data.seq_len:
        raise UsageError(
            f"data.seq_len is {recipe.data.seq_len}; it must be at most max_position_embeddings of {source} "
            f"({config.max_position_embeddings}), or of [model] beside from"
        )
    return config


def _begun(recipe: Recipe, source: Path) -> ModelConfig:
    """The config of the model that training goes on with, and whether the recipe suits it, before any text is read."""
    config = continued(recipe)
    if recipe.data.tokenizer is not None:
        _check_tokenizer(source, load_tokenizer(recipe.data.tokenizer))
    return config


def _config(recipe: Recipe, data: TokenData) -> ModelConfig:
    """A new model's config, now that its vocabulary is known."""
    bos, eos = special_ids(data.tokenizer)
    try:
        return recipe.config(recipe.model.get("vocab_size") or data.vocab_size, bos_token_id=bos, eos_token_id=eos)
    except ValueError as error:
        raise UsageError(str(error)) from None


def computing_in(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """The recipe with this dtype in `train`, in the place of "auto"."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": dtype_name(dtype)})})


def dtype_of(choice: str, device: torch.device, parallel: Parallel) -> torch.dtype:
    """What `train.dtype` comes to here; "auto" is the main process's choice."""
    if choice != "auto":
        return getattr(torch, choice)
    narrow = parallel.agree(parallel.main and training_dtype(device) == torch.bfloat16)
    return torch.bfloat16 if narrow else torch.float32


def ready(
    recipe: Recipe, config: ModelConfig, data: TokenData, device: torch.device, here: Device, note: Callable[[str], None],
    parallel: Parallel,
) -> tuple[Recipe, Batches]:  # fmt: skip
    """The recipe with its layout settled, and this process's part of the batches, from the first on. Raises `UsageError` for
    what cannot be trained, whether the run is new or goes on."""
    check_vocabulary(data.tokenizer, config.vocab_size)
    recipe = settle(recipe, config, parallel.size, here, note)
    parallel.check(recipe, config)
    if recipe.train.fp8_experts:
        check_fp8(config, device)
    check_memory(config, device, recipe.optimizer.name, parallel.size, parallel.layout.replicas)
    check_samples(recipe, config, data)
    weights = recipe.data.weights
    batches = Batches(
        *([data.train] if weights is None else data.train_of_each()),
        weights=weights,
        batch=recipe.train.batch,
        seq_len=recipe.data.seq_len,
        extra=1 + config.num_nextn_predict_layers,
        seed=recipe.train.seed,
        separate_documents=recipe.data.separate_documents,
        part=parallel.batch_part,
    )
    return recipe, batches


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep others from training the run meanwhile. Raises `UsageError` if one is at it; a killed one holds nothing. Raises
    `RunError` if somebody has removed the folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise folder_gone(path) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path}: another process is training this run: wait for it or stop it") from None
        yield
    finally:
        os.close(handle)


def prepare_data(section: DataSection, vocab_size: int | None, note: Callable[[str], None], parallel: Parallel) -> TokenData:
    """The section's text as tokens. `vocab_size`: the model's, if its recipe says one."""
    vocab_size = section.vocab_size or (None if section.tokenizer else vocab_size)
    make = partial(prepare, section.source, tokenizer=section.tokenizer, vocab_size=vocab_size, held_out=section.held_out)
    return parallel.prepared(partial(make, progress=note))


def _begin(path: Path, recipe: Recipe, asked: ParallelSection, source: Path | None) -> None:
    """Write a new run's first files, unless another has begun in the same folder while this one was prepared."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with only_writer(path):
        refuse_used(path)
        write_recipe(path, recipe, asked, source)


def write_recipe(path: Path, recipe: Recipe, asked: ParallelSection, source: Path | None = None) -> None:
    """With the layout that was asked for: an "auto" is chosen anew by whoever goes on. `source`: what the run begins with."""
    recipe = recipe.model_copy(update={"parallel": asked})
    with writing(path):
        if source is not None:
            replace_file(path / BEGUN_WITH, f"{source.resolve()}\n".encode())
        replace_file(path / "recipe.toml", recipe.to_toml().encode("utf-8"))
