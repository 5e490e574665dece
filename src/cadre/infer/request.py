"""What the engine is asked, what it answers, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cadre.errors import UsageError

if TYPE_CHECKING:
    from cadre.infer.constraint import Constraint
    from cadre.infer.sampling import Sampling, TokenOut
    from cadre.model.config import ModelConfig


@dataclass(frozen=True)
class Request:
    """What the engine is asked to do: continue `prompt_ids` (at least one) by at most `max_new_tokens`.

    id: any name that no other living request has. stop: strings before which the text ends. ignore_eos: the end-of-text
    token is one like any other. deadline: a `time.monotonic()` value after which the request is given up. routes: every
    TokenOut tells its experts. prompt_logprobs: the first output tells the log-probability of every prompt token, with
    `sampling.logprobs` likeliest ones; `max_new_tokens` may then be 0. constraint: what holds the answer to the grammar of
    `sampling`, started for this request alone; None: the engine starts it, which may take it a second.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    deadline: float | None = None
    routes: bool = False
    prompt_logprobs: bool = False
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Output:
    """What one step adds to a request.

    id: the request's. tokens: new ones, without the end-of-text token that ended the text (unless `ignore_eos`), with those
    of a stop string. text: the piece of text that has become certain, "" without a tokenizer. finish: None while it goes
    on; "stop" at end-of-text or a stop string, "length" after `max_new_tokens` or at the end of the context or the cache,
    "abort", "deadline", "error" if the logits are not finite. cached_tokens: prompt tokens found by prefix sharing.
    prompt_logprobs: with the first output if asked for, one for each prompt token, the first one's None.
    """

    id: str
    tokens: tuple[TokenOut, ...]
    text: str
    finish: str | None
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: tuple[TokenOut, ...] | None = None


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, of requests, tokens and pages; expert_load: tokens that each expert of each
    sparse layer has had; step_seconds: spent in `steps` steps."""

    waiting: int
    running: int
    finished: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    pages_used: int
    pages_total: int
    preemptions: int
    drafts_proposed: int
    drafts_accepted: int
    expert_load: tuple[tuple[int, ...], ...]
    steps: int
    step_seconds: float


def check(request: Request, config: ModelConfig, held: int | None = None) -> None:
    """Raise `UsageError` if a model, with a cache that holds `held` tokens, can never run a request."""
    prompt, words, context = request.prompt_ids, config.vocab_size, config.max_position_embeddings
    if not prompt:
        raise UsageError("the prompt has no tokens: give at least one")
    if not 0 <= min(prompt) <= max(prompt) < words:
        wrong = next(token for token in prompt if not 0 <= token < words)
        raise UsageError(f"token id {wrong} is outside the model's vocabulary (0 to {words - 1})")
    if len(prompt) > context:
        raise UsageError(f"the prompt has {len(prompt):,} tokens, but the model's context is {context:,}: shorten it")
    if held is not None and len(prompt) > held:
        raise UsageError(f"the prompt has {len(prompt):,} tokens, but the cache holds {held:,}: shorten it, or give more")
    if request.max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 0")
    request.sampling.check_vocabulary(words)
