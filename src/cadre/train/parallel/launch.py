"""Starting the processes of a run on this machine, with torch's elastic agent, and joining them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cadre.errors import RunError, UsageError
from cadre.kernels.limits import default_device
from cadre.train.parallel.group import Parallel

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Says to a process that `launch` reports its failure, so that it need not.
_LAUNCHED = "CADRE_LAUNCHED"
# How a process ends that failed only because another did; so do those that were told to end.
_LOST = 75
_FOLLOWING = (_LOST, 130, -signal.SIGTERM)
# What the agent has for the word of a process that left none.
_EMPTY = "<NONE>"
# Seconds that the others have to end when one has failed or the run is stopped: they may be saving.
_GRACE = 120


def started() -> bool:
    """Whether this is a process of a run, started by `launch` or torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def restarted() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def by_torchrun() -> bool:
    return started() and _LAUNCHED not in os.environ


def may_resume_existing() -> bool:
    """Whether a run that is found in `--out` may be this launch's own, from before processes failed. torchrun counts the
    restarts of each machine for itself, and a machine that was replaced begins anew."""
    return by_torchrun() or restarted()


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def launch(
    processes: int, arguments: list[str], restarts: int = 0, logs: Path | None = None, module: str = "cadre"
) -> signal.Signals | None:  # fmt: skip
    """Run `python -m MODULE ARGUMENTS` in so many processes of this machine until all are done; the first one has the terminal,
    what the others print goes to `logs`. When one fails the others are ended, and all started again up to `restarts` times.
    Returns the signal by which they were told to save and end, if they were.

    Raises `RunError` (or `UsageError`, as that process would have) that names the rank and the cause.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE))
    os.environ[_LAUNCHED] = "1"
    folder = Path(tempfile.mkdtemp(prefix="cadre-")) if logs is None else logs
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--logs {folder}: cannot be made ({error.strerror}): choose another folder") from None
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(str(folder), redirects={rank: Std.ALL for rank in range(1, processes)}),
    )
    telling = False
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        printed = any(file.stat().st_size for file in folder.rglob("std*.log"))
        cause = _cause(error, folder if printed else None)
        telling = str(folder) in str(cause)
        raise cause from None
    except SignalException as ended:
        # The processes were told, and have saved and ended: Ctrl-C asks no more.
        if ended.sigval not in (signal.SIGINT, signal.SIGTERM):
            raise RunError(f"stopped by {ended.sigval.name}") from None
        return signal.Signals(ended.sigval)
    finally:
        if logs is None and not telling:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _cause(error: ChildFailedError, folder: Path | None) -> Exception:
    """The failure that the others followed from, as one line. `folder`: where what the processes printed is, if they did."""
    earliest = min(failure.timestamp for failure in error.failures.values())
    at_once = {rank: failure for rank, failure in error.failures.items() if failure.timestamp <= earliest + 1}
    rank, first = min(at_once.items(), key=lambda item: (item[1].exitcode in _FOLLOWING, item[1].exitcode > 0, item[0]))
    told = str(first.error_file_data["message"])
    look = "" if folder is None else f"; what it printed is in {folder}"
    if first.exitcode < 0:
        ended = f"rank {rank} was ended by {first.signal_name()}"
        return RunError(ended if -first.exitcode in (signal.SIGKILL, signal.SIGTERM) else ended + look)
    if told == _EMPTY:
        return RunError(f"rank {rank} ended with status {first.exitcode}{look}")
    if told.startswith(f"rank {rank} failed: "):
        return RunError(told + look)
    if first.exitcode == _LOST:
        # Those that had to be killed afterwards are those that hung.
        hung = [str(other) for other, failure in error.failures.items() if failure.exitcode == -signal.SIGKILL]
        if hung:
            return RunError(f"rank {', '.join(hung)} did not answer any more ({told})")
    return UsageError(told) if first.exitcode == UsageError.status else RunError(told)


@contextmanager
def joined(timeout: float) -> Iterator[tuple[Parallel, torch.device]]:
    """The processes that this one is one of, and its device. Within it an error ends the process with its status, told to
    whoever started it."""
    device = default_device()
    if not started():
        yield Parallel(), device
        return
    from cadre.train.parallel.ranks import Ranks

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        ranks = Ranks(device, timeout)
        yield ranks, device
    except (UsageError, RunError) as error:
        _tell(str(error), error.status)
        raise
    except Exception as error:
        if _lost(error):
            # gloo ends with where it stands in its source, an address and good wishes.
            reason = re.sub(r"\[[^\]]*\.cc:\d+\] |[.:] *(This|GLHF|https?:).*", "", " ".join(str(error).split()))
            message = f"rank {os.environ['RANK']} lost the other processes: {reason[:300]}"
            _tell(message, _LOST)
            raise RunError(message) from None
        _tell(f"rank {os.environ['RANK']} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", None)
        raise
    ranks.close()


def _tell(message: str, status: int | None) -> None:
    """Leave word of a failure where the elastic agent looks for it; end at once if that is all that is wanted."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    if status is not None and _LAUNCHED in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not by way of destructors that wait for processes which are gone


def without_restarts() -> str | None:
    """Why several machines could not start again together, in one line; None if they can, or are not several."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    wanted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if several and wanted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        what = "give torchrun --rdzv-backend c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        return f"after a failure these machines could not start again together: {what}"
    return None


def _lost(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
