"""From token ids back to text, piece by piece as a model writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cadre.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What tokenizers puts in the place of bytes that are no UTF-8 (yet).
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# At the end of a text so many of them may still become characters: up to three bytes of one, and four of the one before, which
# single bytes written as tokens (byte fallback) turn to replacements with it. All before them are certain.
_INCOMPLETE = 7
# Tokens whose text is looked at again, where all before it is certain.
_TAIL = 16


class Detokenizer:
    """Turns ids into text one at a time; a character whose bytes are not all there waits for them.

    `context` is the prompt's ids: some tokenizers write a token differently at the start of a text. The pieces together
    are what decoding all ids at once adds to the prompt, less bytes at the end that make no whole character. Special
    tokens give no text. (`tokenizers`' own DecodeStream does the same, but raises for byte-fallback vocabularies when a
    model writes bytes that are no UTF-8, as a young one does.) A token costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        # Ids whose text a new one may still change, and how many characters of that text have been given out. It starts
        # at a token that began a character, so decoding it alone gives the same text as decoding it with all before.
        size = _TAIL
        text = tokenizer.decode(context[-size:])
        while size < len(context) and (not text or text.startswith(_REPLACEMENT)):
            size *= 2
            text = tokenizer.decode(context[-size:])
        self.window = list(context[-size:])
        self.given = len(text)
        self.fresh = 0

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        self.window.append(token)
        self.fresh += 1
        text = self.tokenizer.decode(self.window)
        broken = len(text) - len(text.rstrip(_REPLACEMENT))
        piece = text[self.given : len(text) - min(broken, _INCOMPLETE)]
        self.given += len(piece)
        if piece and not broken:
            self.window = self.window[-self.fresh :]
            self.fresh = 0
            self.given = len(self.tokenizer.decode(self.window))
        elif broken > _INCOMPLETE:
            self._forget(len(text) - self.given)
        return piece

    def _forget(self, held: int) -> None:
        """Drop the beginning of a run of bytes that make no character, where its end alone reads the same. held: characters
        at its end that have not been given out."""
        window = self.window[-_TAIL:]
        text = self.tokenizer.decode(window)
        if len(text) - len(text.rstrip(_REPLACEMENT)) > _INCOMPLETE:
            self.window, self.given, self.fresh = window, len(text) - held, min(self.fresh, _TAIL)


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


class AnswerLine:
    """Cuts a continuation of a transcript to the answer: one line, blank lines before it left out."""

    def __init__(self) -> None:
        self.started = False
        self.ended = False

    def push(self, piece: str) -> str:
        """The part of this piece that belongs to the answer. Once the line is complete, `ended` is set."""
        if not self.started:
            piece = piece.lstrip()
            self.started = bool(piece)
        line, newline, _ = piece.partition("\n")
        self.ended = bool(newline)
        return line


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning, but not the whole, of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
