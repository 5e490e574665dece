"""A conversation with a base model: one running transcript, a line for each turn, that the model continues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cadre.errors import UsageError
from cadre.infer.engine import Engine, Request
from cadre.infer.generate import checked, encode_prompt
from cadre.infer.pages import bytes_for, cache_dtype
from cadre.infer.sampling import Sampling
from cadre.infer.text import AnswerLine, Detokenizer
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Conversation:
    """Keeps its engine, and so the cache, between turns: a turn costs its own tokens and those of the last page begun. The
    transcript fits the model's context."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int, seed: int | None = None
    ) -> None:
        self.tokenizer, self.config = tokenizer, model.config
        self.sampling, self.max_new_tokens = sampling if seed is None else replace(sampling, seed=seed), max_new_tokens
        room = bytes_for(model.config, model.config.max_position_embeddings, cache_dtype(model))
        self.engine = Engine(model, cache_bytes=room, max_batch=1)
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.ids: list[int] = []
        self.line_open = False

    def reply(self, line: str) -> Iterator[str]:
        """Add the user's line; the model's answer in pieces, up to the end of its line, its end-of-text token,
        `max_new_tokens` or the end of the context. Whoever stops listening early can go on with the next line.

        Raises `UsageError`, with the transcript as it was, if the line leaves no room for an answer.
        """
        text = ("\n" if self.line_open else "") + line + "\n"
        ids = encode_prompt(self.config, self.tokenizer, text)
        if self.ids:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        context = self.config.max_position_embeddings
        if len(ids) >= context - len(self.ids):
            raise UsageError(
                f"the line has {len(ids):,} tokens, but {context - len(self.ids):,} of the model's context of {context:,} "
                "are left: /reset starts anew"
            )
        self.ids += ids
        return self._answer(Detokenizer(self.tokenizer, ids))

    def _answer(self, detokenizer: Detokenizer) -> Iterator[str]:
        self.line_open = True
        line = AnswerLine()
        for token in self._tokens():
            piece = line.push(detokenizer.push(token))
            self.line_open = not line.ended
            if piece:
                yield piece
            if line.ended:
                return

    def _tokens(self) -> Iterator[int]:
        """The tokens that the model adds to the transcript, each there before it is given out. An interruption at any moment
        loses no more than the token in work."""
        sampling = self.sampling
        if sampling.seed is not None:  # else every answer would draw the same numbers
            sampling = replace(sampling, seed=(sampling.seed + (self.turns << 32)) % 2**63)
        self.turns += 1
        self.engine.clear()  # of an answer that nobody heard to its end
        self.engine.add(Request("", tuple(self.ids), self.max_new_tokens, sampling))
        while self.engine.busy:
            for token in (token for output in self.engine.step() for token in checked(output).tokens):
                self.ids.append(token.id)
                yield token.id
