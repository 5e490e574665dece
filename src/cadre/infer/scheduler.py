"""Who runs next: admission, shares of the prompt chunk, pages, preemption. Arithmetic only: nothing here touches a tensor.

Fairness. Sequences are admitted in the order of their arrival. The oldest admitted one is never preempted and advances at
least at every second step, by a piece of its prompt or by one token: so every request becomes the oldest and finishes within
a number of steps that depends on the requests before it alone.

Independence. A prompt is read in whole pieces, whose lengths depend on the prompt and on what of it the cache holds. So whoever
else is served makes no difference to the arithmetic by which a position is computed, nor to its last bits.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cadre.infer.native import NATIVE_TOKENS
from cadre.infer.pages import PagePool, chain_key

if TYPE_CHECKING:
    from torch import Tensor

    from cadre.infer.request import Request
    from cadre.infer.sampling import Sampler, TokenOut


@dataclass(eq=False)
class Sequence:
    """A request on its way. ids: prompt and generated tokens. The first `cached` of them are in `pages`; the rest is unread.

    number: the order of arrival. limit: how long `ids` may become. published: full pages that others can find. shared:
    prompt tokens that were found in the cache. started: whether it has given a token or was preempted. scores:
    log-probabilities of the prompt's tokens so far, the first one's unknown. drafts: guesses at what follows `ids`, there
    is room for them in `pages`. carried: by stage, the hidden state that speculation goes on from. missed: positions that
    the drafting modules have not read.
    """

    number: int
    request: Request
    sampler: Sampler
    limit: int
    ids: list[int]
    pages: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    cached: int = 0
    published: int = 0
    shared: int = 0
    started: bool = False
    scores: list[TokenOut] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    carried: dict[int, Tensor] = field(default_factory=dict)
    missed: int = 0

    @property
    def unread(self) -> int:
        return len(self.ids) - self.cached

    def piece(self, chunk: int) -> int:
        """How many tokens to read next: of the prompt up to `chunk`; of what was generated, and is read again after a
        preemption, as few as are read by the arithmetic that made them."""
        prompt = len(self.request.prompt_ids) - self.cached
        return min(prompt, chunk) if prompt > 0 else min(self.unread, chunk, NATIVE_TOKENS)

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to come."""
        return self.request.prompt_logprobs and len(self.scores) < len(self.request.prompt_ids)

    @property
    def sharable(self) -> int:
        """How many positions need not be computed if they are in the cache: all whose logits nobody needs."""
        return max(0, len(self.scores) - 1) if self.scoring else len(self.ids) - 1

    def key(self, index: int, page_size: int) -> bytes:
        """The key of full page `index`."""
        while len(self.keys) <= index:
            start = len(self.keys) * page_size
            self.keys.append(chain_key(self.keys[-1] if self.keys else b"", self.ids[start : start + page_size]))
        return self.keys[index]


