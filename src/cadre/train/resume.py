"""Going on with a run: from which checkpoint, and only with what it began with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cadre.errors import UsageError
from cadre.hub.directory import model_directory, recover
from cadre.model.config import ModelConfig
from cadre.train.boards import check_wandb
from cadre.train.checkpoint import checkpoints, name_of, read_state, set_aside_damaged, step_of
from cadre.train.checks import say_slow
from cadre.train.metrics import last_record
from cadre.train.parallel.auto import device_here
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import Recipe, TrainSection, read_recipe
from cadre.train.run import BEGUN_WITH, Run, computing_in, dtype_of, only_writer, prepare_data, ready, write_recipe


class FinishedError(UsageError):
    """There is nothing to resume."""


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
    parallel.require_same(wanted)
    here = device_here(device, parallel)
    held = held_recipe(path)
    if "vocab_size" not in held.model:
        raise UsageError(f"--resume {path}: is no run directory (model.vocab_size is missing in its recipe.toml)")
    dtype = dtype_of(held.train.dtype if wanted.train.dtype == "auto" else wanted.train.dtype, device, parallel)
    wanted = computing_in(wanted, dtype)
    with parallel.in_turn():
        _refuse_difference(path, held, wanted)
        if parallel.main:
            check_wandb(wanted.train.wandb)
            with only_writer(path):  # what another process trains must stay as it is
                set_aside_damaged(path, note)
                for folder in ("model", "best"):
                    recover(path / folder)
    newest = _newest(path, parallel)
    state = None if newest is None else read_state(newest)
    # Before any text is read for a run that has ended.
    total_steps, other_length = (wanted.train.most_steps, False) if state is None else _length(path, state, wanted.train)
    with parallel.in_turn():
        data_section = held.data.model_copy(update={"weights": wanted.data.weights or held.data.weights})
        recipe = wanted.model_copy(update={"model": held.model, "data": data_section, "name": held.name})
        data = prepare_data(recipe.data, recipe.model["vocab_size"], note, parallel)
        config = recipe.config(recipe.model["vocab_size"])
        recipe, batches = ready(recipe, config, data, device, here, note, parallel)
    source = _source(path) if newest is None else None
    say_slow(config, dtype, device, note)
    model = parallel.build(config, device, None if newest else wanted.train.seed, source)
    run = Run(path, recipe, config, data, batches, model, dtype, newest, total_steps, parallel, source)
    if state is not None:
        _refuse_other_identity(path, run.identity(), state["identity"])
    if other_length and (by_length := _by_length(recipe, config)):
        note(f"the run's length has changed, and with it {' and '.join(by_length)}")
    if parallel.main:
        with only_writer(path):
            write_recipe(path, recipe, wanted.parallel)
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


def _length(path: Path, state: dict[str, Any], train: TrainSection) -> tuple[int, bool]:
    """The step that a run ends with, and whether its length is another than when the checkpoint was written. Raises
    `FinishedError` if it has ended."""
    other = state["length"] != [train.steps, train.minutes]
    total_steps = _expected_steps(path, state, train) if other else state["total_steps"]
    if state["step"] >= total_steps and _ended(path):
        raise FinishedError(f"--resume {path}: has already finished its {state['step']} steps: give more with --steps")
    return total_steps, other


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


def _by_length(recipe: Recipe, config: ModelConfig) -> list[str]:
    """What of a run depends on how long it is."""
    found = [f"what remains of its {recipe.schedule.kind} schedule"] if recipe.schedule.kind != "constant" else []
    if config.num_nextn_predict_layers and recipe.train.mtp_weight_final is not None:
        found.append("where train.mtp_weight_final begins")
    return found


def _newest(path: Path, parallel: Parallel) -> Path | None:
    """The newest checkpoint, as the main process sees the disk: others may see it later. It has set damaged ones aside."""
    found = checkpoints(path)
    step = parallel.agree(step_of(found[-1]) if found else -1)
    return None if step < 0 else path / "checkpoints" / name_of(int(step))


def _ended(path: Path) -> bool:
    """Whether a run's last words are written: a crash may fall between its last step and those."""
    last = last_record(path)
    return last is not None and last.get("event") == "finished" and (path / "report.html").is_file()


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
