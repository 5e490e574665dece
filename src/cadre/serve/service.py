"""What every endpoint works with: one model, its tokenizer and its engine, and the way from a request to sequences."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cadre.infer.engine import Request
from cadre.infer.generate import encode_prompt
from cadre.infer.sampling import Sampling
from cadre.serve.errors import ApiError, bad_request
from cadre.serve.schema import Generation
from cadre.serve.tokens import TokenTexts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.model.config import ModelConfig
    from cadre.serve.loop import EngineLoop
    from cadre.serve.template import ChatTemplate, Messages

_MOST_LOGPROBS = 1 << 20  # a hundred bytes each, and as many again as JSON

# A seed of OpenAI's may be negative, one of the engine's may not.
_SEEDS = 1 << 63


@dataclass(frozen=True)
class Card:
    """What clients see of the model. cache_bytes_per_token: what the cache keeps of one token in all layers;
    cache_bytes_per_token_mha: what multi-head attention of the same heads would. base_model: it was not trained to chat, as
    far as its directory tells."""

    name: str
    config: ModelConfig
    cache_bytes_per_token: int
    cache_bytes_per_token_mha: int
    base_model: bool = True
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Prompt:
    """Token ids and the text they stand for."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Service:
    card: Card
    tokenizer: Tokenizer
    template: ChatTemplate | None
    texts: TokenTexts
    loop: EngineLoop
    timeout: float  # seconds that a request may take in all
    compiling: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @property
    def context(self) -> int:
        """Tokens of the longest sequence, prompt and continuation: the model's context, or what the cache holds if less."""
        return self.loop.engine.max_length

    def model_object(self) -> dict[str, Any]:
        """The model as `/v1/models` describes it; what is under `cadre` is for the chat page."""
        config, card = self.card.config, self.card
        return {
            "id": card.name,
            "object": "model",
            "created": card.created,
            "owned_by": "cadre",
            "max_model_len": self.context,
            "cadre": {
                "chat_template": self.template is not None,
                "base_model": card.base_model,
                "context": self.context,
                "cache_bytes_per_token": card.cache_bytes_per_token,
                "cache_bytes_per_token_mha": card.cache_bytes_per_token_mha,
                "experts": config.n_routed_experts or 0,
                "top_k": config.num_experts_per_tok or 0,
                "sparse_layers": [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)],
            },
        }

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.card.name:
            message = f"the model {name[:80]!r} is not here: this server has {self.card.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str) -> Prompt:
        """A prompt's ids as the tokenizer writes them, its own special tokens included. In a thread: a long text takes
        a while."""
        return Prompt(tuple(await asyncio.to_thread(encode_prompt, self.card.config, self.tokenizer, text)), text)

    async def encode_messages(self, messages: Messages) -> Prompt:
        """Chat messages through the model's template; the template writes special tokens itself."""
        assert self.template is not None
        text = await asyncio.to_thread(self.template.render, messages)
        encoded = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=False)
        return Prompt(tuple(encoded.ids), text) if encoded.ids else await self.encode(text)

    async def encode_any(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
        """The prompts of a completion request, given in any of the four ways."""
        many: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        return [await self.encode(one) if isinstance(one, str) else self.decode(one) for one in many]

    async def tokenize(self, text: str, special: bool) -> list[int]:
        """A text's ids, as they are: of no text there are none."""
        encoded = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=special)
        return encoded.ids

    def decode(self, ids: Sequence[int], param: str = "prompt") -> Prompt:
        words = self.card.config.vocab_size
        wrong = next((token for token in ids if token >= words), None)
        if wrong is not None:
            raise bad_request(f"token id {wrong} is outside the model's vocabulary (0 to {words - 1})", param)
        return Prompt(tuple(ids), self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def new_tokens(self, prompt: Prompt, asked: int | None, param: str, default: int | None = None) -> int:
        """How many tokens to generate at most. Raises `ApiError` for a prompt that leaves no room for those asked for."""
        context, length = self.context, len(prompt.ids)
        room = context - length
        if room < (1 if asked is None else asked):
            more = "none is left for an answer" if asked is None else f"{asked:,} more are asked for"
            raise bad_request(
                f"the prompt has {length:,} tokens and {more}, but the context is {context:,} tokens",
                "prompt" if room < 1 else param, "context_length_exceeded",
            )  # fmt: skip
        if asked is not None:
            return asked
        return room if default is None else min(room, default)

    async def sequences(
        self, name: str, body: Generation, prompts: Sequence[Prompt], new_tokens: Sequence[int], **options: Any
    ) -> list[Request]:
        """What the engine is to run: `n` sequences for each prompt, in the order of the answer's choices. `options` are
        of `Request`, but for `logprobs` of `Sampling`. Raises `UsageError` for what the engine would refuse."""
        sampling = self._sampling(body, options.pop("logprobs"))
        sampling.check_vocabulary(self.card.config.vocab_size)
        if sampling.json_schema is not None or sampling.regex is not None:
            # Compiled here, out of the engine's way, which will find it; one at a time, for each may need 100 MB.
            async with self.compiling:
                await asyncio.to_thread(self.loop.engine.constraints.start, sampling)
        shared: dict[str, Any] = {
            "stop": body.stops,
            "ignore_eos": bool(body.ignore_eos),
            "deadline": time.monotonic() + self.timeout,
            "routes": body.cadre is not None and body.cadre.routes,
        } | options
        requests: list[Request] = []
        for prompt, most in zip(prompts, new_tokens, strict=True):
            for number in range(body.n or 1):
                # The choices of one prompt must differ, and again be the same for the same seed.
                seed = None if body.seed is None else (body.seed + number) % _SEEDS
                own = replace(sampling, seed=seed)
                requests.append(Request(f"{name}-{len(requests)}", prompt.ids, most, own, **shared))
        return requests

    def _sampling(self, body: Generation, logprobs: int | None) -> Sampling:
        schema, regex = body.grammar
        return Sampling(
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
            logprobs=logprobs,
            json_schema=schema,
            regex=regex,
        )


def check_logprobs(each: int | None, tokens: int) -> None:
    """Raise `ApiError` if so many log-probabilities for each of so many tokens would fill the memory."""
    if each is not None and (each + 1) * tokens > _MOST_LOGPROBS:
        raise bad_request(
            f"{each} likeliest tokens for each of up to {tokens:,} are more than the {_MOST_LOGPROBS:,} log-probabilities"
            " that an answer may have: ask for fewer, or for fewer new tokens",
            "logprobs",
        )


def new_name(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
