"""How far the work is: on a terminal one line that moves, elsewhere lines or nothing."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cadre.errors import UsageError, printable, read_error
from cadre.train.recipe import UNTIMED
from cadre.units import clock


class TrainingLine:
    """Shows step, loss, tokens/s, MFU and time left; writes evaluations and events as lines of their own.

    All of it goes to standard output: what stands on standard error is what went wrong.
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None

    def __enter__(self) -> TrainingLine:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def record(self, record: dict[str, Any], total_steps: int) -> None:
        if "bits_per_byte" in record:
            kind = "a sample of it"  # which does not compare with the rest
            if record.get("final"):
                kind = f"{record['part']:.1%} of it" if record.get("part") else "all of it"
            self.note(f"step {record['step']}: {record['bits_per_byte']:.4f} bits per byte (held-out, {kind})")
            return
        # Where only the clock ends a run, the steps are known once the clock has told how long one takes.
        known = total_steps < UNTIMED
        left = clock((total_steps - record["step"]) * record["seconds_per_step"]) if known else "?"
        line = (
            f"step {record['step']}/{total_steps if known else '?'}  loss {record.get('loss', float('nan')):.3f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.0%}  "
            f"elapsed {clock(record['seconds'])}  left {left}"
        )
        if self.live:
            self.live.update(Text(line))
        else:
            self.console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", soft_wrap=True)


class _Lasting:
    """Standard output, until its reader has gone; what is written after that is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._unless_gone(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._unless_gone(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _unless_gone(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe that nobody reads any more, a terminal that was closed
                raise
        # What the stream still holds goes the same way, also when the interpreter ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within it, work goes on when nobody reads what it prints any more, or never did: hours of training must not end with a
    pager."""
    stream = sys.stdout
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = _Lasting(nowhere if stream is None else stream)
        try:
            yield
        finally:
            sys.stdout = stream


@contextmanager
def moving_line(console: Console) -> Iterator[Callable[[str], None]]:
    """On a terminal a line that shows the newest text; elsewhere nothing."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(Text(text))


@contextmanager
def counting(done: str) -> Iterator[Callable[[int], None]]:
    """On a terminal, how many tokens are `done` so far, such as "read"; called with how many more there are."""
    total = 0
    with moving_line(Console(stderr=True)) as show:

        def add(tokens: int) -> None:
            nonlocal total
            total += tokens
            show(f"{total:,} tokens {done}")

        show("reading")
        yield add


@contextmanager
def notes(json_output: bool) -> Iterator[Callable[[str], None]]:
    """On a terminal one line that moves, elsewhere lines. Beside JSON only on a terminal, and never on standard output."""
    console = Console(stderr=json_output, highlight=False, markup=False, emoji=False)
    with moving_line(console) as show:
        yield show if console.is_terminal else lambda text: None if json_output else print(text, flush=True)


def shown(text: str) -> str:
    """What a model wrote as it goes to standard output: what is piped is exactly what was written."""
    return printable(text) if sys.stdout is not None and sys.stdout.isatty() else text


def from_standard_input(read: Callable[[], str]) -> str:
    """What `read`, a method of standard input, gives. Raises `UsageError` if it cannot."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except OSError as error:
        raise read_error("standard input", error) from None
