"""From token ids back to text, piece by piece as a model writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cadre.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What tokenizers puts in the place of bytes that are no UTF-8 (yet).
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns ids into text one at a time; a character whose bytes are not all there waits for them.

    `context` is the prompt's ids: some tokenizers write a token differently at the start of a text. The pieces together
    are what decoding all ids at once adds to the prompt, less bytes at the end that make no whole character. Special
    tokens give no text. (`tokenizers`' own DecodeStream does the same, but raises for byte-fallback vocabularies when a
    model writes bytes that are no UTF-8, as a young one does.)
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        # Ids whose text a new one may still change, and how many characters of that text have been given out. It starts
        # at a token that began a character, so decoding it alone gives the same text as decoding it with all before.
        self.window = list(context)
        self.given = len(tokenizer.decode(self.window))
        self.fresh = 0

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        self.window.append(token)
        self.fresh += 1
        text = self.tokenizer.decode(self.window)
        whole = text.rstrip(_REPLACEMENT)
        piece = text[self.given : len(whole)]
        self.given += len(piece)
        if piece and len(whole) == len(text):
            self.window = self.window[-self.fresh :]
            self.fresh = 0
            self.given = len(self.tokenizer.decode(self.window))
        return piece


class StopStrings:
    """Cuts text at the first stop string. What might be the beginning of one is held back until more text decides.

    Raises `UsageError` for an empty stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty: it would stop before the first token")
        self.stop = tuple(stop)
        self.held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """The text that can be given out now. Once a stop string is complete, `hit` is set."""
        text = self.held + piece
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.hit, self.held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning, but not the whole, of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
