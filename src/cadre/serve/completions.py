"""`/v1/completions`: a text, or token ids, continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response

from cadre.serve.answer import AnswerFormat, Choice, answer, choices_of
from cadre.serve.schema import CompletionRequest
from cadre.serve.service import Service, check_logprobs

if TYPE_CHECKING:
    from cadre.infer.engine import Output
    from cadre.infer.sampling import TokenOut
    from cadre.serve.admission import Place

_DEFAULT_TOKENS = 16


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    service.check_model(body.model)
    many: Sequence[Any] = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
    told = bool(body.echo) and body.logprobs is not None
    # Who scores a text (lm-eval) asks for one new token and drops the last log-probability as that token's: so it must be
    # there, also where it ends the text and the engine would not tell it.
    dropped = told and body.max_tokens == 1 and not body.ignore_eos
    # Nothing to generate is still something to score.
    options = {"prompt_logprobs": told or body.max_tokens == 0} | ({"ignore_eos": True} if dropped else {})

    async def work(place: Place) -> Response:
        prompts = [await service.encode_any(prompt, echo=bool(body.echo), told=told) for prompt in many]
        new_tokens = [service.new_tokens(prompt, body.max_tokens, "max_tokens", _DEFAULT_TOKENS) for prompt in prompts]
        lengths = (most + told * len(prompt.ids) for prompt, most in zip(prompts, new_tokens, strict=True))
        check_logprobs(body.logprobs, sum(lengths) * (body.n or 1))
        form = CompletionFormat(service, body)
        requests = await service.sequences(place, form.name, body, prompts, new_tokens, logprobs=body.logprobs, **options)
        choices = choices_of(service, requests, prompts, keep=not body.stream)
        if dropped:
            for choice in choices:
                choice.ends = frozenset(service.card.config.end_tokens)
        return await answer(place, choices, requests, form, bool(body.stream))

    return await service.admission.serve(request, len(many) * (body.n or 1), work)


class CompletionFormat(AnswerFormat):
    """OpenAI's `text_completion` objects."""

    PREFIX, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        super().__init__(service, body)
        self.echo, self.logprobs_wanted = bool(body.echo), body.logprobs is not None

    def entry(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice, choice.prompt_logprobs, choice.tokens)
        return self._entry(choice, self._echo(choice) + "".join(choice.text), logprobs)

    def deltas(self, choice: Choice, piece: str, output: Output, *, first: bool) -> list[dict[str, Any]]:
        logprobs = self._logprobs(choice, output.prompt_logprobs or (), output.tokens)
        text = self._echo(choice) + piece if first else piece
        if not text and logprobs is None and choice.finish is None and not (self.routes and output.tokens):
            return []
        return [self._entry(choice, text, logprobs)]

    def _echo(self, choice: Choice) -> str:
        return choice.prompt.text if self.echo else ""

    def _entry(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, choice: Choice, prompt: Sequence[TokenOut], tokens: Sequence[TokenOut]) -> dict[str, Any] | None:
        """The log-probabilities of new tokens, after those of the prompt where it is echoed."""
        if not self.logprobs_wanted:
            return None
        prompt = prompt if self.echo else ()
        texts = self.service.texts
        told = [*prompt, *tokens]
        return {
            "tokens": (texts.text(token.id) for token in told),
            "token_logprobs": (token.logprob for token in told),
            "top_logprobs": map(self._top, told),
            "text_offset": chain(choice.prompt.offsets if prompt else (), self._offsets(choice, tokens)),
        }

    def _offsets(self, choice: Choice, tokens: Sequence[TokenOut]) -> Iterator[int]:
        """Where new tokens begin in the text, after the prompt where it is echoed."""
        start = len(self._echo(choice))
        for token in tokens:
            yield start + choice.offset
            choice.offset += self.service.texts.begun(token.id)

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
