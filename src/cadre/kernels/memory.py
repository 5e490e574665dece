"""The memory that there is: the accelerator's, else the machine's or the container's, whichever is less."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
# Where a container's limit stands, what it uses, and what of that is cache that gives way; versions 2 and 1.
_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """What can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limited = _container()
    return free if limited is None else max(0, min(free, limited[0] - limited[1]))


def total_bytes(device: torch.device) -> int:
    """All of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = psutil.virtual_memory().total
    limited = _container()
    return total if limited is None else min(total, limited[0])


def _container() -> tuple[int, int] | None:
    """The container's limit and what it uses; None if there is none."""
    for folder, limit, usage, inactive in _CGROUPS:
        group = _CGROUP / folder
        try:
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / usage).read_text()) - int(stat[inactive])
            return int((group / limit).read_text()), used
        except (OSError, ValueError, KeyError):  # no such files, or the limit is "max"
            continue
    return None
