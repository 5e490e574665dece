"""A run directory: what is in it, who may write to it, and whether it can go on.

recipe.toml      every choice resolved, but for "auto" in [parallel], which is chosen anew by whoever goes on
from.txt         of a run that began with a model, where that lies
model/           the model so far, in the Hugging Face layout
best/            with checkpoint.best, the model whose held-out loss was lowest
checkpoints/     what `--resume` continues from
metrics.jsonl    one object per logged step; tensorboard/ has the same
report.html      the run on one page
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from cadre.data.batches import Batches
from cadre.data.shards import TokenData, prepare
from cadre.errors import UsageError, write_error
from cadre.files import replace_file, require_folder
from cadre.hub.directory import load_config, model_directory
from cadre.hub.save import check_expressible
from cadre.hub.tokenizer import check_vocabulary, load_tokenizer, special_ids, tokenizer_hash
from cadre.kernels.card import multiplies_fp8
from cadre.kernels.limits import training_dtype
from cadre.kernels.memory import total_bytes
from cadre.model.config import ModelConfig
from cadre.model.scoring import document_start
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.plan.memory import state_bytes
from cadre.plan.shape import Shape
from cadre.train.checkpoint import checkpoints, name_of, read_state, set_aside_damaged, step_of
from cadre.train.metrics import folder_gone, read_metrics
from cadre.train.parallel.auto import device_here, settle
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import DataSection, ParallelSection, Recipe, TrainSection, read_recipe

BEGUN_WITH = "from.txt"


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
        own = self.path / "model"
        return own if own.is_dir() and (self.path / BEGUN_WITH).is_file() else self.source

    def identity(self) -> dict[str, Any]:
        """What must not change between checkpoint and resume."""
        corpus = self.data.manifest["inputs"]["text"]
        return {"model": self.config.to_hf(), "tokenizer": tokenizer_hash(self.data.tokenizer), "corpus": corpus}


def start(
    recipe: Recipe, path: Path, device: torch.device, note: Callable[[str], None], parallel: Parallel | None = None
) -> Run:
    """Prepare a new run in `path`. Raises `UsageError` if `path` holds anything already, or the recipe cannot be run."""
    parallel = parallel or Parallel()
    here = device_here(device, parallel)
    dtype = _dtype(recipe.train.dtype, device, parallel)
    recipe = _computing_in(recipe, dtype)
    with parallel.in_turn():
        if parallel.main:
            refuse_used(path)
            _require_folder(path)
        words = recipe.model.get("vocab_size") or recipe.data.vocab_size
        if words is not None and "from" not in recipe.model:  # before text is prepared for what cannot be
            check_memory(recipe.config(words), device, recipe.optimizer.name, parallel.size)
            if not recipe.parallel.open:
                parallel.check(recipe, recipe.config(words))
            if recipe.train.fp8_experts:
                check_fp8(recipe.config(words), device)
        source = model_directory(recipe.model["from"]) if "from" in recipe.model else None
        begun = None if source is None else _begun(recipe, source)
        data_section = recipe.data
        if source is not None and data_section.tokenizer is None and data_section.vocab_size is None:
            data_section = data_section.model_copy(update={"tokenizer": str(source)})
        data = _prepare(data_section, recipe.model.get("vocab_size"), note, parallel)
        if source is not None:
            _check_tokenizer(source, data.tokenizer)
        config = begun or _config(recipe, data)
        check_vocabulary(data.tokenizer, config.vocab_size)
        check_expressible(config)
        asked = recipe.parallel
        recipe = settle(recipe, config, parallel.size, here, note)
        parallel.check(recipe, config)
        if recipe.train.fp8_experts:
            check_fp8(config, device)
            if device.type == "cpu":
                note("no processor multiplies FP8: experts compute the same in float32, which takes several times as long")
        check_memory(config, device, recipe.optimizer.name, parallel.size, parallel.layout.replicas)
        _check_samples(recipe, config, data)
        _advise(recipe, config, note)
        batches = _batches(recipe, config, data, parallel)
    _say_slow(config, note)
    model = parallel.build(config, device, recipe.train.seed, source)
    resolved = recipe.model_copy(update={"data": data_section, "model": config.model_dump(exclude_none=True)})
    if parallel.main:
        _write_recipe(path, resolved, asked, source)
    return Run(path, resolved, config, data, batches, model, dtype, None, recipe.train.most_steps, parallel, source)


def _check_tokenizer(source: Path, tokenizer: Tokenizer) -> None:
    """Refuse another tokenizer than that of the model that training goes on with: every embedding would mean another token."""
    own = source / "tokenizer.json"
    if own.is_file() and tokenizer_hash(load_tokenizer(own)) != tokenizer_hash(tokenizer):
        raise UsageError(f"model.from {source}: the data has another tokenizer: leave data.tokenizer and data.vocab_size out")


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
            config = ModelConfig.from_dict({**held, **changed})
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


def check_memory(
    config: ModelConfig, device: torch.device, optimizer: str = "adamw", processes: int = 1, replicas: int = 1,
    beside: ModelConfig | None = None,
) -> None:  # fmt: skip
    """Refuse a model whose float32 masters, gradients and optimizer states alone, `replicas` times, exceed the memory of the
    machines, or of the accelerators, that `processes` share. `beside`: a model that is trained at the same time."""
    parameters = count(config).total_parameters
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    held = total_bytes(device) * (processes // sharing)
    need = state_bytes(Shape.from_config(config), optimizer) * replicas
    times = "" if replicas == 1 else f" of {replicas} replicas"
    if beside is not None:
        need += state_bytes(Shape.from_config(beside), optimizer)
        times = f", and of the model of {count(beside).total_parameters:,} parameters beside it"
    if need > held:
        raise UsageError(
            f"the model has {parameters:,} parameters: training takes {need / 2**30:,.0f} GiB for weights, "
            f"gradients and moments{times}, but there are {held / 2**30:,.0f} GiB; choose a smaller model"
        )


class FinishedError(UsageError):
    """There is nothing to resume."""


def check_fp8(config: ModelConfig, device: torch.device, what: str = "train.fp8_experts") -> None:
    """Refuse experts in FP8 for a model without experts, and on a card without FP8."""
    if not config.has_experts:
        raise UsageError(f"{what}: the model has no experts")
    if device.type == "cuda" and not multiplies_fp8(device):
        raise UsageError(
            f"{what}: needs Triton and a card that multiplies FP8 (compute capability 8.9 or higher): leave it out"
        )


def held_recipe(path: Path) -> Recipe:
    """The recipe of the run in `path`. Raises `UsageError` if there is no run."""
    file = path / "recipe.toml"
    if not file.is_file():
        raise UsageError(f"--resume {path}: is no run directory (it has no recipe.toml)")
    return read_recipe(str(file))


def resume(
    path: Path, wanted: Recipe, device: torch.device, note: Callable[[str], None], parallel: Parallel | None = None
) -> Run:
    """Open a run to continue it from its newest checkpoint that is whole, or from the start if it has none.

    `wanted` may differ from the run's recipe in how training goes on, as in the weights of sources, but not in the model, its
    data or the batches: a difference there raises `UsageError` and is named. A run that has ended raises `FinishedError`.
    """
    parallel = parallel or Parallel()
    here = device_here(device, parallel)
    held = held_recipe(path)
    if "vocab_size" not in held.model:
        raise UsageError(f"--resume {path}: is no run directory (model.vocab_size is missing in its recipe.toml)")
    dtype = _dtype(held.train.dtype if wanted.train.dtype == "auto" else wanted.train.dtype, device, parallel)
    wanted = _computing_in(wanted, dtype)
    with parallel.in_turn():
        _refuse_difference(path, held, wanted)
        if parallel.main:
            with only_writer(path):  # what another process trains must stay as it is
                set_aside_damaged(path, note)
        data_section = held.data.model_copy(update={"weights": wanted.data.weights or held.data.weights})
        recipe = wanted.model_copy(update={"model": held.model, "data": data_section, "name": held.name})
        data = _prepare(recipe.data, recipe.model["vocab_size"], note, parallel)
        config = recipe.config(recipe.model["vocab_size"])
        check_vocabulary(data.tokenizer, config.vocab_size)
        recipe = settle(recipe, config, parallel.size, here, note)
        parallel.check(recipe, config)
        if recipe.train.fp8_experts:
            check_fp8(config, device)
        check_memory(config, device, recipe.optimizer.name, parallel.size, parallel.layout.replicas)
        batches = _batches(recipe, config, data, parallel)
    newest, train = _newest(path, parallel), wanted.train
    source = _source(path) if newest is None else None
    _say_slow(config, note)
    model = parallel.build(config, device, None if newest else train.seed, source)
    run = Run(path, recipe, config, data, batches, model, dtype, newest, train.most_steps, parallel, source)
    if run.checkpoint is not None:
        state = read_state(run.checkpoint)
        _refuse_other_identity(path, run.identity(), state["identity"])
        if state["length"] == [train.steps, train.minutes]:
            run.total_steps = state["total_steps"]
        else:
            run.total_steps = _expected_steps(path, state, train)
            if recipe.schedule.kind != "constant":
                note(f"the run's length has changed, and with it what remains of its {recipe.schedule.kind} schedule")
        if state["step"] >= run.total_steps and _ended(path):
            raise FinishedError(f"--resume {path}: has already finished its {state['step']} steps: give more with --steps")
    if parallel.main:
        with only_writer(path):
            _write_recipe(path, recipe, wanted.parallel)
    return run


def _source(path: Path) -> Path | None:
    """The model directory that the run began with, if it did. Raises `UsageError` if that is no longer there."""
    file = path / BEGUN_WITH
    if not file.is_file():
        return None
    try:
        return model_directory(file.read_text(encoding="utf-8").rstrip("\n"))
    except (OSError, UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"--resume {path}: ended before its first checkpoint, and began with a model: {error}") from None


def _expected_steps(path: Path, state: dict[str, Any], train: TrainSection) -> int:
    """Where a run will end that has another length now: by its minutes, at the pace it has had. They count from its start.
    Raises `FinishedError` if they are over."""
    if train.minutes is None or not state["step"]:
        return train.most_steps
    spent, given = state["seconds"], train.minutes * 60
    if spent >= given:
        raise FinishedError(
            f"--resume {path}: has taken {spent / 60:.1f} minutes already, and {train.minutes:.1f} are given in all: give more"
        )
    return min(train.most_steps, max(state["step"] + 1, int(state["step"] * given / spent)))


def _newest(path: Path, parallel: Parallel) -> Path | None:
    """The newest checkpoint, as the main process sees the disk: others may see it later. It has set damaged ones aside."""
    found = checkpoints(path)
    step = parallel.agree(step_of(found[-1]) if found else -1)
    return None if step < 0 else path / "checkpoints" / name_of(int(step))


def _ended(path: Path) -> bool:
    """Whether a run's last words are written: a crash may fall between its last step and those."""
    records = read_metrics(path)
    return bool(records) and records[-1].get("event") == "finished" and (path / "report.html").is_file()


