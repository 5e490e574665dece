"""Choosing the next token of each sequence from the model's logits: what may be asked for, and what a sequence remembers.

Letters in names: B batch (sequences), W vocabulary (words), N some of its words.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadre.errors import UsageError
from cadre.infer.draw import Rule, draw, draw_filtered, in_blocks, likeliest, log_total, top

if TYPE_CHECKING:
    from cadre.infer.constraint import Constraint


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises `UsageError` for a value out of range.

    What is asked for is applied in this order (each as in vLLM and `transformers`):
    - json_schema or regex (one of them, as text): only tokens that keep the answer within it may be drawn, one that ends it
      only where it may end (infer/constraint.py). The expression matches the whole answer; its dialect is that of Rust's
      regex: Unicode classes, no look-around, no back-references.
    - logit_bias: (token id, what is added to its logit, -100 to 100) pairs. `check_vocabulary` checks the ids.
    - repetition_penalty: the logits of tokens that the prompt or the answer holds are divided by it where positive,
      multiplied where negative (arXiv 1909.05858, section 4.1); above 1 discourages them, 1 does nothing.
    - presence_penalty, frequency_penalty: subtracted from the logit of a token that the answer holds, the second once for
      each time it does; -2 to 2, 0 does nothing.
    - temperature: what the logits are divided by; 0 always takes the likeliest token, and nothing below matters.
    - top_k: only the k likeliest tokens; 0 for all. Among equals here and in top_p the lower ids come first.
    - top_p: only the likeliest tokens that together reach this share of what top_k left, the one that crosses it included
      (nucleus sampling, arXiv 1904.09751, section 3.1).
    - min_p: only tokens at least this many times as likely as the likeliest (arXiv 2407.01082, section 3).

    seed: 0 to 2^63 - 1; the same seed gives the same draws. None: others each time.
    logprobs: None for none, k for the log-probability of the chosen token and of the k likeliest. They are the model's own:
    before everything above.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1e3:
            raise UsageError(f"temperature is {self.temperature}; it must be from 0 to 1000")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be 0 (no limit) or more")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}; it must be from 0 to 1")
        # Beyond this range float32 logits would overflow or vanish.
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}; it must be from 0.001 to 1000 (1 for none)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                raise UsageError(f"{name} is {value}; it must be from -2 to 2")
        seen = set()
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise UsageError(f"logit_bias of token {token} is {bias}; it must be from -100 to 100")
            if token in seen:
                raise UsageError(f"logit_bias has token {token} twice; give each token once")
            seen.add(token)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs is {self.logprobs}; it must be 0 or more likeliest tokens, or none at all")
        if self.json_schema is not None and self.regex is not None:
            raise UsageError("json_schema and regex are both given; an answer can be held to one of them")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `UsageError` if logit_bias names a token that a vocabulary of this size lacks."""
        for token, _ in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise UsageError(f"logit_bias has token id {token}, outside the model's vocabulary (0 to {vocab_size - 1})")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < torch.finfo(torch.float32).tiny

    @property
    def filtered(self) -> bool:
        """Whether top_k, top_p or min_p may leave tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class TokenOut:
    """A chosen token. logprob and top (the likeliest tokens and theirs, falling) are there if `Sampling.logprobs` asked.

    experts: per sparse layer the experts chosen at the position that produced the token, if the request asked.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    experts: tuple[tuple[int, ...], ...] | None = None


