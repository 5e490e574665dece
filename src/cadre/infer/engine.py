"""The engine: any number of requests at once, each with the tokens that it would get alone.

Synchronous: one thread owns an engine and calls `step` as long as it is `busy`. Every step reads a chunk of prompts in one
forward pass and one token of every running sequence in another (continuous batching: Orca, OSDI 2022, section 3).

Letters in names: T new token, N chosen row, D hidden, W vocabulary (words), K expert choices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cadre.errors import UsageError
from cadre.infer.constraint import Constraints
from cadre.infer.pages import PAGE_SIZE, PagePool, bytes_for, cache_dtype
from cadre.infer.request import EngineStats, Output, Request, check
from cadre.infer.runner import Batch, Runner, batch_of
from cadre.infer.sampling import Sampler, TokenOut, choose_batch, token_logprobs
from cadre.infer.scheduler import Scheduler, Sequence
from cadre.infer.speculate import Drafter, Payoff, Reading, is_ready
from cadre.infer.text import Detokenizer, StopStrings
from cadre.kernels.memory import free_bytes
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


__all__ = ["Engine", "EngineStats", "Output", "Request"]

# The cache's share of the memory that is free once the model is loaded; the rest is for activations and other programs.
CACHE_SHARE = 0.5
# Prompt tokens a step. On a card 1,024 are worked through before what follows them has been launched.
_CHUNK, _CHUNK_OF_A_CARD = 1024, 8192
# Logits of prompt positions held at once, in elements: a few MB in float32.
_SCORE_ELEMENTS = 1 << 20


class _Live:
    """A request with what turns its tokens into text."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        self.sequence = sequence
        self.told = False
        self.stops = StopStrings(sequence.request.stop)
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, sequence.request.prompt_ids)

    def push(self, token: int) -> str:
        return "" if self.detokenizer is None else self.stops.push(self.detokenizer.push(token))


@dataclass(frozen=True)
class _Choice:
    """A sequence that chooses: how many of its own tokens the pass reads, the row of the last of them, and where that row
    and those of its drafts stand among the logits. drafts: those that the pass reads."""

    sequence: Sequence
    own: int
    row: int
    first: int
    drafts: list[int]


