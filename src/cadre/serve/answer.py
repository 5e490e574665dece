"""From the engine's outputs to an HTTP answer, whole or streamed, for both kinds of completion."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cadre.infer.text import AnswerLine, Detokenizer
from cadre.serve.errors import ApiError, server_error, too_late
from cadre.serve.pieces import dumps, written
from cadre.serve.service import Prompt, Service

if TYPE_CHECKING:
    from cadre.infer.engine import Output
    from cadre.infer.engine import Request as Sequenced
    from cadre.infer.sampling import TokenOut
    from cadre.serve.admission import Place
    from cadre.serve.loop import Stream
    from cadre.serve.schema import Generation

# A comment keeps proxies from closing a stream whose first token waits in the queue.
_SILENCE = 15.0
_PING = ": waiting\n\n"
# Outputs that a stream may take in one go: many have piled up when its client was slow.
_AT_ONCE = 32


@dataclass
class Choice:
    """One sequence of an answer as it grows. `keep`: whether its text and tokens are needed once the answer is complete."""

    index: int
    name: str
    prompt: Prompt
    keep: bool
    line: AnswerLine | None = None
    routes: Detokenizer | None = None
    ends: frozenset[int] = frozenset()  # end-of-text tokens that the engine was told to ignore
    text: list[str] = field(default_factory=list)
    tokens: list[TokenOut] = field(default_factory=list)
    prompt_logprobs: tuple[TokenOut, ...] = ()
    begun: bool = False
    generated: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    offset: int = 0  # characters of the new text whose tokens have been told

    def take(self, output: Output) -> str:
        """Add an output; the text it brings. Raises `ApiError` if the sequence ended for a reason that is no answer."""
        self.generated += len(output.tokens)
        self.cached_tokens = output.cached_tokens
        piece = output.text if self.line is None else self.line.push(output.text)
        self.finish = output.finish
        if output.tokens and output.tokens[0].id in self.ends:
            piece, self.finish = "", "stop"
        if self.line is not None and self.line.ended:
            self.finish = "stop"
        if self.finish not in (None, "stop", "length"):
            raise _no_answer(self.finish)
        if self.keep:
            self.text.append(piece)
            self.tokens += output.tokens
            self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        return piece


class AnswerFormat(ABC):
    """How one kind of completion is written down. Lists that may be long are iterators (see `pieces`)."""

    PREFIX: ClassVar[str]
    WHOLE: ClassVar[str]
    CHUNK: ClassVar[str]

    def __init__(self, service: Service, body: Generation) -> None:
        self.service = service
        self.name = f"{self.PREFIX}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.routes = body.cadre is not None and body.cadre.routes
        self.usage_wanted = body.stream_options is not None and body.stream_options.include_usage

    @abstractmethod
    def entry(self, choice: Choice) -> dict[str, Any]:
        """A choice that has taken all its outputs."""

    @abstractmethod
    def deltas(self, choice: Choice, piece: str, output: Output, *, first: bool) -> list[dict[str, Any]]:
        """What there is to tell of a piece of text that a choice has taken from an output."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._object(self.WHOLE, [self.entry(choice) for choice in choices]) | {"usage": usage(choices)}

    def chunks(self, choice: Choice, piece: str, output: Output, *, first: bool) -> list[dict[str, Any]]:
        chunks = []
        for delta in self.deltas(choice, piece, output, first=first):
            chunk = self._object(self.CHUNK, [delta])
            if self.usage_wanted:
                chunk["usage"] = None
            chunks.append(chunk)
        if chunks and self.routes:
            chunks[-1]["cadre"] = route_report(self.service, choice, output)
        return chunks

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._object(self.CHUNK, []) | {"usage": usage(choices)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.service.card.name,
            "choices": choices,
        }


