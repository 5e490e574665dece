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


@given(cases())
def test_a_token_that_ends_a_document_is_what_the_next_is_predicted_from(case):
    """As in scoring, where a document follows that token and nothing else."""
    tokens, sizes = case
    ended = Tokens([tokens.tokens(0, len(tokens)).astype(np.uint16)], tokens.document_starts, ended=True)
    starts = tokens.document_starts
    for batch in islice(Batches(ended, **sizes, separate_documents=True), 5):
        for ids, documents in zip(batch.ids, batch.documents, strict=True):
            last = np.isin(ids, (starts - 1) % len(tokens))
            assert (np.diff(documents) == last[1:]).all()  # a document begins with the token before its first


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


# ------------------------------------------------------------------------------------------------- mixtures


@st.composite
def mixtures(draw):
    """(streams, weights, sizes): stream k's ids are k * 1000 and on."""
    sizes = {"batch": draw(st.integers(1, 5)), "seq_len": draw(st.integers(1, 12)), "seed": draw(st.integers(0, 2**40))}
    count, least = draw(st.integers(2, 4)), sizes["batch"] * sizes["seq_len"]
    streams = []
    for number in range(count):
        length = draw(st.integers(least, least + 100))
        ids = np.arange(1000 * number, 1000 * number + length, dtype=np.uint16)
        streams.append(Tokens([ids], np.array([0], dtype=np.int64)))
    weights = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return streams, weights, {**sizes, "extra": draw(st.integers(0, 3))}


def drawn(batches: Batches, count: int) -> list[np.ndarray]:
    return [row for batch in islice(batches, count) for row in batch.ids]


@given(mixtures(), st.integers(1, 40))
def test_streams_are_mixed_by_weight(case, count):
    streams, weights, sizes = case
    rows = drawn(Batches(*streams, weights=weights, **sizes), count)
    for number, weight in enumerate(weights):
        share = sum(row[0] // 1000 == number for row in rows)
        assert abs(share - len(rows) * weight / sum(weights)) <= 2


@given(mixtures())
def test_each_stream_of_a_mixture_is_gone_through_before_it_repeats(case):
    streams, weights, sizes = case
    rows = drawn(Batches(*streams, weights=weights, **sizes), 60)
    for number, stream in enumerate(streams):
        n, seq_len = len(stream) // sizes["seq_len"], sizes["seq_len"]
        starts = [int(row[0]) - 1000 * number for row in rows if row[0] // 1000 == number]
        whole = len(starts) // n
        assert all(np.array_equal(row, 1000 * number + (row[0] - 1000 * number + np.arange(len(row))) % len(stream))
                   for row in rows if row[0] // 1000 == number)  # fmt: skip
        if sizes["batch"] == 1:  # within a batch the order is another
            for epoch in range(whole):
                places = sorted(starts[epoch * n : (epoch + 1) * n])
                assert places == [places[0] + i * seq_len for i in range(n)] and 0 <= places[0] < seq_len


@given(mixtures(), st.integers(0, 20), st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(lambda w: w[0] + w[1]))
def test_a_mixture_goes_on_where_it_was_with_other_weights_too(case, taken, others):
    streams, weights, sizes = case
    batches = Batches(*streams, weights=weights, **sizes, separate_documents=True)
    before = drawn(batches, taken)
    state = json.loads(json.dumps(batches.state()))
    resumed = Batches(*streams, weights=weights, **sizes, separate_documents=True)
    resumed.restore(state)
    for left, right in islice(zip(batches, resumed, strict=True), 6):
        assert same(left, right)
    changed = Batches(*streams, weights=others[: len(streams)], **sizes)
    changed.restore(state)
    assert changed.state() == state
    rows = before + drawn(changed, 20)
    for number, stream in enumerate(streams):
        windows = changed.state()["windows"][number]
        mine = [row for row in rows if row[0] // 1000 == number]
        assert len(mine) == windows and (others[number] or windows == state["windows"][number])
        # Over both weights a window comes once in an epoch, whole epochs of it being together.
        n = len(stream) // sizes["seq_len"]
        if sizes["batch"] == 1:
            for epoch in range(windows // n):
                assert len({int(row[0]) for row in mine[epoch * n : (epoch + 1) * n]}) == n


@given(mixtures(), st.integers(1, 4))
def test_a_mixture_is_dealt_out_row_by_row(case, parts):
    streams, weights, sizes = case
    sizes["batch"] *= parts
    if min(map(len, streams)) < sizes["seq_len"] or sum(map(len, streams)) < sizes["batch"] * sizes["seq_len"]:
        return
    whole = Batches(*streams, weights=weights, **sizes)
    shares = [Batches(*streams, weights=weights, **sizes, part=(part, parts)) for part in range(parts)]
    for _ in range(3):
        batch = next(whole)
        for part, share in enumerate(shares):
            assert np.array_equal(next(share).ids, batch.ids[part::parts])
            assert share.state() == whole.state()


def test_no_process_always_gets_the_same_stream():
    streams = [Tokens([np.full(400, number, dtype=np.uint16)], np.array([0])) for number in range(2)]
    first = Batches(*streams, batch=2, seq_len=8, part=(0, 2))
    assert {int(batch.ids[0, 0]) for batch in islice(first, 20)} == {0, 1}


def test_a_stream_shorter_than_a_sequence_is_refused_by_its_place():
    with pytest.raises(
        UsageError, match=r"source 2 of 2 has 7 tokens of training text, less what is held out; a sequence needs 8"
    ):
        Batches(counting(100), counting(7), batch=2, seq_len=8)


def test_a_mixture_of_other_streams_is_refused():
    state = Batches(counting(100), counting(90), batch=2, seq_len=8).state()
    with pytest.raises(UsageError, match=r"tokens \[100, 90\] then, 100 now; streams 2 then, 1 now"):
        Batches(counting(100), batch=2, seq_len=8).restore(state)


@given(cases(), st.integers(0, 2**32))
def test_what_is_learned_goes_with_its_token(case, seed):
    tokens, sizes = case
    learned = np.random.default_rng(seed).random(len(tokens)) < 0.5
    masks = [learned[i : i + 50] for i in range(0, len(tokens), 50)]
    masked = Tokens(tokens._shards, tokens.document_starts, masks=masks)
    for plain, batch in islice(zip(Batches(tokens, **sizes), Batches(masked, **sizes), strict=True), 8):
        assert plain.learned is None and batch.learned.dtype == bool
        np.testing.assert_array_equal(batch.ids, plain.ids)
        np.testing.assert_array_equal(batch.learned, learned[batch.ids])
