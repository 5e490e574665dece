"""`/v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response

from cadre.infer.chat import transcript
from cadre.infer.text import AnswerLine
from cadre.serve.answer import AnswerFormat, Choice, answer, choices_of
from cadre.serve.schema import ChatRequest, Message
from cadre.serve.service import Service, check_logprobs

if TYPE_CHECKING:
    from cadre.infer.engine import Output
    from cadre.infer.sampling import TokenOut
    from cadre.serve.admission import Place


async def converse(service: Service, request: Request, body: ChatRequest) -> Response:
    service.check_model(body.model)
    asked, param = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, param = body.max_tokens, "max_tokens"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None

    async def work(place: Place) -> Response:
        prompt = await service.encode(*await chat_text(service, body.messages))
        new_tokens = service.new_tokens(prompt, asked, param)
        check_logprobs(logprobs, new_tokens * (body.n or 1))
        form = ChatFormat(service, body)
        requests = await service.sequences(place, form.name, body, [prompt], [new_tokens], logprobs=logprobs)
        choices = choices_of(service, requests, [prompt], keep=not body.stream)
        if service.render is None and body.grammar == (None, None):  # a grammar says itself where an answer ends
            for choice in choices:
                choice.line = AnswerLine()
        return await answer(place, choices, requests, form, bool(body.stream))

    return await service.admission.serve(request, body.n or 1, work)


async def chat_text(service: Service, messages: Sequence[Message]) -> tuple[str, bool]:
    """What the model reads of messages: by its template, or as a transcript where it has none. And whether the tokenizer adds
    its special tokens: a template writes them itself."""
    plain = [_plain(message) for message in messages]
    if service.render is None:
        return transcript(plain), True
    return await service.admission.in_thread(service.admission.texts, service.render, plain), False


def _plain(message: Message) -> dict[str, str]:
    # `developer` is OpenAI's newer name of `system`; templates know the older one.
    plain = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    return plain if message.name is None else plain | {"name": message.name}


class ChatFormat(AnswerFormat):
    """OpenAI's `chat.completion` objects and their chunks."""

    PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatRequest) -> None:
        super().__init__(service, body)
        self.logprobs_wanted = bool(body.logprobs)

    def entry(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        }

    def deltas(self, choice: Choice, piece: str, output: Output, *, first: bool) -> list[dict[str, Any]]:
        deltas = [_delta(choice, {"role": "assistant", "content": ""}, None, None)] if first else []
        logprobs = self._logprobs(output.tokens)
        if piece or logprobs is not None or choice.finish is not None or (self.routes and output.tokens):
            deltas.append(_delta(choice, {"content": piece} if piece else {}, logprobs, choice.finish))
        return deltas

    def _logprobs(self, tokens: Iterable[TokenOut]) -> dict[str, Any] | None:
        return {"content": map(self._told, tokens), "refusal": None} if self.logprobs_wanted else None

    def _told(self, token: TokenOut) -> dict[str, Any]:
        top = [self._token(other, logprob) for other, logprob in token.top]
        return self._token(token.id, token.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        texts = self.service.texts
        return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.raw(token))}


def _delta(choice: Choice, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
