"""How a run's model is scored on held-out text: on a fixed part of it on the way; at last, with a context that slides by half,
on all of it, or on as much as a run that the clock ends has time for."""

from __future__ import annotations

import time
from dataclasses import dataclass

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
            self.excerpts = self._beginnings(self.run.data.held_out_documents(), self.run.recipe.eval.tokens)
        seq_len = self.run.recipe.data.seq_len
        return self._score(self.excerpts, stride=seq_len) if self.excerpts else None

    def last(self, most_tokens: int) -> Evaluated | None:
        """Of at most so many held-out tokens; None if nothing is held out."""
        documents = self.run.data.held_out_documents()
        if most_tokens < self.held_out["tokens"]:
            documents = self._beginnings(documents, most_tokens)
        return self._score(documents, stride=self.run.recipe.data.seq_len // 2) if documents else None

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

    def _score(self, documents: list[Document], stride: int) -> Evaluated:
        run, seq_len = self.run, self.run.recipe.data.seq_len
        start = time.perf_counter()
        run.model.eval()
        score = self.parallel.score(run.model, run.data.tokenizer, documents, context=seq_len, stride=stride)
        seconds = time.perf_counter() - start
        # Of conversations all is read, and some scored.
        size = sum(len(document.text.encode()) for document in documents)
        read = self.held_out["tokens"] * size / max(1, self.held_out["bytes"])
        # A window that moves by half reads each token twice.
        self.seconds_per_token = seconds / max(1.0, read) * (2 if stride == seq_len else 1)
        whole = self.held_out.get("learned_bytes", self.held_out["bytes"])
        return Evaluated(score, seconds, min(1.0, score.bytes / whole) if whole else 1.0)

    def _beginnings(self, documents: list[Document], tokens: int) -> list[Document]:
        return first_tokens(documents, tokens, self.run.data.manifest["bytes_per_token"]) if documents else []


def first_tokens(documents: list[Document], tokens: int, bytes_per_token: float) -> list[Document]:
    """The beginnings, equally long, of documents evenly spread over all: about `tokens` in all. Of a conversation at most
    half of that is what comes before the first answer."""
    text = sum(len(document.text) for document in documents)
    size = sum(len(document.text.encode()) for document in documents)
    letters = max(1, int(tokens * bytes_per_token * text / max(1, size)))
    some = documents[:: max(1, -(-len(documents) * _LEAST_LETTERS // letters))]
    return [_excerpt(document, max(1, letters // len(some))) for document in some]


def _excerpt(document: Document, letters: int) -> Document:
    first = document.answers[0][0] if document.answers else 0
    start = max(0, min(first - letters // 2, len(document.text) - letters))
    return document.part(start, start + letters)
