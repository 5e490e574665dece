"""Starts the processes of a run on this machine, with torch's elastic agent, and joins them to each other."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cadre.errors import RunError, UsageError, one_line
from cadre.kernels.limits import default_device
from cadre.train.parallel.group import Parallel

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

# Set in the environment of processes that `launch` starts: it reports their failures, so that they need not.
_LAUNCHED = "CADRE_LAUNCHED"
# What processes find each other by.
_MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Exit status of a process that failed only because it lost the others; and all statuses of processes whose end followed from
# another's.
_LOST = 75
_FOLLOWING = (_LOST, 130, 143, -signal.SIGTERM)
# A file beside those in which processes report failures: this one came to its end.
_DONE = "done"
# What the agent gives as the message of a process that left none.
_EMPTY = "<NONE>"
# Seconds that processes have to end, for they may be saving, when another has failed or the run is stopped.
_GRACE = 120


def started() -> bool:
    """Whether this is a process of a run, started by `launch` or torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def restarted() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def started_again() -> str | None:
    """Why the processes of this launch have been started again, as far as those before could say; None if they have not."""
    if not restarted() or _LAUNCHED not in os.environ:  # torchrun says it itself
        return None
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    before = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1].with_name(f"attempt_{attempt - 1}")
    told, silent = [], []
    for folder in sorted(path for path in before.glob("*") if path.is_dir()):
        try:
            told.append(str(json.loads((folder / "error.json").read_text(encoding="utf-8"))["message"]))
        except (OSError, ValueError, LookupError):
            silent += [] if (folder / _DONE).exists() else [folder.name]
    causes = [message for message in told if "lost the other processes" not in message]
    if silent:  # such as one that was killed
        causes.append(f"rank {', '.join(silent)} ended without a word")
    return f"started again: {next(iter([*causes, *told]), 'nobody knows why')}"


def by_torchrun() -> bool:
    return started() and _LAUNCHED not in os.environ


def may_resume_existing() -> bool:
    """Whether a run that is found in `--out` may be this launch's own, begun before a restart. Under torchrun it always may be:
    restarts are counted by each machine, and a machine that was replaced begins at zero."""
    return by_torchrun() or restarted()


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def launch(
    processes: int, arguments: list[str], restarts: int = 0, logs: Path | None = None, module: str = "cadre"
) -> signal.Signals | None:  # fmt: skip
    """Run `python -m MODULE ARGUMENTS` in so many processes of this machine until all have ended. The first one prints to the
    terminal, the others to files in `logs`. When one fails the others are ended, and all are started again, up to `restarts`
    times. Returns the signal that stopped the run, after which the processes have saved and ended; None if there was none.

    Raises `RunError` (or `UsageError`, as that process would have) that names the rank and the cause.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # What it has to say is said here. Some of torch's modules give their own loggers a level.
    for name in ["torch.distributed.elastic", *logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE))
    os.environ[_LAUNCHED] = "1"
    folder = Path(tempfile.mkdtemp(prefix="cadre-")) if logs is None else logs
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--logs {folder}: cannot be made ({error.strerror}): choose another folder") from None
    telling = False
    try:
        elastic_launch(_launch_config(processes, restarts, folder), sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        printed = any(file.stat().st_size for file in folder.rglob("std*.log"))
        cause = _cause(error, folder if printed else None)
        telling = str(folder) in str(cause)
        raise cause from None
    except SignalException as ended:
        # The agent has passed the signal on, and the processes have saved and ended, which is all that Ctrl-C asks.
        if ended.sigval not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            raise RunError(f"stopped by {ended.sigval.name}") from None
        return signal.Signals(ended.sigval)
    finally:
        if logs is None and not telling:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _launch_config(processes: int, restarts: int, folder: Path) -> LaunchConfig:
    """Processes of this machine alone, at a port that is free; what all but the first print goes to files in `folder`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    # The agent would heed what nohup has told this process to ignore.
    heeded = ["SIGTERM", "SIGINT", "SIGQUIT", *(["SIGHUP"] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        local_addr="localhost",
        signals_to_handle=",".join(heeded),
        logs_specs=DefaultLogsSpecs(str(folder), redirects={rank: Std.ALL for rank in range(1, processes)}),
    )


def _cause(error: ChildFailedError, folder: Path | None) -> Exception:
    """The first failure, which the others followed from, as an error of one line. `folder`: of what the processes printed, if
    they did."""
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
        # The processes that did not end by themselves, and had to be killed, are those that hung.
        hung = [str(other) for other, failure in error.failures.items() if failure.exitcode == -signal.SIGKILL]
        if hung:
            return RunError(f"rank {', '.join(hung)} did not answer any more ({told})")
    return UsageError(told) if first.exitcode == UsageError.status else RunError(told)


@contextmanager
def joined(timeout: float) -> Iterator[tuple[Parallel, torch.device]]:
    """Join the run's processes. Yields them, as `Parallel`, and this process's device. An error inside the `with` block ends
    the process with the error's exit status, after it has been reported to the agent that started the process."""
    device = default_device()
    if not started():
        yield Parallel(), device
        return
    from cadre.train.parallel.ranks import Ranks

    try:
        if missing := [name for name in _MEETING if name not in os.environ]:
            given, lacks = "TORCHELASTIC_RUN_ID" if "TORCHELASTIC_RUN_ID" in os.environ else "WORLD_SIZE", ", ".join(missing)
            raise UsageError(
                f"the environment has {given}, as in one of several processes, but not {lacks}: start them with --nproc or "
                f"torchrun, or unset {given}"
            )
        if device.type == "cuda":
            place, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if place >= cards:
                raise UsageError(f"each process here needs a card of its own, and torch sees {cards}: start at most so many")
            device = torch.device("cuda", place)
            torch.cuda.set_device(device)
        ranks = Ranks(device, timeout)
        yield ranks, device
    except (UsageError, RunError) as error:
        _tell(str(error), error.status)
        raise
    except Exception as error:
        if _lost(error):
            # gloo's messages contain a place in its source, and end in hints for its developers: neither is wanted here.
            reason = re.sub(r"\[[^\]]*\.cc:\d+\] |[.:] *(This|GLHF|https?:).*", "", one_line(error))
            message = f"rank {os.environ['RANK']} lost the other processes: {reason[:300]}"
            _tell(message, _LOST)
            raise RunError(message) from None
        _tell(f"rank {os.environ['RANK']} failed: {type(error).__name__}: {one_line(error)[:300]}", None)
        raise
    ranks.close()
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).with_name(_DONE).touch()


def _tell(message: str, status: int | None) -> None:
    """Report a failure in the file where the elastic agent looks for it. With a `status`, a process that `launch` started ends
    at once."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    if status is not None and _LAUNCHED in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without destructors, which would wait for processes that have ended


def without_restarts() -> str | None:
    """Why the processes of several machines could not be restarted together, in one line; None if they can, or there is only
    one machine."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    wanted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if several and wanted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        what = "give torchrun --rdzv-backend c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        return f"after a failure these machines could not start again together: {what}"
    return None


def _lost(error: Exception) -> bool:
    import torch.distributed as dist

    said = str(error).lower()
    # Most of gloo's messages begin with a place in its source; this one comes bare.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in said or "pair closure" in said))