async def answer(
    place: Place, choices: Sequence[Choice], requests: Sequence[Sequenced], form: AnswerFormat, stream: bool
) -> Response:
    """What the engine makes of a request, as a stream or as a whole. Raises `ApiError` for a whole without an answer."""
    running = place.submit(requests)
    if stream:
        return EventStream(place, running, choices, form)
    async for choice, output in _outputs(place, running, choices):
        if choice is not None and output is not None:
            choice.take(output)
    return Response(await written(form.whole(choices)), media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events as the engine's outputs come. However it ends, it leaves its place."""

    def __init__(self, place: Place, stream: Stream, choices: Sequence[Choice], form: AnswerFormat) -> None:
        place.kept, self.place = True, place
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_events(place, stream, choices, form), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.place.leave()


async def _events(place: Place, stream: Stream, choices: Sequence[Choice], form: AnswerFormat) -> AsyncIterator[str]:
    try:
        async for choice, output in _outputs(place, stream, choices):
            if choice is None or output is None:
                yield _PING
                continue
            piece, first, choice.begun = choice.take(output), not choice.begun, True
            for chunk in form.chunks(choice, piece, output, first=first):
                # A prompt's log-probabilities come all at once.
                yield _event(dumps(chunk) if output.prompt_logprobs is None else await written(chunk))
    except ApiError as error:
        yield _event(dumps(error.body))
        return
    if form.usage_wanted:
        yield _event(dumps(form.usage_chunk(choices)))
    yield _event("[DONE]")


async def _outputs(
    place: Place, stream: Stream, choices: Sequence[Choice]
) -> AsyncIterator[tuple[Choice, Output] | tuple[None, None]]:
    """Each output with its choice, in order, until all choices have finished; (None, None) after a while of silence. Raises
    `ApiError` if the stream fails or its time is over."""
    named = {choice.name: choice for choice in choices}
    while True:
        try:
            async with asyncio.timeout(min(_SILENCE, place.deadline - time.monotonic())):
                outputs = await stream.next()
        except TimeoutError:
            if time.monotonic() >= place.deadline:
                raise too_late() from None
            yield None, None
            continue
        if not outputs:
            return
        for number, output in enumerate(outputs, 1):
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
            choice = named[output.id]
            if choice.finish is None:
                yield choice, output
                if choice.finish is not None and output.finish is None:
                    place.admission.loop.cancel(stream, choice.finish, only=choice.name)


def usage(choices: Iterable[Choice]) -> dict[str, Any]:
    """OpenAI's count of tokens: a prompt counts once however many choices it has."""
    choices = list(choices)
    first = {id(choice.prompt): choice for choice in reversed(choices)}.values()
    prompt, generated = sum(len(choice.prompt.ids) for choice in first), sum(choice.generated for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in first)},
    }


def route_report(service: Service, choice: Choice, output: Output) -> dict[str, Any]:
    """What the chat page shows of each token. The tokens' texts joined are the choice's text, stop strings aside."""
    assert choice.routes is not None
    tokens = [{"id": t.id, "text": choice.routes.push(t.id), "experts": t.experts} for t in output.tokens]
    return {
        "tokens": tokens,
        "positions": len(choice.prompt.ids) + choice.generated,
        "cache_bytes_per_token": service.card.cache_bytes_per_token,
        "cache_bytes_per_token_mha": service.card.cache_bytes_per_token_mha,
    }


def choices_of(service: Service, sequences: Sequence[Sequenced], prompts: Sequence[Prompt], *, keep: bool) -> list[Choice]:
    """A choice for each sequence; of each prompt as many."""
    each = len(sequences) // len(prompts)
    choices = []
    for index, sequence in enumerate(sequences):
        choice = Choice(index, sequence.id, prompts[index // each], keep)
        if sequence.routes:
            choice.routes = Detokenizer(service.tokenizer, sequence.prompt_ids)
        choices.append(choice)
    return choices


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _no_answer(finish: str) -> ApiError:
    if finish == "deadline":
        return too_late()
    if finish == "abort":
        return server_error(503, "the request was cancelled", "cancelled")
    reason = "its logits are not finite (damaged weights, diverged training), or the schema asked for is too much work"
    return server_error(500, f"the model could not go on: {reason}", "model_failed", retry=False)
