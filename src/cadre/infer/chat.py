"""A conversation with a base model: one running transcript, a line for each turn, that the model continues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cadre.errors import UsageError
from cadre.infer.generate import Decoder, encode_prompt, end_ids, seeded
from cadre.infer.sampling import Sampling
from cadre.infer.text import Detokenizer
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Conversation:
    """Keeps the cache between turns, so that a turn costs its own tokens only. The transcript fits the model's context."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int, seed: int | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.generator = seeded(seed, model.embed_tokens.weight.device)
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.decoder = Decoder(self.model, self.model.config.max_position_embeddings)
        self.line_open = False

    def reply(self, line: str) -> Iterator[str]:
        """Add the user's line; the model's answer in pieces, up to the end of its line, its end-of-text token,
        `max_new_tokens` or the end of the context. Whoever stops listening early can go on with the next line.

        Raises `UsageError`, with the transcript as it was, if the line leaves no room for an answer.
        """
        text = ("\n" if self.line_open else "") + line + "\n"
        ids = encode_prompt(self.model.config, self.tokenizer, text)
        if self.decoder.length:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= self.decoder.room:
            raise UsageError(
                f"the line has {len(ids):,} tokens, but {self.decoder.room:,} of the model's context of "
                f"{self.decoder.cache.max_length:,} are left: /reset starts anew"
            )
        self.decoder.feed(ids)
        return self._answer(Detokenizer(self.tokenizer, ids))

    def _answer(self, detokenizer: Detokenizer) -> Iterator[str]:
        self.line_open = True
        started = False
        for token in self.decoder.stream(self.max_new_tokens, self.sampling, self.generator, end_ids(self.model.config)):
            piece = detokenizer.push(token)
            if not started:
                piece = piece.lstrip()  # a blank line is no answer
                started = bool(piece)
            if "\n" in piece:
                self.line_open = False
                piece = piece[: piece.index("\n")]
            if piece:
                yield piece
            if not self.line_open:
                return
