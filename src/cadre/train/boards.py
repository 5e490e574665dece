"""Where a run can be watched from outside: TensorBoard's files, and Weights & Biases for a recipe that names a project there.

Both show what `metrics.jsonl` says.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cadre.errors import RunError, UsageError, first_line, shorten
from cadre.files import replace_file

TENSORBOARD_FOLDER = "tensorboard"
# The id under which Weights & Biases knows the run, for whoever resumes it.
WANDB_ID = "wandb.txt"
# What wandb takes in no name of a project, and how long one may be.
_NO_NAME, _LONGEST = "\\/#?%:", 128
# Seconds that the end of a run waits for what is still to be sent.
_PATIENCE = 60


class TensorBoard:
    """Event files in `run_dir/tensorboard/`. What they hold of `purge_step` and later steps is forgotten first."""

    def __init__(self, run_dir: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=purge_step)
        self._hook = threading.excepthook
        threading.excepthook = self._unless_ours

    def write(self, step: int, scalars: dict[str, float], event: str | None, image: NDArray[Any] | None) -> None:
        """`scalars` by tag; `image`: floats [height, width, channels] in 0..1, the experts' loads. Raises OSError."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        if event is not None:
            self._writer.add_text("events", event, step)
        if image is not None:
            self._writer.add_image("load/expert_map", image, step, dataformats="HWC")

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _unless_ours(self, failed: threading.ExceptHookArgs) -> None:
        """It writes in a thread; what that meets on the disk is raised by the write after it, and once is enough."""
        if not (type(failed.thread).__module__.startswith("tensorboard.") and issubclass(failed.exc_type, OSError)):
            self._hook(failed)


class WeightsAndBiases:
    """A run of `project` ("PROJECT" or "ENTITY/PROJECT") at wandb.ai, or where wandb's own settings say; offline, by those or
    by a network that does not answer, it is kept in `run_dir/wandb` for `wandb sync`. `settings`: the recipe.

    wandb sends from a process of its own, at its leisure; if that dies, the run goes on unseen. Raises `RunError` for what
    wandb refuses."""

    def __init__(self, run_dir: Path, project: str, settings: dict[str, Any], note: Callable[[str], None]) -> None:
        import wandb

        self._note, self._image, self._gone, self._done = note, wandb.Image, False, False
        file = run_dir / WANDB_ID
        again = file.is_file()
        name = file.read_text(encoding="utf-8").strip() if again else secrets.token_hex(4)
        entity, _, project = project.rpartition("/")
        # Its own lines would tear the progress line, and a network that has gone must not keep a finished run from its end.
        quiet = wandb.Settings(silent=True, console="off", finish_timeout=_PATIENCE)
        how: dict[str, Any] = {
            "entity": entity or None, "project": project, "id": name, "name": run_dir.resolve().name, "dir": run_dir,
            "config": settings, "settings": quiet,
        }  # fmt: skip
        try:
            self._run = wandb.init(**how, resume="allow" if again and _mode() == "online" else None)
        except wandb.errors.Error as error:
            said = first_line(error)
            refused = isinstance(error, wandb.errors.AuthenticationError) or "403" in said or "permission" in said
            if refused or not isinstance(error, wandb.errors.CommError):
                raise RunError(f"train.wandb: wandb refuses: {said}") from None
            note(f"wandb does not answer ({said}): kept in {run_dir / 'wandb'}, for wandb sync")
            wandb.teardown()  # whose process would take the id for one in use
            self._run = wandb.init(**how, mode="offline")
        replace_file(file, f"{name}\n".encode())
        # Not by wandb's own steps: a run that goes on from a checkpoint may show some again, which those would not allow.
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline and self._run.url:
            note(f"wandb: {self._run.url}")

    def write(self, step: int, scalars: dict[str, float], event: str | None, image: NDArray[Any] | None) -> None:
        """As TensorBoard's."""
        shown: dict[str, Any] = {"step": step, **scalars}
        if event is not None:
            shown["events"], self._done = event, event.startswith("finished")
        if image is not None:
            shown["load/expert_map"] = self._image(image)
        self._unless_gone(lambda: self._run.log(shown))

    def close(self) -> None:
        """A run that was stopped, or has failed, is no finished one there either."""
        self._unless_gone(lambda: self._run.finish(exit_code=0 if self._done else 1))

    def _unless_gone(self, tell: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            tell()
        except Exception as error:  # of its own making, and of sockets
            self._gone = True
            self._note(f"wandb: {first_line(error)}: it shows no more of this run")


def check_wandb(project: str | None) -> None:
    """Refuse, before anything is prepared, what can be known then: a name that wandb does not take, no package, no key. Asks
    for a key on a terminal. None and "" ask for nothing."""
    if not project:
        return
    entity, slash, name = project.rpartition("/")
    if not name or (slash and not entity) or set(entity + name) & set(_NO_NAME) or len(name) > _LONGEST:
        raise UsageError(
            f"train.wandb is {shorten(project)!r}; it must be PROJECT or ENTITY/PROJECT, of at most {_LONGEST} letters and "
            f"none of {_NO_NAME}"
        )
    try:
        import wandb
    except ImportError:
        raise UsageError("train.wandb: needs wandb: pip install 'cadre-lm[wandb]', or leave it out (\"\")") from None
    try:
        if _mode() == "online":
            wandb.login(verify=False)
    except wandb.errors.Error as error:
        raise UsageError(f"train.wandb: {first_line(error)} Or set WANDB_MODE=offline.") from None


def _mode() -> str:
    """By wandb's own settings, in its files and the environment."""
    import wandb

    try:
        return str(wandb.setup().settings.mode)
    except ValueError:
        raise UsageError(f"WANDB_MODE is {os.environ.get('WANDB_MODE')!r}; wandb knows online, offline and disabled") from None
