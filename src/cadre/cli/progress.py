"""The live line of a training run: on a terminal one line that moves, elsewhere a line per logged step."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

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
            whole = record.get("final") and not record.get("part")
            kind = "held-out, all of it" if whole else "held-out"
            self.note(f"step {record['step']}: {record['bits_per_byte']:.4f} bits per byte ({kind})")
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


# All but line ends and tabs, which alone move no further than they say.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """What a model wrote, without what a terminal would take for commands."""
    return text.translate(_CONTROLS)