class Sampler:
    """The choices of one sequence: its random numbers, the tokens so far that penalties count, its constraint's state.

    `prompt_ids` must lie in the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] = (), constraint: Constraint | None = None) -> None:
        self.sampling = sampling
        self.constraint = constraint
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.generated = 0
        self.counts: TokenCounts | None = None
        self.bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            self.bias = np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
        if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = TokenCounts(prompt_ids if sampling.repetition_penalty != 1 else ())

    def choose(self, logits_W: Tensor) -> TokenOut:
        """The next token from float32 logits [W]. Changes nothing: the same logits give the same token until `accept`."""
        return choose_batch([self], logits_W[None])[0]

    def accept(self, token: int) -> None:
        """The sequence goes on with this token."""
        self.generated += 1
        if self.counts is not None:
            self.counts.add(token)
        if self.constraint is not None:
            self.constraint.accept(token)

    @property
    def is_finished(self) -> bool:
        """Whether the constraint lets nothing follow but the end of the text: the sequence is done without it."""
        return self.constraint is not None and self.constraint.is_finished

    @property
    def error(self) -> str | None:
        """Why the constraint cannot hold the sequence any more, one line: a token chosen or accepted then is not held to it."""
        return None if self.constraint is None else self.constraint.error

    def rule(self) -> Rule:
        """How the next token is drawn."""
        sampling = self.sampling
        chance = uniform(self.seed, self.generated)
        top_k = min(sampling.top_k, 2**31)  # more than any vocabulary: numpy takes no number of hundreds of digits
        return Rule(sampling.temperature, chance, top_k, sampling.top_p, sampling.min_p)

    @property
    def edits(self) -> bool:
        """Whether something else than temperature changes the logits before a choice."""
        return self.constraint is not None or self.counts is not None or self.bias is not None


class TokenCounts:
    """Which tokens a sequence holds, and how often its answer does.

    Kept as arrays that grow, so that a step costs the number of different tokens and not that of the vocabulary.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        ids = list(dict.fromkeys(prompt_ids))
        self._place = {token: place for place, token in enumerate(ids)}
        self._id_N = np.array(ids, dtype=np.int64)
        self._count_N = np.zeros(len(ids), dtype=np.float32)

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._id_N):
            room = max(64, place)
            self._id_N, self._count_N = np.pad(self._id_N, (0, room)), np.pad(self._count_N, (0, room))
        self._id_N[place] = token
        self._count_N[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """Tokens of prompt and answer, each once."""
        return self._id_N[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often the answer holds each of `ids`."""
        return self._count_N[: len(self._place)]


def uniform(seed: int, number: int) -> float:
    """A random number in [0, 1) that depends on these two numbers (0 to 2^64 - 1) alone: so any position of a text can be
    drawn again, in any order, with the same result."""
    key = seed.to_bytes(8, "little") + number.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def choose_batch(samplers: Sequence[Sampler], logits_BW: Tensor) -> list[TokenOut]:
    """The next token of each sequence from float32 logits [B, W], one row each, as `Sampler.choose` row by row.

    A row with logits that are not finite gets some token of the vocabulary and does not disturb the others.
    """
    words = logits_BW.shape[1]
    logits_BW = in_blocks(logits_BW)
    chosen: dict[int, int] = {}
    for edits in (False, True):
        rows = [row for row, sampler in enumerate(samplers) if sampler.edits is edits]
        if rows:
            part_BW = _rows(logits_BW, rows)
            own = [samplers[row] for row in rows]
            if edits:
                part_BW = part_BW.clone() if part_BW is logits_BW else part_BW
                _edit(own, part_BW)
            chosen |= zip(rows, (min(token, words - 1) for token in _choose(own, part_BW)), strict=True)
    out = [TokenOut(chosen[row]) for row in range(len(samplers))]
    wanted = {row: sampler.sampling.logprobs for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None}
    if wanted:
        rows = list(wanted)
        told = token_logprobs(_rows(logits_BW, rows), [chosen[row] for row in rows], min(words, max(wanted.values())))
        for row, token in zip(rows, told, strict=True):
            out[row] = replace(token, top=token.top[: wanted[row]])
    return out


def token_logprobs(logits_BW: Tensor, ids: Sequence[int], count: int) -> list[TokenOut]:
    """The log-probability of one given token for each row of float32 logits [B, W], and those of the `count` likeliest."""
    logits_BW = in_blocks(logits_BW)
    total_B1 = log_total(logits_BW)
    id_B1 = torch.tensor(ids, dtype=torch.int64, device=logits_BW.device)[:, None]
    own_B = (logits_BW.gather(1, id_B1) - total_B1)[:, 0].tolist()
    if not count:
        return [TokenOut(token, own) for token, own in zip(ids, own_B, strict=True)]
    value_BN, id_BN = top(logits_BW, count)
    tops = zip(id_BN.tolist(), (value_BN - total_B1.detach().cpu().numpy()).tolist(), strict=True)
    return [
        TokenOut(token, own, tuple(zip(top_ids, top_values, strict=True)))
        for token, own, (top_ids, top_values) in zip(ids, own_B, tops, strict=True)
    ]


def _rows(x_BW: Tensor, rows: list[int]) -> Tensor:
    return x_BW if len(rows) == len(x_BW) else x_BW[rows]


def _choose(samplers: list[Sampler], logits_BW: Tensor) -> list[int]:
    """One id for each row, from logits that are edited already."""
    greedy: list[int] = []
    plain: list[int] = []
    filtered: list[int] = []
    for row, sampler in enumerate(samplers):
        (greedy if sampler.sampling.greedy else filtered if sampler.sampling.filtered else plain).append(row)
    ids: list[int] = []
    if greedy:
        ids += likeliest(_rows(logits_BW, greedy))
    if plain:
        ids += draw(_rows(logits_BW, plain), [samplers[row].rule() for row in plain])
    if filtered:
        ids += draw_filtered(_rows(logits_BW, filtered), [samplers[row].rule() for row in filtered])
    found = dict(zip(greedy + plain + filtered, ids, strict=True))
    return [found[row] for row in range(len(samplers))]


def _edit(samplers: list[Sampler], logits_BW: Tensor) -> None:
    """Apply constraints, biases and penalties, in place."""
    device, words = logits_BW.device, logits_BW.shape[1]
    logits = logits_BW.view(-1)
    for row, sampler in enumerate(samplers):
        if sampler.constraint is not None:
            allowed_W = torch.from_numpy(sampler.constraint.mask()).to(device)
            logits_BW[row, : len(allowed_W)].masked_fill_(~allowed_W, -math.inf)
    biased = [(row * words + sampler.bias[0], sampler.bias[1]) for row, sampler in enumerate(samplers) if sampler.bias]
    if biased:
        place_N, bias_N = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*biased, strict=True))
        logits[place_N] += bias_N
    counted = [(row, sampler.sampling, sampler.counts) for row, sampler in enumerate(samplers) if sampler.counts is not None]
    if counted:
        place_N = torch.from_numpy(np.concatenate([row * words + counts.ids for row, _, counts in counted])).to(device)
        logits_N = logits[place_N].detach().cpu().numpy()
        end = 0
        for _, sampling, counts in counted:
            start, end = end, end + len(counts.ids)
            logits_N[start:end] = _penalized(logits_N[start:end], sampling, counts.counts)
        logits[place_N] = torch.from_numpy(logits_N).to(device)


def _penalized(logits_N: NDArray[np.float32], sampling: Sampling, count_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of tokens that the sequence holds, `count_N` times in its answer."""
    penalty = sampling.repetition_penalty
    if penalty != 1:
        logits_N = np.where(logits_N < 0, logits_N * penalty, logits_N / penalty)
    return logits_N - (sampling.frequency_penalty * count_N + sampling.presence_penalty * (count_N > 0))