class Scheduler:
    """The queue and the sequences that hold pages. `active` is in order of arrival and holds at most `max_batch`; all of
    `waiting` arrived later than all of `active`. `chunk`: prompt tokens a step. `passed`: whether the oldest prompt let
    others go first in the last step."""

    def __init__(self, pool: PagePool, *, max_batch: int, chunk: int, prefix_sharing: bool) -> None:
        self.pool, self.max_batch, self.chunk, self.prefix_sharing = pool, max_batch, chunk, prefix_sharing
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self.preemptions = 0
        self.passed = True

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Give its pages back and forget it."""
        if sequence in self.active:
            self.active.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def clear(self) -> None:
        """Forget all sequences, also after an interruption that left the book half written."""
        self.waiting.clear()
        self.active.clear()
        self.pool.recover()

    def reserve(self, sequence: Sequence, drafts: int) -> int:
        """Room for so many drafts after a sequence's tokens, or for as many as there are pages without taking any from
        others; how many that is."""
        size = self.pool.page_size
        while len(sequence.ids) + drafts > len(sequence.pages) * size and self.pool.free > len(self.active):
            sequence.pages.extend(self.pool.take(1, after=sequence.pages[-1]))
        return min(drafts, len(sequence.pages) * size - len(sequence.ids))

    def admit(self) -> None:
        """Let in who waited longest, as long as there are pages for all its tokens, and one to spare for each that runs:
        else it would be preempted again at once."""
        size = self.pool.page_size
        while self.waiting and len(self.active) < self.max_batch:
            sequence = self.waiting[0]
            found = self._found(sequence)
            new = -(-len(sequence.ids) // size) - len(found)
            idle = sum(self.pool.is_idle(page) for page in found)
            if self.pool.free < new + idle + len(self.active):
                return
            for page in found:
                self.pool.share(page)
            sequence.pages.extend(found)
            sequence.pages.extend(self.pool.take(new))
            self._skip(sequence, len(found))
            self.active.append(sequence)
            self.waiting.popleft()

    def grow(self) -> None:
        """Give everyone who is about to write beyond its pages one more, the oldest first; the youngest pay for it."""
        for sequence in list(self.active):
            while sequence.pages and len(sequence.ids) > len(sequence.pages) * self.pool.page_size:
                if self.pool.free:
                    sequence.pages.extend(self.pool.take(1, after=sequence.pages[-1]))
                else:
                    self._preempt(self.active[-1])

    def prompts(self) -> list[tuple[Sequence, int]]:
        """Who reads how many tokens in this step's chunk."""
        reading = [sequence for sequence in self.active if sequence.unread > 1]
        for sequence in reading:
            self._catch_up(sequence)
        reading = [sequence for sequence in reading if sequence.unread > 1]
        pieces = [sequence.piece(self.chunk) for sequence in reading]
        chosen = pick(pieces, [sequence.unread for sequence in reading], self.chunk, self.passed)
        self.passed = 0 not in chosen
        return [(reading[place], pieces[place]) for place in chosen]

    def advance(self, sequence: Sequence, count: int) -> None:
        """`count` more of its tokens are in the cache; pages that are full can be found from now on."""
        sequence.cached += count
        if self.prefix_sharing:
            for index in range(sequence.published, sequence.cached // self.pool.page_size):
                self.pool.publish(sequence.pages[index], sequence.key(index, self.pool.page_size))
                sequence.published = index + 1

    def _found(self, sequence: Sequence) -> list[int]:
        """The pages at the beginning of a sequence that are in the cache already."""
        found: list[int] = []
        while self.prefix_sharing and (len(found) + 1) * self.pool.page_size <= sequence.sharable:
            page = self.pool.find(sequence.key(len(found), self.pool.page_size))
            if page is None:
                break
            found.append(page)
        return found

    def _catch_up(self, sequence: Sequence) -> None:
        """Take over pages that another sequence with the same beginning has filled since this one was admitted."""
        size = self.pool.page_size
        while self.prefix_sharing and sequence.cached % size == 0 and sequence.cached + size <= sequence.sharable:
            index = sequence.cached // size
            page = self.pool.find(sequence.key(index, size))
            if page is None:
                return
            self.pool.share(page)
            own, sequence.pages[index] = sequence.pages[index], page
            self.pool.release([own])
            self._skip(sequence, 1)

    def _skip(self, sequence: Sequence, pages: int) -> None:
        sequence.cached += pages * self.pool.page_size
        sequence.published += pages
        if not sequence.started:
            sequence.shared += pages * self.pool.page_size

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue. Its tokens stay; its pages can still be found until they are overwritten."""
        self.active.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        sequence.started = True  # what it finds from now on may be its own
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        del sequence.pages[:]
        sequence.cached = sequence.published = 0
        sequence.drafts.clear()
        sequence.carried.clear()
        sequence.missed = 0


def pick(pieces: list[int], unread: list[int], chunk: int, oldest_first: bool) -> list[int]:
    """Whose pieces (each at most `chunk`) are read together, by place, the oldest at place 0. Pieces are never cut. The oldest
    goes first at least every second time, so that a long prompt is never starved; else, and after it, whoever has least left,
    so that short ones behind it are not either."""
    order = sorted(range(1, len(pieces)), key=lambda place: unread[place])
    if pieces:
        order.insert(0 if oldest_first else len(order), 0)
    chosen: list[int] = []
    for place in order:
        if pieces[place] <= chunk:
            chosen.append(place)
            chunk -= pieces[place]
    return sorted(chosen)
