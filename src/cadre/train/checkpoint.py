"""Checkpoints: everything a run needs to go on bit for bit, as data files that appear whole or not at all.

checkpoints/step-00000500/weights.safetensors     float32 masters and router biases
                          optimizer.safetensors   moments by parameter name
                          state.json              step, data position, schedule, identity of model and data, checksums of
                                                  the other files, and its own
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cadre.errors import UsageError, write_error
from cadre.files import checksum, replace_file, sync
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from cadre.train.optimizer import Optimizer

_NAME = re.compile(r"step-(\d{8})")
_OWN = "checksum"  # in state.json: that of all else in it


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint holds beside plain values, by name: `weights`, parameters and router biases, a shared one once;
    `moments`, the optimizer's state. Of several processes each has its part."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name))


def save_checkpoint(run_dir: Path, tensors: Tensors, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint for `state["step"]` beside the others, then drop all but the newest `keep`; of one that is there only
    the plain state, for a step has one set of tensors.

    Raises `RunError` when the disk is full; the previous checkpoints stay as they were.
    """
    folder = run_dir / "checkpoints"
    final = folder / name_of(state["step"])
    with _whole(folder / f".partial-{os.getpid()}", final) as partial:
        if final.exists():
            renew(final, state)
            return final
        begin(partial)
        _write_tensors(tensors.weights, partial / "weights.safetensors")
        _write_tensors(tensors.moments, partial / "optimizer.safetensors")
        publish(partial, final, state, {file.name: checksum(file) for file in partial.iterdir()}, keep)
    return final


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def _whole(partial: Path, final: Path) -> Iterator[Path]:
    try:
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_error(f"{final}: checkpoint not written, earlier checkpoints are intact", error) from None


def begin(partial: Path) -> None:
    """Make the folder that a checkpoint is written to, and clear away what others have left half done. Raises OSError."""
    partial.parent.mkdir(exist_ok=True)
    for stale in partial.parent.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()


def publish(partial: Path, final: Path, state: dict[str, Any], files: dict[str, Any], keep: int) -> None:
    """Complete a checkpoint whose tensors are written in `files`, by name their `checksum`, give it its name, and drop older
    ones. Raises OSError."""
    replace_file(partial / "state.json", _state_file(state, files))
    sync(partial)
    partial.replace(final)
    sync(final.parent)
    for old in checkpoints(final.parent.parent)[:-keep]:
        # Renamed first: what a crash leaves of it must not look like a checkpoint.
        with suppress(OSError):
            shutil.rmtree(old.rename(final.parent / f".partial-{old.name}"))


def renew(final: Path, state: dict[str, Any]) -> None:
    """Have a checkpoint say what has become known since of its step, such as the evaluation that ends a run. Raises OSError."""
    file, content = final / "state.json", _state_file(state, read_state(final)["checksums"])
    if file.read_bytes() != content:
        replace_file(file, content)


def _state_file(state: dict[str, Any], files: dict[str, Any]) -> bytes:
    state = {**state, "checksums": files}
    return json.dumps({**state, _OWN: _own_checksum(state)}, indent=1).encode()


def read_state(path: Path) -> dict[str, Any]:
    """The plain part of a checkpoint. Raises `UsageError` if it cannot be read or is not as it was written."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or _OWN not in state:
            raise ValueError("state.json has no checksum")
        if state.pop(_OWN) != _own_checksum(state):
            raise ValueError("state.json is not as it was written")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(path, error) from None


def _own_checksum(state: dict[str, Any]) -> str:
    """Of all else in `state.json`, however it is laid out."""
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def set_aside_damaged(run_dir: Path, note: Callable[[str], None]) -> None:
    """Make the newest checkpoint one that is whole: give those that have been damaged since they were written another name,
    `damaged-step-...`. Raises `UsageError` if none is whole."""
    found, damages = checkpoints(run_dir), []
    while found:
        try:
            _check_files(found[-1])
            break
        except DamagedError as error:
            damages.append((found.pop(), error))
    if damages and not found:
        raise damages[0][1]
    for path, damage in damages:
        aside = path.with_name(f"damaged-{path.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as refused:
            raise write_error(f"{path}: damaged, and cannot be set aside", refused) from None
        note(f"{damage.what}: set aside as {aside.name}, going on from {found[-1].name}")


def _check_files(path: Path) -> None:
    state = read_state(path)
    for name, written in state["checksums"].items():
        file = path / name
        if not file.is_file():
            raise DamagedError(path, f"{name} is missing")
        try:
            intact = checksum(file) == written
        except OSError as error:
            raise DamagedError(path, f"{name} cannot be read: {error.strerror or error}") from None
        if not intact:
            raise DamagedError(path, f"{name} is not as it was written")


def load_checkpoint(path: Path, model: Transformer, optimizer: Optimizer) -> None:
    """Fill model and optimizer from a checkpoint, bit for bit. Raises `UsageError` if its files are damaged or foreign."""
    if not (path / "weights.safetensors").is_file() and any(path.glob("shard-*.safetensors")):
        # Several processes have written it.
        from cadre.train.parallel.checkpoint import load_parts

        load_parts(path, model_tensors(model), optimizer, lambda _, tensor: tensor)
        return
    try:
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise DamagedError(path, error) from None
    own = model_tensors(model)
    if weights.keys() != own.keys() or any(weights[k].shape != own[k].shape for k in own):
        raise UsageError(f"{path}: its weights are not those of the model in recipe.toml")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    try:
        optimizer.load_tensors(moments)
    except KeyError as error:
        raise UsageError(f"{path}: its optimizer state is not that of this model and optimizer (no {error})") from None


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and router biases by name, a shared one once."""
    tensors = dict(model.state_dict(keep_vars=False))
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


class DamagedError(UsageError):
    """`what`: the message without the advice."""

    def __init__(self, path: Path, reason: object) -> None:
        self.what = f"{path}: damaged checkpoint ({reason})"
        super().__init__(f"{self.what}; delete this folder to go on without it")


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
