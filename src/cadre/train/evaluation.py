"""How a run's model is scored on held-out text: on a fixed part of it on the way; at last, with a context that slides by half,
on all of it, or on as much as a run that the clock ends has time for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from cadre.data.shards import TokenData
from cadre.data.sources import Document
from cadre.model.scoring import Score
from cadre.train.run import Run

# How much of a document an evaluation on the way reads at least: its first words say little of a model.
_LEAST_LETTERS = 1000

# Of a run that the clock ends, the share of its time that the last evaluation may take.
_SHARE_OF_TIME = 0.1


@dataclass(frozen=True)
class Evaluated:
    """A score, the seconds that it took, and of the held-out text the share that was read by a last evaluation."""

    score: Score
    seconds: float
    read_share: float = 1.0


class Evaluation:
    """Scores a run's model. All processes of a run must call the same methods in the same order."""

    def __init__(self, run: Run) -> None:
        self.run, self.parallel = run, run.parallel
        self.held_out = run.data.manifest["held_out"]  # documents, tokens, bytes
        self.excerpts: list[Document] | None = None
        self.seconds_per_token = 0.0

    def on_the_way(self) -> Evaluated | None:
        """None if nothing is held out."""
        if self.excerpts is None:
            self.excerpts = self._beginnings(self.run.recipe.eval.tokens)
        seq_len = self.run.recipe.data.seq_len
        return self._score(self.excerpts, _size(self.excerpts), stride=seq_len) if self.excerpts else None

    def last(self, most_tokens: int) -> Evaluated | None:
        """Of at most so many held-out tokens; None if nothing is held out."""
        stride = self.run.recipe.data.seq_len // 2
        if most_tokens < self.held_out["tokens"]:
            documents = self._beginnings(most_tokens)
            return self._score(documents, _size(documents), stride) if documents else None
        whole = _HeldOut(self.run.data)
        return self._score(whole, self.held_out["bytes"], stride) if self.held_out["documents"] else None

    def most_tokens(self, training_seconds_per_token: float) -> int:
        """Held-out tokens that the last evaluation reads at most."""
        tokens, minutes = self.held_out["tokens"], self.run.recipe.train.minutes
        if minutes is None:
            return tokens
        per_token = self.seconds_per_token or training_seconds_per_token
        room = self.parallel.agree(minutes * 60 * _SHARE_OF_TIME / per_token if per_token else tokens)
        return int(min(tokens, max(self.run.recipe.eval.tokens, room)))

    def last_seconds(self, minutes: float, training_seconds_per_token: float) -> float:
        """How long the last evaluation of a run of so many minutes will take. Before any has been timed, a token's is taken to
        be at most that of training."""
        per_token = self.seconds_per_token or training_seconds_per_token
        return min(self.held_out["tokens"] * per_token, minutes * 60 * _SHARE_OF_TIME)

    def _score(self, documents: Iterable[Document], size: int, stride: int) -> Evaluated:
        """`size`: of the documents in UTF-8."""
        run, seq_len = self.run, self.run.recipe.data.seq_len
        start = time.perf_counter()
        run.model.eval()
        score = self.parallel.score(run.model, run.data.tokenizer, documents, context=seq_len, stride=stride)
        seconds = time.perf_counter() - start
        # Of conversations all is read, and some scored.
        read = self.held_out["tokens"] * size / max(1, self.held_out["bytes"])
        # A window that moves by half reads each token twice.
        self.seconds_per_token = seconds / max(1.0, read) * (2 if stride == seq_len else 1)
        whole = self.held_out.get("learned_bytes", self.held_out["bytes"])
        return Evaluated(score, seconds, min(1.0, score.bytes / whole) if whole else 1.0)

    def _beginnings(self, tokens: int) -> list[Document]:
        if not self.held_out["documents"]:
            return []
        return first_tokens(_HeldOut(self.run.data), tokens, self.run.data.manifest["bytes_per_token"])


class _HeldOut:
    """The held-out documents, read anew each time that they are asked for: of a large corpus they are gigabytes, which every
    process would hold."""

    def __init__(self, data: TokenData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Document]:
        return self.data.read_held_out()


def _size(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def first_tokens(documents: Iterable[Document], tokens: int, bytes_per_token: float) -> list[Document]:
    """The beginnings, equally long, of documents evenly spread over all: about `tokens` in all. Of a conversation at most
    half of that is what comes before the first answer. The documents are gone through twice."""
    count = text = size = 0
    for document in documents:
        count, text, size = count + 1, text + len(document.text), size + len(document.text.encode())
    letters = max(1, int(tokens * bytes_per_token * text / max(1, size)))
    step = max(1, -(-count * _LEAST_LETTERS // letters))
    each = max(1, letters // max(1, -(-count // step)))
    return [_excerpt(document, each) for document in islice(documents, 0, None, step)]


def _excerpt(document: Document, letters: int) -> Document:
    first = document.answers[0][0] if document.answers else 0
    start = max(0, min(first - letters // 2, len(document.text) - letters))
    return document.part(start, start + letters)
