"""`/v1/completions`: a text, or token ids, continued."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cadre.infer.engine import end_ids
from cadre.serve.answer import Choice, EventStream, choices_of, route_report, usage, whole
from cadre.serve.schema import CompletionRequest
from cadre.serve.service import Service, check_logprobs, new_name

if TYPE_CHECKING:
    from cadre.infer.engine import Output
    from cadre.infer.sampling import TokenOut

_DEFAULT_TOKENS = 16


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    service.check_model(body.model)
    count = 1 if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else len(body.prompt)
    service.loop.check(count * (body.n or 1))
    prompts = await service.encode_any(body.prompt)
    new_tokens = [service.new_tokens(prompt, body.max_tokens, "max_tokens", _DEFAULT_TOKENS) for prompt in prompts]
    shape = CompletionShape(service, body)
    told = bool(body.echo) and body.logprobs is not None
    lengths = (most + told * len(prompt.ids) for prompt, most in zip(prompts, new_tokens, strict=True))
    check_logprobs(body.logprobs, sum(lengths) * (body.n or 1))
    # Who scores a text (lm-eval) asks for one new token and drops the last log-probability as that token's: so it must be
    # there, also where it ends the text and the engine would not tell it.
    dropped = told and body.max_tokens == 1 and not body.ignore_eos
    # Nothing to generate is still something to score.
    options = {"prompt_logprobs": told or body.max_tokens == 0} | ({"ignore_eos": True} if dropped else {})
    sequences = await service.sequences(shape.name, body, prompts, new_tokens, logprobs=body.logprobs, **options)
    choices = choices_of(service, sequences, prompts, keep=not body.stream)
    if dropped:
        for choice in choices:
            choice.ends = end_ids(service.card.config)
    stream = service.loop.submit(sequences)
    if body.stream:
        return EventStream(service.loop, stream, choices, shape)
    await whole(request, service.loop, stream, choices)
    return JSONResponse(shape.whole(choices))


class CompletionShape:
    """OpenAI's `text_completion` objects."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self.service, self.body = service, body
        self.name = new_name("cmpl")
        self.created = int(time.time())
        self.routes = body.cadre is not None and body.cadre.routes

    @property
    def usage_wanted(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        entries = []
        for choice in choices:
            text = "".join(choice.text)
            logprobs = self._logprobs(choice, choice.prompt_logprobs, choice.tokens)
            entries.append(self._entry(choice, self._echo(choice) + text, logprobs))
        return self._object(entries) | {"usage": usage(choices)}

    def chunks(self, choice: Choice, piece: str, output: Output, *, first: bool) -> list[dict[str, Any]]:
        logprobs = self._logprobs(choice, output.prompt_logprobs or (), output.tokens)
        text = self._echo(choice) + piece if first else piece
        if not text and logprobs is None and choice.finish is None and not (self.routes and output.tokens):
            return []
        chunk = self._object([self._entry(choice, text, logprobs)])
        if self.usage_wanted:
            chunk["usage"] = None
        if self.routes:
            chunk["cadre"] = route_report(self.service, choice, output)
        return [chunk]

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._object([]) | {"usage": usage}

    def _echo(self, choice: Choice) -> str:
        return choice.prompt.text if self.body.echo else ""

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.card.name,
            "choices": choices,
        }

    def _entry(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(
        self, choice: Choice, prompt: Sequence[TokenOut], tokens: Sequence[TokenOut]
    ) -> dict[str, Any] | None:
        """The log-probabilities of new tokens, after those of the prompt where it is echoed."""
        if self.body.logprobs is None:
            return None
        told = [*prompt, *tokens] if self.body.echo else tokens
        texts = self.service.texts
        offsets = []
        for token in told:
            offsets.append(choice.offset)
            choice.offset += texts.begun(token.id)
        return {
            "tokens": [texts.text(token.id) for token in told],
            "token_logprobs": [token.logprob for token in told],
            "top_logprobs": [self._top(token) for token in told],
            "text_offset": offsets,
        }

    def _top(self, token: TokenOut) -> dict[str, float] | None:
        """The likeliest tokens by their text, the chosen one always among them; None for a text's first token, which
        nothing predicted."""
        if token.logprob is None:
            return None
        texts = self.service.texts
        top: dict[str, float] = {}
        for other, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(texts.text(other), logprob)
        return top
