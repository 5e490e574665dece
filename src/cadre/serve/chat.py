"""`/v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cadre.serve.answer import Choice, EventStream, choices_of, route_report, usage, whole
from cadre.serve.schema import ChatRequest, Message
from cadre.serve.service import Prompt, Service, check_logprobs, new_name
from cadre.serve.template import AnswerLine, transcript

if TYPE_CHECKING:
    from cadre.infer.engine import Output
    from cadre.infer.sampling import TokenOut


async def converse(service: Service, request: Request, body: ChatRequest) -> Response:
    service.check_model(body.model)
    service.loop.check(body.n or 1)
    prompt = await encode_chat(service, body.messages)
    asked, param = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, param = body.max_tokens, "max_tokens"
    shape = ChatShape(service, body)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    new_tokens = [service.new_tokens(prompt, asked, param)]
    check_logprobs(logprobs, new_tokens[0] * (body.n or 1))
    sequences = await service.sequences(shape.name, body, [prompt], new_tokens, logprobs=logprobs)
    choices = choices_of(service, sequences, [prompt], keep=not body.stream)
    if service.template is None:
        for choice in choices:
            choice.line = AnswerLine()
    stream = service.loop.submit(sequences)
    if body.stream:
        return EventStream(service.loop, stream, choices, shape)
    await whole(request, service.loop, stream, choices)
    return JSONResponse(shape.whole(choices))


async def encode_chat(service: Service, messages: Sequence[Message]) -> Prompt:
    """The prompt for the next message: by the model's template, or as a transcript where it has none."""
    plain = [_plain(message) for message in messages]
    if service.template is None:
        return await service.encode(transcript(plain))
    return await service.encode_messages(plain)


def _plain(message: Message) -> dict[str, str]:
    # `developer` is OpenAI's newer name of `system`; templates know the older one.
    plain = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    return plain if message.name is None else plain | {"name": message.name}


class ChatShape:
    """OpenAI's `chat.completion` objects and their chunks."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service, self.body = service, body
        self.name = new_name("chatcmpl")
        self.created = int(time.time())
        self.routes = body.cadre is not None and body.cadre.routes

    @property
    def usage_wanted(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        entries = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": self._logprobs(choice.tokens),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        return self._object("chat.completion", entries) | {"usage": usage(choices)}

    def chunks(self, choice: Choice, piece: str, output: Output, *, first: bool) -> list[dict[str, Any]]:
        chunks = [self._chunk(choice, {"role": "assistant", "content": ""}, None, None)] if first else []
        logprobs = self._logprobs(output.tokens)
        if piece or logprobs is not None or choice.finish is not None or (self.routes and output.tokens):
            chunk = self._chunk(choice, {"content": piece} if piece else {}, logprobs, choice.finish)
            if self.routes:
                chunk["cadre"] = route_report(self.service, choice, output)
            chunks.append(chunk)
        return chunks

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._object("chat.completion.chunk", []) | {"usage": usage}

    def _chunk(self, choice: Choice, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
        entry = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = self._object("chat.completion.chunk", [entry])
        if self.usage_wanted:
            chunk["usage"] = None
        return chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.service.card.name,
            "choices": choices,
        }

    def _logprobs(self, tokens: Sequence[TokenOut]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = []
        for token in tokens:
            top = [self._token(other, logprob) for other, logprob in token.top]
            content.append(self._token(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        texts = self.service.texts
        return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.raw(token))}
