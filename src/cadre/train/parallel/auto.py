"""Chooses the "auto" degrees of `[parallel]`: the layout that the planner predicts to be the fastest of those that fit in
memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from cadre.errors import UsageError
from cadre.kernels.memory import total_bytes
from cadre.model.config import ModelConfig
from cadre.plan.hardware import Device, hardware, hardware_names
from cadre.plan.layout import Workload
from cadre.plan.search import search, smallest
from cadre.plan.shape import Shape
from cadre.train.parallel.group import Parallel
from cadre.train.recipe import Recipe

# An accelerator that the catalogue does not know is given this one's speeds, but its own memory.
_ANY_GPU = "h100"


def device_here(device: torch.device, parallel: Parallel) -> Device:
    """What one process computes on, for the planner: the speeds of a device in the catalogue, and this one's memory. All
    processes must call it, and get what the main process has, so that they choose the same layout."""
    local = int(parallel.agree(float(os.environ.get("LOCAL_WORLD_SIZE", parallel.size))))
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device).lower().replace(" ", ""), total_bytes(device)
        known = hardware(next((known for known in hardware_names() if known in name), _ANY_GPU))
    else:
        memory, known = total_bytes(device) // local, hardware("cpu-2core")
    return replace(known, memory_bytes=parallel.agree(float(memory)), node_size=local)


def settle(recipe: Recipe, config: ModelConfig, processes: int, device: Device, note: Callable[[str], None]) -> Recipe:
    """The recipe with a number in place of every "auto" degree; `note` is told what was chosen and why. Raises `UsageError` if
    no layout fits in memory. Other errors in the recipe's layout are left to `compose`."""
    section, train = recipe.parallel, recipe.train
    if not section.open:
        return recipe
    narrow = train.dtype == "bfloat16" or (train.dtype == "auto" and "bf16" in device.flops)
    precision = "bf16" if narrow else "fp32"
    rate, efficiency = (next(iter(rates.values())) for rates in (device.flops, device.efficiency))
    device = replace(device, flops={precision: rate}, efficiency={precision: efficiency})
    work = Workload(
        Shape.from_config(config), device, precision, recipe.data.seq_len, train.batch, recipe.optimizer.name,
        train.micro_batch, section.degrees(),
    )  # fmt: skip
    leanest = smallest(work, processes)
    if leanest is None:
        return _with(recipe, 1, 1)
    found = search(work, processes)
    room = f"{device.memory_bytes / 1e9:,.1f} GB"
    if not found:
        raise UsageError(
            f"no layout of this model fits {processes} x {room}: the leanest, expert {leanest.layout.expert} with replicas "
            f"{leanest.layout.replicas}, needs {leanest.memory.total / 1e9:,.1f} GB each; start more processes"
        )
    best = found[0]
    chosen = f"expert {best.layout.expert}, replicas {best.layout.replicas}"
    note(
        f"layout: {chosen} on {processes} x {device.name}: by the planner's count the fastest that fits, {best.seconds:.3g} s "
        f"a step, {best.memory.total / 1e9:,.2f} of {room} each"
    )
    return _with(recipe, best.layout.expert, best.layout.replicas)


def _with(recipe: Recipe, expert: int, replicas: int) -> Recipe:
    degrees = {"expert": expert, "replicas": replicas}
    kept = {name: degree for name in degrees if (degree := getattr(recipe.parallel, name)) != "auto"}
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={**degrees, **kept})})