# Models that take more than some seconds to build.
_DEEP, _LARGE = 1000, 10**9


def _say_slow(config: ModelConfig, note: Callable[[str], None]) -> None:
    """What would else be a long silence: a model being built, and its first step."""
    blocks, parameters = config.num_hidden_layers, count(config).total_parameters
    if blocks >= _DEEP or parameters >= _LARGE:
        note(f"building the model: {blocks:,} blocks, {parameters / 1e6:,.0f}M parameters; its first steps take long, too")


def _advise(recipe: Recipe, config: ModelConfig, note: Callable[[str], None]) -> None:
    """Say what is allowed and hardly meant."""
    schedule, balance = recipe.schedule, recipe.balance
    if recipe.train.steps is not None and schedule.warmup_steps >= recipe.train.steps:
        note(f"the rate warms up over {schedule.warmup_steps} steps, all of this run: schedule.warmup_steps sets fewer")
    losses = (balance.sequence_weight, balance.batch_weight, balance.global_weight)
    biased = config.scoring_func == "sigmoid" and balance.use_bias and balance.bias_update != "none" and balance.bias_speed > 0
    if config.has_experts and not biased and not any(losses):
        why = " (routers of deepseek_v2 own no bias)" if config.scoring_func == "softmax" else ""
        note(f"nothing keeps the experts evenly used{why}: balance.sequence_weight=0.001 would")


