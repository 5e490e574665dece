"""The ways a command can end badly, and their exit statuses."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UsageError(ValueError):
    """Bad usage or bad input: the message is one line that says what was wrong, where, and what would be right."""

    status = 2


class RunError(RuntimeError):
    """The work itself failed (a diverged run, a broken disk): one line."""

    status = 1


class DivergedError(RunError):
    """Training left the numbers: losses, gradients or weights that are not finite."""


class DiskFullError(RunError):
    """There is no room where the caller asked to write: theirs to mend, as bad input is."""

    status = 2


class RefusedError(RunError):
    """Where the caller asked to write, nobody may, or there is no such place: theirs to mend too."""

    status = 2


_REFUSALS = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT))


def write_error(what: str, error: Exception) -> RunError:
    """The error to raise when writing failed: `what` says which file or folder and what became of it."""
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return DiskFullError(f"{what}: the disk is full")
    if getattr(error, "errno", None) in _REFUSALS:
        return RefusedError(f"{what}: {reason}: choose another place")
    return RunError(f"{what}: {reason}")


def explain(error: ValidationError) -> str:
    """The first problem of a pydantic error as one line."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"{name} is not a known field"
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"
