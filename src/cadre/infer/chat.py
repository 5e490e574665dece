"""A conversation: messages that the model's chat template writes as one text; with a base model one running transcript, a line
for each turn, that it continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cadre.errors import UsageError, encodable
from cadre.infer.engine import Engine, Request
from cadre.infer.generate import checked, encode_prompt
from cadre.infer.pages import bytes_for, cache_dtype
from cadre.infer.sampling import Sampling
from cadre.infer.text import AnswerLine, Detokenizer
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


Messages = Sequence[dict[str, str]]
# The text up to where the assistant's next message begins.
Render = Callable[[Messages], str]


def transcript(messages: Messages) -> str:
    """A line for each message: the next line is the answer."""
    return "".join(message["content"] + "\n" for message in messages)


class Conversation:
    """Keeps its engine, and so the cache, between turns: a turn costs its own tokens and those of the last page begun. All that
    was said fits the model's context. `render`: what writes messages as text; without it they are lines of a transcript."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int | None = None,
        render: Render | None = None,
    ) -> None:
        self.tokenizer, self.config, self.render = tokenizer, model.config, render
        self.sampling, self.max_new_tokens = sampling if seed is None else replace(sampling, seed=seed), max_new_tokens
        room = bytes_for(model.config, model.config.max_position_embeddings, cache_dtype(model))
        self.engine = Engine(model, cache_bytes=room, max_batch=1)
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []
        self.line_open = False

    def reply(self, line: str) -> Iterator[str]:
        """Add the user's line; the model's answer in pieces, up to its end-of-text token, `max_new_tokens`, the end of the
        context or, in a transcript, of its line. Whoever stops listening early can go on with the next line.

        Raises `UsageError`, with the conversation as it was, if the line leaves no room for an answer or the template refuses
        it.
        """
        return self._transcribed(line) if self.render is None else self._rendered(line, self.render)

    def _rendered(self, line: str, render: Render) -> Iterator[str]:
        message = {"role": "user", "content": line}
        with encodable("the prompt"):
            ids = self.tokenizer.encode(render([*self.messages, message]), add_special_tokens=False).ids
        context = self.config.max_position_embeddings
        if len(ids) >= context:
            raise UsageError(
                f"the conversation has {len(ids):,} tokens with this line, and the model's context is {context:,}: /reset "
                "starts anew"
            )
        return self._message(message, ids or encode_prompt(self.config, self.tokenizer, ""))

    def _message(self, question: dict[str, str], ids: list[int]) -> Iterator[str]:
        self.messages.append(question)
        self.ids = ids
        detokenizer = Detokenizer(self.tokenizer, ids)
        said = ""
        try:
            for token in self._tokens():
                piece = detokenizer.push(token)
                said += piece
                if piece:
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def _transcribed(self, line: str) -> Iterator[str]:
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
        """The tokens that the model adds to what was said, each there before it is given out. An interruption at any moment
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
