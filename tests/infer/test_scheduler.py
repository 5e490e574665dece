import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.infer.native import NATIVE_TOKENS
from cadre.infer.pages import PagePool
from cadre.infer.request import Request
from cadre.infer.sampling import Sampling
from cadre.infer.scheduler import Scheduler, Sequence, pick
from tests.shapes import small


class Machine:
    """A scheduler at work without a model: whoever has read all is given token after token up to its limit."""

    def __init__(self, pages=64, page_size=4, max_batch=8, chunk=16, prefix_sharing=True):
        pool = PagePool(small("llama"), pages=pages, page_size=page_size, dtype=torch.float32)
        self.scheduler = Scheduler(pool, max_batch=max_batch, chunk=chunk, prefix_sharing=prefix_sharing)
        self.sequences, self.read, self.pieces = [], [], []

    def add(self, prompt, new):
        request = Request(str(len(self.sequences)), tuple(prompt), new, Sampling())
        sequence = Sequence(len(self.sequences), request, None, len(prompt) + new, list(prompt))
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        """One step as the engine makes it; how many tokens each sequence read."""
        scheduler = self.scheduler
        scheduler.grow()
        scheduler.admit()
        work = scheduler.prompts()
        assert sum(count for _, count in work) <= scheduler.chunk
        work += [(sequence, 1) for sequence in scheduler.active if sequence.unread == 1]
        for sequence, count in work:
            assert sequence.cached + count <= len(sequence.pages) * scheduler.pool.page_size
            self.pieces.append((sequence.number, sequence.cached, count))
            own = sequence.pages[sequence.cached // scheduler.pool.page_size :]
            for other in scheduler.active:
                assert other is sequence or not set(own) & set(other.pages), "a page being written is shared"
            scheduler.advance(sequence, count)
            if sequence.unread == 0:
                sequence.ids.append(sequence.number)
            if len(sequence.ids) == sequence.limit:
                scheduler.remove(sequence)
        scheduler.pool.check(sequence.pages for sequence in scheduler.active)
        order = [sequence.number for sequence in (*scheduler.active, *scheduler.waiting)]
        assert order == sorted(order)
        assert len(scheduler.active) <= scheduler.max_batch
        self.read.append({sequence.number: count for sequence, count in work})

    def run(self):
        while self.scheduler.active or self.scheduler.waiting:
            self.step()
        assert self.scheduler.pool.free == self.scheduler.pool.pages


@given(st.lists(st.integers(1, 40), max_size=9), st.integers(1, 30), st.booleans())
def test_whole_pieces_fill_a_chunk_until_none_fits(unread, chunk, oldest_first):
    pieces = [min(chunk, left) for left in unread]
    chosen = pick(pieces, unread, chunk, oldest_first)
    room = chunk - sum(pieces[place] for place in chosen)
    assert room >= 0
    assert all(piece > room for place, piece in enumerate(pieces) if place not in chosen)
    if unread and oldest_first:
        assert 0 in chosen


def test_the_oldest_and_the_shortest_take_turns():
    assert pick([16, 16, 5, 5], [100, 30, 5, 5], 16, True) == [0]
    assert pick([16, 16, 5, 5], [100, 30, 5, 5], 16, False) == [2, 3]
    assert pick([4, 16, 12], [4, 50, 12], 16, True) == [0, 2]
    assert pick([4, 16, 16], [4, 30, 50], 16, False) == [1]
    assert pick([1, 1], [5, 5], 1, False) == [1]
    assert pick([], [], 16, True) == []


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 10), st.integers(0, 20)), min_size=1, max_size=6),
    st.integers(1, 30),
    st.integers(0, 8),
)
def test_a_prompt_is_cut_alike_in_any_company(requests, chunk, spare):
    """Preempted or not: what the model computes together must not depend on who else is served."""
    pages = max(-(-(prompt + new) // 4) for prompt, new, _ in requests) + spare
    machine = Machine(pages, chunk=chunk, prefix_sharing=False)
    for step in range(21):
        for prompt, new, arrival in requests:
            if arrival == step:
                machine.add([len(machine.sequences)] * prompt, new)
        machine.step()
    machine.run()
    for number, start, count in machine.pieces:
        prompt = len(machine.sequences[number].request.prompt_ids)
        if start < prompt:
            assert (start % chunk, count) == (0, min(chunk, prompt - start))
        else:
            assert count <= NATIVE_TOKENS


@given(
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=8),
    size=st.integers(1, 7),
    spare=st.integers(0, 6),
    max_batch=st.integers(1, 5),
    chunk=st.integers(1, 20),
    sharing=st.booleans(),
)
def test_every_request_finishes_within_a_bound(requests, size, spare, max_batch, chunk, sharing):
    """Even if the requests before it ran one after the other, each a preempted one's length to read again."""
    pages = max(-(-(prompt + new) // size) for prompt, new, _ in requests) + spare
    machine = Machine(pages, size, max_batch, chunk, sharing)
    for step in range(31):
        for number, (prompt, new, arrival) in enumerate(requests):
            if arrival == step:
                # Some begin alike.
                machine.add([number % 2] * prompt, new)
        machine.step()
    bound = sum(2 * (-(-prompt // chunk) + -(-new // chunk)) + new + 1 for prompt, new, _ in requests)
    machine.run()
    assert len(machine.read) <= 31 + bound
    assert all(len(sequence.ids) == sequence.limit for sequence in machine.sequences)


def test_a_long_prompt_starves_nobody():
    machine = Machine(pages=400, chunk=16)
    streaming = machine.add([1], 200)
    machine.step()
    long = machine.add([2] * 800, 1)
    short = [machine.add([3 + n] * 6, 3) for n in range(3)]
    for _ in range(8):
        machine.step()
    assert all(reads[streaming.number] == 1 for reads in machine.read)
    assert all(sequence.unread == 0 or len(sequence.ids) == sequence.limit for sequence in short)
    assert long.cached >= 4 * 16


def test_short_prompts_starve_no_long_one():
    machine = Machine(pages=400, chunk=16)
    long = machine.add([0] * 200, 1)
    for number in range(40):
        machine.add([number] * 8, 1)
        machine.step()
        assert sum(reads.get(long.number, 0) for reads in machine.read[-2:]) >= 16 or len(long.ids) == long.limit
    assert len(long.ids) == long.limit


def test_requests_are_admitted_in_order_even_where_a_later_one_would_fit():
    machine = Machine(pages=8, page_size=4, chunk=100)
    first, large, small_one = machine.add([0] * 16, 8), machine.add([1] * 24, 2), machine.add([2], 2)
    machine.step()
    assert machine.scheduler.active == [first]
    assert list(machine.scheduler.waiting) == [large, small_one]
    machine.run()


def test_the_youngest_pays_and_comes_back_first_with_all_it_had():
    machine = Machine(pages=9, page_size=2, chunk=100, prefix_sharing=False)
    old, young = machine.add([0] * 4, 12), machine.add([1] * 4, 6)
    for _ in range(3):
        machine.step()
    later = machine.add([2] * 4, 1)
    while not machine.scheduler.preemptions:
        machine.step()
    assert machine.scheduler.active == [old]
    assert list(machine.scheduler.waiting) == [young, later]
    assert (young.cached, len(young.pages)) == (0, 0)
    had = list(young.ids)
    assert len(had) > 4
    machine.run()
    assert young.ids[: len(had)] == had
    # It was let in again only once it could stay.
    assert machine.scheduler.preemptions == 1


def test_who_begins_like_another_reads_only_the_rest():
    machine = Machine()
    first = machine.add(range(20), 1)
    machine.run()
    same, longer, other = machine.add(range(20), 1), machine.add(range(30), 1), machine.add([7, *range(1, 20)], 1)
    machine.run()
    assert (first.shared, same.shared, longer.shared, other.shared) == (0, 16, 20, 0)  # the last token is always read
    reads = sum(sum(counts.values()) for counts in machine.read)
    assert reads == 20 + 4 + 10 + 20


def test_equal_prompts_at_once_are_read_once():
    """Several choices of one prompt: what one reads, the others take over."""
    machine = Machine(chunk=16)
    choices = [machine.add(range(41), 1) for _ in range(4)]
    machine.run()
    assert [sequence.shared for sequence in choices[2:]] == [40, 40]
    assert sum(sum(counts.values()) for counts in machine.read) == 41 + 3  # the last token is always read


def test_nothing_is_shared_without_prefix_sharing():
    machine = Machine(prefix_sharing=False)
    for _ in range(2):
        machine.add(range(20), 1)
        machine.run()
    assert [sequence.shared for sequence in machine.sequences] == [0, 0]
    assert not machine.scheduler.pool._page_of


def test_generated_tokens_are_found_too():
    """As the next turn of a conversation finds its answer."""
    machine = Machine(page_size=4)
    first = machine.add(range(10), 7)
    machine.run()
    next_turn = machine.add([*first.ids, 5, 6], 1)
    machine.run()
    assert next_turn.shared == 16


def test_clearing_forgets_everything_but_what_can_be_found():
    machine = Machine(pages=16)
    machine.add(range(20), 5)
    machine.add(range(9), 5)
    for _ in range(3):
        machine.step()
    machine.scheduler.active[0].pages.append(3)  # as an interruption may leave it
    machine.scheduler.clear()
    machine.scheduler.pool.check([])
    again = machine.add(range(20), 1)
    machine.run()
    assert again.shared == 16
