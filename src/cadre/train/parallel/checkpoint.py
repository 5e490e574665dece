"""Checkpoints of a model in parts: every process writes what it holds, as safetensors with the place of each part, by torch's
distributed checkpoints; on load any number of processes, one included, reads what it needs of them.

    checkpoints/step-00000500/shard-00002-model-00001-of-00001.safetensors   of process 1: weights, biases, moments
                              state.json                                      as in any checkpoint

The same reader reads the checkpoint of a single process, in which every tensor is whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from cadre.errors import RunError, UsageError
from cadre.files import checksum, sync
from cadre.train.checkpoint import DamagedError, begin, name_of, publish

if TYPE_CHECKING:
    from cadre.train.optimizer import Optimizer
    from cadre.train.parallel.ranks import Ranks


def save_parts(
    ranks: Ranks, run_dir: Path, tensors: dict[str, Tensor], copies: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    """`save_checkpoint`, together. `tensors`: what this process holds, a part of a tensor as a DTensor, of which only the
    place is read; `copies`: their values, in host memory. Raises `RunError` in all processes, naming the one where the disk
    failed; earlier checkpoints stay as they were."""
    final = run_dir / "checkpoints" / name_of(state["step"])
    there = torch.tensor([final.exists()])
    dist.broadcast(there, 0, group=ranks.words)
    if there:
        return
    partial = run_dir / "checkpoints" / ".partial-parts"
    try:
        ranks.together(lambda: begin(partial) if ranks.main else None)
        writer = _Writer(partial, copies)
        ranks.together(lambda: _write(tensors, writer, ranks.words))
        every: list[dict[str, Any]] = [{}] * ranks.size
        dist.all_gather_object(every, writer.files, group=ranks.words)
        files = {name: made for of_rank in every for name, made in of_rank.items()}
        ranks.together(lambda: publish(partial, final, state, files, keep) if ranks.main else None)
    except RunError as error:
        if ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise type(error)(f"{final}: checkpoint not written, earlier checkpoints are intact: {error}") from None


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writes what is this process's to write from `copies`, in one file, whose `checksum` is then in `files`. Torch's own makes
    the bytes of a file twice over in memory first, and no other thread runs while it does."""

    def __init__(self, folder: Path, copies: dict[str, Tensor]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.copies = folder, copies
        self.files: dict[str, Any] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        places = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items if item.tensor_data}
        if places:
            file = self.folder / f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            metadata = {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"}
            save_file({name: self.copies[name] for name in places}, file, metadata=metadata)
            sync(file)
            self.files[file.name] = checksum(file)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written


def _write(tensors: dict[str, Tensor], writer: _Writer, group: dist.ProcessGroup) -> None:
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, cause = _first(error)
        if rank == dist.get_rank():  # the others know of it, and only this one has to say so
            raise cause from None


def load_parts(
    path: Path,
    weights: dict[str, Tensor],
    optimizer: Optimizer,
    part: Callable[[str, Tensor], Tensor],
    group: dist.ProcessGroup | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """Fill `weights` (a DTensor: its part) and the optimizer from a checkpoint, together if there is a group, else alone.
    `part` makes a tensor of the optimizer's, by its name, the part of a whole that it is. `elsewhere`: parameters of which
    only other processes hold anything.

    Raises `UsageError` if the files are damaged, or hold other tensors than those.
    """
    try:
        stored: dict[str, Any] = _reader(path).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise DamagedError(path, error) from None
    sizes = {name: meta.size for name, meta in stored.items()}
    torn = [name for name, meta in stored.items() if sum(chunk.sizes.numel() for chunk in meta.chunks) != meta.size.numel()]
    if torn:  # a file is missing, which the reader does not notice
        raise DamagedError(path, f"parts of {torn[0]} are missing")
    if any(sizes.get(name) != tensor.shape for name, tensor in weights.items()) or not sizes.keys() >= set(elsewhere):
        raise UsageError(f"{path}: its weights are not those of the model in recipe.toml")
    try:
        others = (name for name in stored.keys() - weights.keys() if name not in elsewhere)
        local = optimizer.empty(name for name in others if name.rpartition(".")[0] not in elsewhere)
    except KeyError as error:
        raise UsageError(f"{path}: its optimizer state is not that of this model and optimizer (no {error})") from None
    moments = {name: part(name, tensor) for name, tensor in local.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process alone means to be
            dcp.load({**weights, **moments}, storage_reader=_reader(path), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise DamagedError(path, _first(error)[1]) from None
    optimizer.load_tensors(local)


def _first(error: CheckpointException) -> tuple[int, Exception]:
    rank, (cause, _) = next(iter(error.failures.items()))
    return rank, cause if isinstance(cause, Exception) else RunError(str(cause))


def _reader(path: Path) -> dcp.HuggingFaceStorageReader:
    return dcp.HuggingFaceStorageReader(str(path))