def _check_samples(recipe: Recipe, config: ModelConfig, data: TokenData) -> None:
    """Refuse now what would fail when the model is scored and sampled."""
    document_start(config, data.tokenizer)
    for prompt in recipe.eval.prompts:
        length = len(data.tokenizer.encode(prompt).ids)
        if length >= config.max_position_embeddings:
            raise UsageError(
                f"eval.prompts: {prompt[:20]!r}... has {length} tokens; the model's context (max_position_embeddings) "
                f"is {config.max_position_embeddings}"
            )


def _computing_in(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})})


def _dtype(choice: str, device: torch.device, parallel: Parallel) -> torch.dtype:
    if choice != "auto":
        return getattr(torch, choice)
    narrow = parallel.agree(parallel.main and training_dtype(device) == torch.bfloat16)
    return torch.bfloat16 if narrow else torch.float32


def _batches(recipe: Recipe, config: ModelConfig, data: TokenData, parallel: Parallel) -> Batches:
    weights = recipe.data.weights
    return Batches(
        *([data.train] if weights is None else data.train_of_each()),
        weights=weights,
        batch=recipe.train.batch,
        seq_len=recipe.data.seq_len,
        extra=1 + config.num_nextn_predict_layers,
        seed=recipe.train.seed,
        separate_documents=recipe.data.separate_documents,
        part=parallel.part,
    )


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