class Engine:
    """Runs requests against one model. Puts the model in eval mode.

    cache_bytes: the page pool's size; None for half of the memory that is free, or less if `max_batch` full contexts need
    less. page_size: positions a page. max_batch: sequences that run at once. chunk: prompt tokens a step: the more, the more
    rows experts get at a time, and the longer others wait; None for 1,024, on a card 8,192. prefix_sharing: whether requests
    find the pages of others that begin alike. speculate: tokens that the model's multi-token prediction modules draft at a
    time; 0 for none. Drafting stops by itself where it does not pay, by `payoff`.

    Raises `UsageError` for sizes below 1 and a cache that holds no page.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        cache_bytes: int | None = None,
        page_size: int = PAGE_SIZE,
        max_batch: int = 64,
        chunk: int | None = None,
        prefix_sharing: bool = True,
        speculate: int = 0,
        payoff: Payoff | None = None,
    ) -> None:
        if speculate < 0:
            raise UsageError(f"speculate is {speculate}; it must be at least 0")
        if speculate and not len(model.mtp):
            raise UsageError("speculation needs multi-token prediction modules, which this model has not")
        weight, config = model.embed_tokens.weight, model.config
        if chunk is None:
            chunk = _CHUNK_OF_A_CARD if weight.is_cuda else _CHUNK
        for name, value in (("page_size", page_size), ("max_batch", max_batch), ("chunk", chunk)):
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        dtype = cache_dtype(model)
        layers = config.num_hidden_layers + min(speculate, len(model.mtp))
        if cache_bytes is None:
            useful = max_batch * bytes_for(config, config.max_position_embeddings, dtype, page_size, layers)
            cache_bytes = min(int(CACHE_SHARE * free_bytes(weight.device)), useful)
        self.config, self.tokenizer = config, tokenizer
        self.pool = PagePool.for_budget(
            config, cache_bytes, page_size=page_size, dtype=dtype, device=weight.device, layers=layers
        )
        self.runner = Runner(model, self.pool)
        self.speculate = speculate
        self._drafter = Drafter(self.runner, speculate) if speculate else None
        self._payoff = payoff or Payoff()
        self._proposed = self._accepted = 0
        self.scheduler = Scheduler(self.pool, max_batch=max_batch, chunk=chunk, prefix_sharing=prefix_sharing)
        self._ends = frozenset(config.end_tokens)
        self.constraints = Constraints(tokenizer, config.vocab_size, self._ends)
        self._live: dict[str, _Live] = {}
        self._outputs: list[Output] = []
        self._arrived = self._finished = self._prompt_tokens = self._shared_tokens = self._generated = self._steps = 0
        self._seconds = 0.0

    # ------------------------------------------------------------------------------------------------- requests

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that can run, prompt and continuation: the context's, or the cache's if fewer."""
        return min(self.config.max_position_embeddings, self.pool.tokens)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._live or self._outputs)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `UsageError` if it can never run: no tokens, a token outside the vocabulary, a prompt
        longer than the context or the cache, values out of range, or an id that is in use."""
        if request.id in self._live:
            raise UsageError(f"request id {request.id!r} is in use: give each request its own")
        check(request, self.config, self.pool.tokens)
        if request.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, which this model has not")
        prompt = request.prompt_ids
        sampler = Sampler(request.sampling, prompt, request.constraint or self.constraints.start(request.sampling))
        limit = min(len(prompt) + request.max_new_tokens, self.max_length)
        sequence = Sequence(self._arrived, request, sampler, limit, list(prompt))
        if request.prompt_logprobs:
            sequence.scores.append(TokenOut(prompt[0]))
        live = _Live(sequence, self.tokenizer)
        self._arrived += 1
        self._live[request.id] = live
        if len(prompt) == limit and not request.prompt_logprobs:
            self._finish(live, "length", queued=False)
        else:
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request; `step` tells so with its next outputs. Does nothing if there is none of this id."""
        live = self._live.get(request_id)
        if live is not None:
            self._finish(live, "abort")

    def clear(self) -> None:
        """Forget all requests without a word, whatever state an interrupted `step` left; the cache stays."""
        self._live.clear()
        self._outputs.clear()
        self.scheduler.clear()

    def run(self, requests: Items[Request]) -> list[tuple[list[int], str, str]]:
        """Run these requests to their end: new ids, text and finish of each. Raises `UsageError` as `add` does."""
        try:
            for request in requests:
                self.add(request)
            ids: dict[str, list[int]] = {request.id: [] for request in requests}
            text, finish = dict.fromkeys(ids, ""), dict.fromkeys(ids, "")
            while self.busy:
                for output in self.step():
                    ids[output.id] += [token.id for token in output.tokens]
                    text[output.id] += output.text
                    finish[output.id] = output.finish or ""
        except BaseException:
            self.clear()
            raise
        return [(ids[key], text[key], finish[key]) for key in ids]

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.active),
            finished=self._finished,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._shared_tokens,
            generated_tokens=self._generated,
            pages_used=self.pool.pages - self.pool.free,
            pages_total=self.pool.pages,
            preemptions=self.scheduler.preemptions,
            drafts_proposed=self._proposed,
            drafts_accepted=self._accepted,
            expert_load=tuple(map(tuple, self.runner.load().tolist())),
            steps=self._steps,
            step_seconds=self._seconds,
        )

    # ------------------------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Advance every running request, by a token or by part of its prompt, and let in who waits if there is room. An
        exception loses no more than the tokens in work: whatever a pass had not finished is computed again."""
        begin = time.perf_counter()
        self._expire()
        self.scheduler.grow()
        self.scheduler.admit()
        prompts = self.scheduler.prompts()
        running = [sequence for sequence in self.scheduler.active if sequence.unread == 1]
        if prompts:
            # Whether they will be drafted once they run, beside all that run then.
            self._forward(prompts, self._drafts(len(self.scheduler.active)))
        if running:
            made, start = self._generated, time.perf_counter()
            drafting = self._drafts(len(running))
            ready = sum(is_ready(sequence) for sequence in running)
            if not drafting:
                for sequence in running:
                    sequence.drafts.clear()
                    sequence.carried.clear()
            self._forward([(sequence, 1 + len(sequence.drafts)) for sequence in running], drafting)
            self._payoff.record(len(running), ready, self._generated - made, time.perf_counter() - start)
        self._steps += 1
        self._seconds += time.perf_counter() - begin
        outputs, self._outputs = self._outputs, []
        return outputs

    def _forward(self, work: list[tuple[Sequence, int]], drafting: bool) -> None:
        """Read the next tokens of these sequences, drafts included; whoever has then read all its own chooses one more, and
        another one for every draft that was right."""
        batch = batch_of(work)
        routes = any(sequence.request.routes for sequence, _ in work)
        if routes:
            batch.experts = []
        hidden_TD = self.runner.hidden(batch)
        choosing: list[_Choice] = []
        rows: list[int] = []
        begin = 0
        for sequence, count in work:
            drafted = len(sequence.drafts)
            own = count - drafted
            if sequence.scoring:
                self._score(sequence, hidden_TD[begin : begin + own])
            if sequence.cached + own == len(sequence.ids) < sequence.limit:
                choosing.append(_Choice(sequence, own, begin + own - 1, len(rows), sequence.drafts))
                rows += range(begin + own - 1, begin + count)
            begin += count
        logits_NW = hidden_TD
        if choosing:
            logits_NW = self.runner.logits(hidden_TD if len(rows) == len(hidden_TD) else hidden_TD[rows])
        self._accept_drafts(choosing, logits_NW, batch)
        chosen = {choice.sequence for choice in choosing}
        for sequence, count in work:
            if sequence in chosen:
                continue
            self.scheduler.advance(sequence, count)
            if sequence.unread == 0:
                good = all(math.isfinite(score.logprob or 0.0) for score in sequence.scores)
                self._finish(self._live[sequence.request.id], "length" if good else "error")
        if self._drafter is not None:
            self._draft(self._drafter, drafting, work, hidden_TD, batch.start_B)

    def _drafts(self, sequences: int) -> bool:
        return self._drafter is not None and self._payoff.drafting(sequences)

    def _accept_drafts(self, choosing: list[_Choice], logits_NW: Tensor, batch: Batch) -> None:
        """Choose a token for each, and one more as long as it is what was drafted. A sequence advances only when its token
        is chosen: an exception between leaves it as it was."""
        taken = 0
        self._proposed += sum(len(choice.drafts) for choice in choosing)
        while choosing:
            numbers = [choice.first + taken for choice in choosing]
            every = numbers == list(range(len(logits_NW)))
            tokens = self._choose([choice.sequence for choice in choosing], logits_NW if every else logits_NW[numbers])
            going: list[_Choice] = []
            for choice, token in zip(choosing, tokens, strict=True):
                sequence, drafts = choice.sequence, choice.drafts
                live = self._live[sequence.request.id]
                # Given up before the sequence grows: after an exception they would be read where it has no pages.
                sequence.drafts = []
                self.scheduler.advance(sequence, 1 if taken else choice.own)
                right = token is not None and taken < len(drafts) and token.id == drafts[taken]
                self._accept(live, _with_experts(sequence, token, choice.row + taken, batch))
                if right:
                    self._accepted += 1
                    if sequence.request.id in self._live:
                        going.append(choice)
            choosing, taken = going, taken + 1

    def _draft(
        self, drafter: Drafter, drafting: bool, work: list[tuple[Sequence, int]], hidden_TD: Tensor, start_B: list[int]
    ) -> None:
        """Draft for whoever goes on, if at all; the modules read what the model has read, or miss it."""
        readings: list[Reading] = []
        end = 0
        for (sequence, count), start in zip(work, start_B, strict=True):
            begin, end = end, end + count
            if sequence.request.id not in self._live:
                continue
            read = sequence.cached - start
            if not drafting or not is_ready(sequence):
                sequence.missed += read
                sequence.carried.clear()
                continue
            wanted = 0
            if sequence.unread == 1:
                most = min(self.speculate, sequence.limit - len(sequence.ids) - 1)
                wanted = self.scheduler.reserve(sequence, most)
            readings.append(Reading(sequence, start, hidden_TD[begin : begin + read], wanted))
        if readings:
            for reading, drafts in zip(readings, drafter.draft(readings), strict=True):
                reading.sequence.drafts = drafts

    def _choose(self, sequences: list[Sequence], logits_NW: Tensor) -> list[TokenOut | None]:
        """The next token of each, None where the logits are not finite or a constraint cannot be met."""
        samplers = [sequence.sampler for sequence in sequences]
        tokens: list[TokenOut | None] = list(choose_batch(samplers, logits_NW))
        tokens = [token if sampler.error is None else None for sampler, token in zip(samplers, tokens, strict=True)]
        # A sum is finite only if all its terms are: one number to look at, as long as all is well.
        if not math.isfinite(logits_NW.sum().item()):
            good_N = logits_NW.isfinite().all(dim=-1).tolist()
            tokens = [token if good else None for token, good in zip(tokens, good_N, strict=True)]
        return tokens

    def _score(self, sequence: Sequence, hidden_TD: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens that follow the ones just read."""
        prompt, start = sequence.request.prompt_ids, sequence.cached
        targets = prompt[start + 1 : start + 1 + len(hidden_TD)]
        top = min(sequence.request.sampling.logprobs or 0, self.config.vocab_size)
        rows = max(1, _SCORE_ELEMENTS // self.config.vocab_size)
        scores: list[TokenOut] = []
        for place in range(0, len(targets), rows):
            part = targets[place : place + rows]
            scores += token_logprobs(self.runner.logits(hidden_TD[place : place + len(part)]), part, top)
        sequence.scores[start + 1 :] = scores

    def _accept(self, live: _Live, token: TokenOut | None) -> None:
        sequence = live.sequence
        if token is None:
            self._finish(live, "error")
            return
        if token.id in self._ends and not sequence.request.ignore_eos:
            self._finish(live, "stop")
            return
        sequence.sampler.accept(token.id)
        sequence.ids.append(token.id)
        self._generated += 1
        text = live.push(token.id)
        if live.stops.hit or sequence.sampler.is_finished:
            self._finish(live, "stop", token, text)
        elif len(sequence.ids) == sequence.limit:
            self._finish(live, "length", token, text)
        else:
            self._tell(live, (token,), text, None)

    def _finish(self, live: _Live, finish: str, token: TokenOut | None = None, text: str = "", queued: bool = True) -> None:
        sequence = live.sequence
        del self._live[sequence.request.id]
        if queued:
            if not (sequence.pages or sequence.started):
                live.told = True  # it never left the queue: its prompt counts for nothing
            self.scheduler.remove(sequence)
        self._finished += 1
        self._tell(live, () if token is None else (token,), text + live.stops.rest(), finish)

    def _tell(self, live: _Live, tokens: tuple[TokenOut, ...], text: str, finish: str | None) -> None:
        sequence, scores = live.sequence, None
        if not live.told:
            live.told = sequence.started = True
            self._prompt_tokens += len(sequence.request.prompt_ids)
            self._shared_tokens += sequence.shared
            if sequence.request.prompt_logprobs and not sequence.scoring:
                scores = tuple(sequence.scores)
        request = sequence.request
        self._outputs.append(Output(request.id, tokens, text, finish, len(request.prompt_ids), sequence.shared, scores))

    def _expire(self) -> None:
        now = time.monotonic()
        for live in list(self._live.values()):
            deadline = live.sequence.request.deadline
            if deadline is not None and deadline <= now:
                self._finish(live, "deadline")


def _with_experts(sequence: Sequence, token: TokenOut | None, row: int, batch: Batch) -> TokenOut | None:
    if token is None or not sequence.request.routes:
        return token
    return replace(token, experts=tuple(tuple(expert_TK[row].tolist()) for expert_TK in batch.experts or ()))
