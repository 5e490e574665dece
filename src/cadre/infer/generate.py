"""Decoding: the model reads a prompt once, then writes one token after the other from its cache.

Letters in names: T position, W vocabulary (words); the batch is one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cadre.errors import RunError, UsageError
from cadre.infer.cache import DecodingCache
from cadre.infer.sampling import Sampling, sample
from cadre.infer.text import Detokenizer, StopStrings
from cadre.model.config import ModelConfig
from cadre.model.scoring import document_start
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Decoder:
    """One sequence in the making: the cache of what the model has read, and the ids it has yet to read.

    Puts the model in eval mode. `max_length` bounds the sequence, what is fed and what is generated. An interrupt at any
    moment loses no more than the token in work: the sequence can be continued.
    """

    def __init__(self, model: Transformer, max_length: int) -> None:
        weight = model.embed_tokens.weight
        self.model = model.eval()
        self.cache = DecodingCache(model.config, 1, max_length, model.compute_dtype or weight.dtype, weight.device)
        self.unread_1T = torch.empty(1, 0, dtype=torch.int64, device=weight.device)

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return self.cache.length + self.unread_1T.shape[1]

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self.cache.max_length - self.length

    def feed(self, ids: Sequence[int]) -> None:
        """Continue the sequence with given ids. Raises `UsageError` for one that the vocabulary lacks."""
        words = self.model.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < words), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is outside the model's vocabulary (0 to {words - 1})")
        new_1T = torch.tensor([ids], dtype=torch.int64, device=self.unread_1T.device)
        self.unread_1T = torch.cat((self.unread_1T, new_1T), dim=1)

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Read what is unread, at least one token; logits [1, W] of the token after it."""
        hidden_1TD = self.model.hidden(self.unread_1T, self.cache)
        self.unread_1T = self.unread_1T[:, :0]
        return self.model.lm_head(hidden_1TD[:, -1])

    @torch.inference_mode()
    def stream(
        self, max_new_tokens: int, sampling: Sampling, generator: torch.Generator, ends: frozenset[int]
    ) -> Iterator[int]:
        """Generate ids until one of `ends` (not given out, and no part of the sequence), `max_new_tokens`, or the end of
        the room. Raises `RunError` if the logits are not finite."""
        for number in range(min(max_new_tokens, self.room)):
            logits_1W = self.next_logits()
            if number == 0 and not logits_1W.isfinite().all():
                raise RunError("the model's logits are not finite: its weights are damaged or its training diverged")
            token_1 = sample(logits_1W, sampling, generator)
            token = int(token_1)
            if token in ends:
                return
            self.unread_1T = token_1[None]
            yield token


def generate_ids(
    model: Transformer,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> list[int]:
    """Continue token ids (at least one); returns the new ids, without the end-of-text token that ended them.

    As `generate` in all else.
    """
    sampling = Sampling(temperature, top_p, top_k)
    return list(_stream_ids(model, list(ids), max_new_tokens, sampling, seed))


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """As `generate`, piece by piece: each piece of text as soon as it is certain. The pieces hold whole characters only and
    no part of a stop string; joined they are what `generate` returns. Errors are raised at the call, not at the first piece.
    """
    if tokenizer is None:
        raise UsageError("this model has no tokenizer: text needs one; generate_ids continues token ids")
    sampling = Sampling(temperature, top_p, top_k)
    stops = StopStrings((stop,) if isinstance(stop, str) else stop)
    ids = encode_prompt(model.config, tokenizer, prompt)
    return _text(_stream_ids(model, ids, max_new_tokens, sampling, seed), Detokenizer(tokenizer, ids), stops)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> str:
    """The model's continuation of a prompt: the new text, without the prompt.

    The prompt is encoded as the tokenizer does it, its own beginning-of-text token and special tokens written out
    included; an empty prompt is the start of a document. Generation ends at the config's end-of-text token, before the
    first of the `stop` strings, after `max_new_tokens`, or when prompt and continuation fill the model's context. For
    temperature, top_p and top_k see `Sampling`. The same seed gives the same text on the same machine; without one each
    call draws anew. Puts the model in eval mode.

    Raises `UsageError` for a prompt longer than the context and values out of range, `RunError` if the model's logits are
    not finite.
    """
    return "".join(
        stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
        )
    )


def encode_prompt(config: ModelConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's ids, never none. Raises `UsageError` for text that is no Unicode (half a surrogate pair)."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid Unicode text (character {error.start})") from None
    return tokenizer.encode(prompt).ids or [document_start(config, tokenizer)]


def end_ids(config: ModelConfig) -> frozenset[int]:
    """The ids that end a text."""
    ends = config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def seeded(seed: int | None, device: torch.device) -> torch.Generator:
    """Random numbers for sampling; without a seed, others each time. Raises `UsageError` for a seed out of range."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    elif 0 <= seed < 2**63:
        generator.manual_seed(seed)
    else:
        raise UsageError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    return generator


def _stream_ids(
    model: Transformer, ids: list[int], max_new_tokens: int, sampling: Sampling, seed: int | None
) -> Iterator[int]:
    context = model.config.max_position_embeddings
    if not ids:
        raise UsageError("the prompt has no tokens: give at least one")
    if len(ids) > context:
        raise UsageError(f"the prompt has {len(ids):,} tokens, but the model's context is {context:,}: shorten it")
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    decoder = Decoder(model, min(len(ids) + max_new_tokens, context))
    decoder.feed(ids)
    generator = seeded(seed, decoder.unread_1T.device)
    return decoder.stream(max_new_tokens, sampling, generator, end_ids(model.config))


def _text(ids: Iterator[int], detokenizer: Detokenizer, stops: StopStrings) -> Iterator[str]:
    for token in ids:
        piece = stops.push(detokenizer.push(token))
        if piece:
            yield piece
        if stops.hit:
            return
    rest = stops.rest()
    if rest:
        yield rest
