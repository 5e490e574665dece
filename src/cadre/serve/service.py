"""What every endpoint works with: one model, its tokenizer and its engine, and the way from a request to sequences."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cadre.errors import encodable
from cadre.infer.engine import Request
from cadre.infer.generate import encode_prompt
from cadre.infer.sampling import Sampling
from cadre.serve.errors import ApiError, bad_request
from cadre.serve.schema import Generation
from cadre.serve.tokens import TokenTexts

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from cadre.infer.chat import Render
    from cadre.infer.constraint import Constraint
    from cadre.model.config import ModelConfig
    from cadre.serve.admission import Admission, Place

_MOST_LOGPROBS = 100_000  # a hundred bytes each, and as many again as JSON

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
    """Token ids and the text they stand for. offsets: where each token begins in it, if asked for."""

    ids: tuple[int, ...]
    text: str
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Service:
    card: Card
    tokenizer: Tokenizer
    render: Render | None
    texts: TokenTexts
    admission: Admission

    @property
    def context(self) -> int:
        """Tokens of the longest sequence, prompt and continuation: the model's context, or what the cache holds if less."""
        return self.admission.loop.engine.max_length

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
                "chat_template": self.render is not None,
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

    async def encode(self, text: str, special: bool = True, *, told: bool = False) -> Prompt:
        """A prompt's ids as the tokenizer writes them, never none. told: with their offsets. Raises `ApiError` for a text that
        is too long whatever its tokens, before any work on it."""
        if len(text) > self.context * self.texts.longest:
            raise bad_request(
                f"the prompt has {len(text):,} characters, but the context is {self.context:,} tokens"
                f" of at most {self.texts.longest} characters", "prompt", "context_length_exceeded",
            )  # fmt: skip
        encoded = await self._encoded(text, special, told)
        ids = encoded.ids or encode_prompt(self.card.config, self.tokenizer, "")
        wanted = told and len(ids) <= self.context  # a longer one is refused next
        return Prompt(tuple(ids), text, tuple(start for start, _ in encoded.offsets) or (0,) if wanted else ())

    async def encode_any(self, prompt: str | list[int], *, echo: bool, told: bool) -> Prompt:
        """One prompt of a completion, text or token ids; of the latter the text is needed only for an `echo`."""
        if isinstance(prompt, str):
            return await self.encode(prompt, told=told)
        self.check_ids(prompt, "prompt")
        if not echo or len(prompt) > self.context:  # which is refused next
            return Prompt(tuple(prompt), "")
        text = await self.decode(prompt)
        return Prompt(tuple(prompt), text, self.texts.offsets(prompt, text) if told else ())

    async def tokenize(self, text: str, special: bool) -> list[int]:
        """A text's ids, as they are: of no text there are none, of a long one more than the context holds."""
        return (await self._encoded(text, special)).ids

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens written out."""
        # Unlike `decode`, this lets other threads run meanwhile.
        decode = partial(self.tokenizer.decode_batch, skip_special_tokens=False)
        return (await self.admission.in_thread(self.admission.texts, decode, [ids]))[0]

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        words, most = self.card.config.vocab_size, max(ids, default=0)
        if most >= words:
            raise bad_request(f"token id {most} is outside the model's vocabulary (0 to {words - 1})", param)

    async def _encoded(self, text: str, special: bool, offsets: bool = False) -> Encoding:
        # Unlike `encode`, these let other threads run meanwhile; the fast one tells no offsets.
        batch = self.tokenizer.encode_batch if offsets else self.tokenizer.encode_batch_fast

        def encode() -> Encoding:
            with encodable("the prompt"):
                return batch([text], add_special_tokens=special)[0]

        return await self.admission.in_thread(self.admission.texts, encode)

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
        self,
        place: Place,
        name: str,
        body: Generation,
        prompts: Sequence[Prompt],
        new_tokens: Sequence[int],
        **options: Any,
    ) -> list[Request]:
        """What the engine is to run: `n` sequences for each prompt, in the order of the answer's choices. `options` are
        of `Request`, but for `logprobs` of `Sampling`. Raises `UsageError` for what the engine would refuse."""
        sampling = self._sampling(body, options.pop("logprobs"))
        sampling.check_vocabulary(self.card.config.vocab_size)
        count = len(prompts) * (body.n or 1)
        constraints: list[Constraint | None] = [None] * count
        if sampling.json_schema is not None or sampling.regex is not None:
            # Out of the engine's way, to which they are handed: when many wait, not all of their grammars are kept.
            admission, start = self.admission, self.admission.loop.engine.constraints.start
            constraints = await admission.in_thread(admission.grammars, lambda: [start(sampling) for _ in range(count)])
        shared: dict[str, Any] = {
            "stop": body.stops,
            "ignore_eos": bool(body.ignore_eos),
            "deadline": place.deadline,
            "routes": body.cadre is not None and body.cadre.routes,
        } | options
        requests: list[Request] = []
        for prompt, most in zip(prompts, new_tokens, strict=True):
            for number in range(body.n or 1):
                # The choices of one prompt must differ, and again be the same for the same seed.
                seed = None if body.seed is None else (body.seed + number) % _SEEDS
                own = replace(sampling, seed=seed)
                constraint = constraints[len(requests)]
                requests.append(Request(f"{name}-{len(requests)}", prompt.ids, most, own, constraint=constraint, **shared))
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


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
