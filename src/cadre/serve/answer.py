"""From the engine's outputs to an HTTP answer, whole or streamed, for both kinds of completion."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cadre.infer.text import Detokenizer
from cadre.serve.errors import ApiError, server_error
from cadre.serve.service import Prompt, Service
from cadre.serve.template import AnswerLine

if TYPE_CHECKING:
    from cadre.infer.engine import Output
    from cadre.infer.engine import Request as Sequenced
    from cadre.infer.sampling import TokenOut
    from cadre.serve.loop import EngineLoop, Stream

# A comment keeps proxies from closing a stream whose first token waits in the queue.
_SILENCE = 15.0
_PING = b": waiting\n\n"


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
    offset: int = 0  # characters of the text, prompt included if echoed, whose tokens have been told

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


class Shape(Protocol):
    """How one kind of completion is written down."""

    @property
    def usage_wanted(self) -> bool: ...

    def chunks(self, choice: Choice, piece: str, output: Output, *, first: bool) -> list[dict[str, Any]]:
        """The chunks for a piece of text that a choice has taken from an output; none if there is nothing to tell."""

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]: ...


async def whole(request: Request, loop: EngineLoop, stream: Stream, choices: Sequence[Choice]) -> None:
    """Let every choice take its outputs. Raises `ApiError` for one that ends without an answer. Everything is cancelled
    if the client leaves first."""

    async def collect() -> None:
        async for choice, output in _outputs(loop, stream, choices):
            if choice is not None and output is not None:
                choice.take(output)

    reader, gone = asyncio.create_task(collect()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((reader, gone), return_when=asyncio.FIRST_COMPLETED)
        if not reader.done():
            raise ApiError(499, "the client has left", code="client_closed_request")  # nobody reads this
        await reader
    finally:
        reader.cancel()
        gone.cancel()
        loop.cancel(stream)


class EventStream(StreamingResponse):
    """Server-sent events from a generator of chunks. However it ends, the engine stops working on it."""

    def __init__(self, loop: EngineLoop, stream: Stream, choices: Sequence[Choice], shape: Shape) -> None:
        self.loop, self.stream = loop, stream
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_events(loop, stream, choices, shape), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.loop.cancel(self.stream)


async def _events(
    loop: EngineLoop, stream: Stream, choices: Sequence[Choice], shape: Shape
) -> AsyncIterator[bytes]:
    try:
        async for choice, output in _outputs(loop, stream, choices):
            if choice is None or output is None:
                yield _PING
                continue
            piece, first, choice.begun = choice.take(output), not choice.begun, True
            data = b"".join(map(_event, shape.chunks(choice, piece, output, first=first)))
            if data:
                yield data
    except ApiError as error:
        yield _event(error.body)
        return
    if shape.usage_wanted:
        yield _event(shape.usage_chunk(usage(choices)))
    yield b"data: [DONE]\n\n"


async def _outputs(
    loop: EngineLoop, stream: Stream, choices: Sequence[Choice]
) -> AsyncIterator[tuple[Choice, Output] | tuple[None, None]]:
    """Each output with its choice, in order, until all choices have finished; (None, None) after a while of silence."""
    named = {choice.name: choice for choice in choices}
    while True:
        try:
            async with asyncio.timeout(_SILENCE):
                outputs = await stream.next()
        except TimeoutError:
            yield None, None
            continue
        if not outputs:
            return
        for output in outputs:
            choice = named[output.id]
            if choice.finish is None:
                yield choice, output
                if choice.finish is not None and output.finish is None:
                    loop.cancel(stream, only=choice.name)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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


def choices_of(
    service: Service, sequences: Sequence[Sequenced], prompts: Sequence[Prompt], *, keep: bool
) -> list[Choice]:
    """A choice for each sequence; of each prompt as many."""
    each = len(sequences) // len(prompts)
    choices = []
    for index, sequence in enumerate(sequences):
        choice = Choice(index, sequence.id, prompts[index // each], keep)
        if sequence.routes:
            choice.routes = Detokenizer(service.tokenizer, sequence.prompt_ids)
        choices.append(choice)
    return choices


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _no_answer(finish: str) -> ApiError:
    if finish == "deadline":
        # The same again would take as long: the client should not simply repeat it.
        return server_error(504, "the request took longer than this server allows", "deadline_exceeded", retry=False)
    if finish == "abort":
        return server_error(503, "the request was cancelled", "cancelled")
    reason = "its logits are not finite (damaged weights, diverged training), or the schema asked for is too much work"
    return server_error(500, f"the model could not go on: {reason}", "model_failed", retry=False)
