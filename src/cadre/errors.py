"""The ways a command can end badly, and their exit statuses."""

from __future__ import annotations

import difflib
import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic_core import ErrorDetails


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


class Terminated(KeyboardInterrupt):
    """SIGTERM, or a closed terminal's SIGHUP, which ends a command as Ctrl-C does. `number`: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


# Of what was given, and of a message that repeats it, as many characters are shown.
_LONGEST, _LONGEST_MESSAGE = 80, 400
_REFUSALS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
     errno.EBUSY, errno.ELOOP)
)  # fmt: skip


def read_error(what: object, error: OSError) -> UsageError:
    """The error to raise when a file or folder could not be read, or not even be looked at."""
    return UsageError(f"{what}: cannot be read ({error.strerror or error})")


def write_error(what: str, error: Exception) -> RunError:
    """The error to raise when writing failed: `what` says which file or folder and what became of it."""
    reason = one_line(getattr(error, "strerror", None) or error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return DiskFullError(f"{what}: the disk is full")
    if getattr(error, "errno", None) in _REFUSALS:
        return RefusedError(f"{what}: {reason}: choose another place")
    return RunError(f"{what}: {reason}")


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Within it a file is written, or a folder's files are. Raises `RunError` for what the system refuses."""
    try:
        yield
    except OSError as error:
        raise write_error(f"{what}: cannot be written", error) from None


def one_line(said: object) -> str:
    """What an error says, in one line."""
    return " ".join(str(said).split())


def first_line(error: Exception) -> str:
    """What an error says first, or what it is if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shorten(text: str, most: int = _LONGEST) -> str:
    """The text, without its middle where it has more than `most` characters."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 3]}...{text[-end:]}"


# All but line ends and tabs, which alone move no further than they say.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """What a model or its files say, without what a terminal would take for commands."""
    return text.translate(_CONTROLS)


@contextmanager
def encodable(what: str) -> Iterator[None]:
    """Within it a text is encoded. Raises `UsageError` where the tokenizer has no token for a part of it, nor one for what it
    does not know."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"the tokenizer cannot encode {what} ({one_line(error)})") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is unknown: the one it is nearest to, if any."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def explain(problem: ErrorDetails) -> str:
    """One of the problems in a pydantic error as one line."""
    name = shorten(".".join(str(part) for part in problem["loc"]))
    if problem["type"] == "value_error":
        return shorten(str(problem["ctx"]["error"]), _LONGEST_MESSAGE)
    if problem["type"] == "extra_forbidden":
        return f"{name} is not a known field"
    if problem["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {shorten(repr(problem['input']))}; {problem['msg'][0].lower()}{problem['msg'][1:]}"
