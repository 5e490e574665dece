"""Checkpoints of a sharded model, by torch's distributed checkpoints: every process writes what it holds as safetensors, with
the place of each part in the whole tensor. Any number of processes, also a single one, can load them; each reads what it needs.

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
from cadre.train.checkpoint import DamagedError, begin, name_of, publish, renew

if TYPE_CHECKING:
    from cadre.train.optimizer import Optimizer
    from cadre.train.parallel.ranks import Ranks


def save_parts(
    ranks: Ranks, run_dir: Path, tensors: dict[str, Tensor], copies: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    """`save_checkpoint` by all processes together. `tensors`: what this process holds; of a DTensor only the place of its part
    is read. `copies`: the values, in host memory. Raises `RunError` in all processes, naming the rank where the disk failed;
    earlier checkpoints stay as they were."""
    final = run_dir / "checkpoints" / name_of(state["step"])
    exists = torch.tensor([final.exists()])
    dist.broadcast(exists, 0, group=ranks.disk_group)
    partial = run_dir / "checkpoints" / ".partial-parts"
    try:
        if exists:
            ranks.together(lambda: renew(final, state) if ranks.main else None)
            return
        ranks.together(lambda: begin(partial) if ranks.main else None)
        writer = _Writer(partial, copies)
        ranks.together(lambda: _write(tensors, writer, ranks.disk_group))
        every: list[dict[str, Any]] = [{}] * ranks.size
        dist.all_gather_object(every, writer.files, group=ranks.disk_group)
        files = {name: made for of_rank in every for name, made in of_rank.items()}
        ranks.together(lambda: publish(partial, final, state, files, keep) if ranks.main else None)
    except RunError as error:
        if ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise type(error)(f"{final}: checkpoint not written, earlier checkpoints are intact: {error}") from None


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writes this process's share of the checkpoint from `copies` to one file, and puts its `checksum` in `files`. Torch's own
    writer would first make the bytes of the file in memory, twice, and stop all other threads meanwhile."""

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
        rank, cause = _first_failure(error)
        if rank == dist.get_rank():  # all ranks get the error, and the one where it happened reports it
            raise cause from None


def load_parts(
    path: Path,
    weights: dict[str, Tensor],
    optimizer: Optimizer,
    part: Callable[[str, Tensor], Tensor],
    group: dist.ProcessGroup | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """Fill `weights` and the optimizer from a checkpoint: by all processes of `group` together, or without a group by this
    process alone. Of a DTensor in `weights` this process's part is filled. `part(name, tensor)`: the DTensor of which a tensor
    of the optimizer's state is this process's part. `elsewhere`: parameters of which only other processes hold anything.

    Raises `UsageError` if the files are damaged, or hold the tensors of another model or optimizer.
    """
    try:
        stored: dict[str, Any] = _reader(path).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise DamagedError(path, error) from None
    sizes = {name: meta.size for name, meta in stored.items()}
    torn = [name for name, meta in stored.items() if sum(chunk.sizes.numel() for chunk in meta.chunks) != meta.size.numel()]
    if torn:  # torch's reader does not notice a missing file
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
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose, without a group
            dcp.load({**weights, **moments}, storage_reader=_reader(path), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise DamagedError(path, _first_failure(error)[1]) from None
    optimizer.load_tensors(local)


def _first_failure(error: CheckpointException) -> tuple[int, Exception]:
    rank, (cause, _) = next(iter(error.failures.items()))
    return rank, cause if isinstance(cause, Exception) else RunError(str(cause))


def _reader(path: Path) -> dcp.HuggingFaceStorageReader:
    return dcp.HuggingFaceStorageReader(str(path))