def _prepare(section: DataSection, vocab_size: int | None, note: Callable[[str], None], parallel: Parallel) -> TokenData:
    vocab_size = section.vocab_size or (None if section.tokenizer else vocab_size)
    make = partial(prepare, section.source, tokenizer=section.tokenizer, vocab_size=vocab_size, held_out=section.held_out)
    return parallel.prepared(partial(make, progress=note))


def _refuse_difference(path: Path, held: Recipe, wanted: Recipe) -> None:
    """Name the first field of model, data or batch order that differs; what `wanted` leaves open is no difference."""
    pairs = [(f"model.{name}", held.model.get(name), value) for name, value in wanted.model.items() if name != "from"]
    if held.data.weights is None or wanted.data.weights is None:  # else others are welcome
        pairs.append(("data.weights", held.data.weights, wanted.data.weights or held.data.weights))
    fixed = ((name, value) for name, value in wanted.data if value is not None and name != "weights")
    pairs += [(f"data.{name}", getattr(held.data, name), value) for name, value in fixed]
    pairs += [(f"train.{name}", getattr(held.train, name), getattr(wanted.train, name)) for name in ("batch", "seed")]
    pairs += [("optimizer.name", held.optimizer.name, wanted.optimizer.name)]
    for name, before, now in pairs:
        if isinstance(now, dict) and isinstance(before, dict):
            before = {k: before.get(k) for k in now}
        if now != before:
            raise UsageError(f"--resume {path}: {name} is {now!r}, but the run began with {before!r}: start a new run instead")


def _refuse_other_identity(path: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    for field in sorted({*now["model"], *then["model"]}):
        here, before = now["model"].get(field), then["model"].get(field)
        if here != before:
            raise UsageError(f"--resume {path}: model.{field} is {here}, but the checkpoint was trained with {before}")
    for what, remedy in (("corpus", "text"), ("tokenizer", "tokenizer file")):
        if now[what] != then[what]:
            raise UsageError(
                f"--resume {path}: the {what} has changed (now {now[what][:12]}, checkpoint {then[what][:12]}): restore the "
                f"{remedy} that the run began with"
            )


def _write_recipe(path: Path, recipe: Recipe, asked: ParallelSection, source: Path | None = None) -> None:
    """With the layout that was asked for: an "auto" is chosen anew by whoever goes on. `source`: what the run begins with."""
    recipe = recipe.model_copy(update={"parallel": asked})
    try:
        path.mkdir(parents=True, exist_ok=True)
        if source is not None:
            replace_file(path / BEGUN_WITH, f"{source.resolve()}\n".encode())
        replace_file(path / "recipe.toml", recipe.to_toml().encode("utf-8"))
    except OSError as error:
        raise write_error(f"{path}: cannot be written", error) from None
