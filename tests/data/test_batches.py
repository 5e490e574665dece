import json
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.data.batches import Batch, Batches
from cadre.data.shards import Tokens
from cadre.errors import UsageError


def counting(length: int, starts: tuple[int, ...] = (0,)) -> Tokens:
    """A stream whose ids are their own positions, in shards of at most 50."""
    ids = np.arange(length, dtype=np.uint16)
    return Tokens([ids[i : i + 50] for i in range(0, length, 50)], np.array(starts, dtype=np.int64))


@st.composite
def cases(draw):
    """(tokens, sizes and seed) of any batches that exist."""
    batch, seq_len = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    length = draw(st.integers(batch * seq_len, batch * seq_len + 100))
    starts = (0, *sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=6))))
    sizes = {"batch": batch, "seq_len": seq_len, "extra": draw(st.integers(0, 4)), "seed": draw(st.integers(0, 2**40))}
    return counting(length, starts if length > 1 else (0,)), sizes


def same(one: Batch, other: Batch) -> bool:
    if not np.array_equal(one.ids, other.ids) or (one.documents is None) != (other.documents is None):
        return False
    return one.documents is None or other.documents is None or np.array_equal(one.documents, other.documents)


@given(cases())
def test_each_window_comes_exactly_once_an_epoch(case):
    tokens, sizes = case
    batches = Batches(tokens, **sizes)
    n, seq_len, length = len(tokens) // sizes["seq_len"], sizes["seq_len"], sizes["seq_len"] + sizes["extra"]
    assert batches.batches_per_epoch == n // sizes["batch"] >= 1
    rows = [row for batch in islice(batches, 3 * n // sizes["batch"] + 3) for row in batch.ids]
    for row in rows:
        np.testing.assert_array_equal(row, (row[0] + np.arange(length)) % len(tokens))
    for epoch in range(3):
        starts = sorted(int(row[0]) for row in rows[epoch * n : (epoch + 1) * n])
        assert 0 <= starts[0] < seq_len
        assert starts == [starts[0] + i * seq_len for i in range(n)]


@given(cases(), st.booleans())
def test_the_same_seed_gives_the_same_batches(case, separate):
    tokens, sizes = case
    one, other = (Batches(tokens, **sizes, separate_documents=separate) for _ in range(2))
    for left, right in islice(zip(one, other, strict=True), 12):
        assert same(left, right)


@given(cases(), st.integers(0, 30), st.integers(0, 10))
def test_resuming_anywhere_equals_going_on(case, taken, ahead):
    tokens, sizes = case
    batches = Batches(tokens, **sizes, separate_documents=True)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    expected = list(islice(batches, 8))
    resumed = Batches(tokens, **sizes, separate_documents=True)
    for _ in range(ahead):
        next(resumed)
    resumed.restore(state)
    assert resumed.state() == state
    for left, right in zip(expected, resumed, strict=False):
        assert same(left, right)
    batches.restore(state)
    assert same(next(batches), expected[0])


@given(cases())
def test_documents_number_every_token(case):
    tokens, sizes = case
    for batch in islice(Batches(tokens, **sizes, separate_documents=True), 10):
        assert batch.ids.shape == batch.documents.shape == (sizes["batch"], sizes["seq_len"] + sizes["extra"])
        assert (batch.ids.dtype, batch.documents.dtype) == (np.int64, np.int32)
        starts = tokens.document_starts
        for ids, documents in zip(batch.ids, batch.documents, strict=True):
            # A token continues the document of the one before unless a document starts there (the ring's seam
            # is such a place: position 0 is a start).
            np.testing.assert_array_equal(np.diff(documents), np.isin(ids[1:], starts).astype(int))
            assert documents[0] == np.searchsorted(starts, ids[0], side="right") - 1


def test_documents_are_none_unless_asked_for():
    assert next(Batches(counting(100), batch=2, seq_len=8)).documents is None


def test_seeds_and_epochs_differ():
    def order(batches: Batches, windows: int) -> list[int]:
        return [int(row[0]) for batch in islice(batches, windows // 4) for row in batch.ids]

    batches = Batches(counting(6400), batch=4, seq_len=64, seed=1)
    epochs = [order(batches, 100) for _ in range(8)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 8  # offsets
    ranks = [tuple(np.argsort(epoch)) for epoch in epochs]
    assert len(set(ranks)) == 8 and tuple(range(100)) not in ranks  # orders
    # Seeds that follow each other must not repeat each other's epochs, one epoch later.
    following = order(Batches(counting(6400), batch=4, seq_len=64, seed=2), 100)
    assert tuple(np.argsort(following)) not in ranks


def test_a_corpus_smaller_than_one_batch_is_refused_with_numbers():
    Batches(counting(8192), batch=16, seq_len=512)
    with pytest.raises(UsageError) as caught:
        Batches(counting(812), batch=16, seq_len=512)
    assert str(caught.value).startswith("the corpus has 812 tokens; one batch needs 16 x 512 = 8,192: use a smaller")


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seq_len": -1}, {"extra": -1}, {"seed": -1}])
def test_sizes_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} .* out of range"):
        Batches(counting(100), **{"batch": 2, "seq_len": 8, **wrong})


def test_a_state_of_other_batches_is_refused():
    state = Batches(counting(100), batch=2, seq_len=8).state()
    with pytest.raises(UsageError, match="seq_len 8 then, 9 now; seed 0 then, 3 now"):
        Batches(counting(100), batch=2, seq_len=9, seed=3).restore(state)
    with pytest.raises(UsageError, match="tokens 100 then, 101 now"):
        Batches(counting(101), batch=2, seq_len=8).restore(state)


@pytest.mark.parametrize("length", [16 * 512, 2**20])
def test_a_batch_takes_under_5_ms(length):
    stream = Tokens([np.zeros(length, dtype=np.uint16)], np.arange(0, length, 4096))
    batches = Batches(stream, batch=16, seq_len=512, extra=2, separate_documents=True)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.005


@given(cases(), st.integers(1, 4), st.booleans())
def test_parts_are_the_whole_dealt_out_row_by_row(case, parts, documents):
    tokens, sizes = case
    whole = Batches(tokens, **sizes, separate_documents=documents)
    shares = [Batches(tokens, **sizes, separate_documents=documents, part=(part, parts)) for part in range(parts)]
    for _ in range(3):
        if sizes["batch"] < parts:  # some would have nothing, which no run allows
            return
        batch, dealt = next(whole), [next(share) for share in shares]
        for part, its in enumerate(dealt):
            assert same(its, Batch(batch.ids[part::parts], None if batch.documents is None else batch.documents[part::parts]))
        assert all(share.state() == whole.state() for share in shares)
