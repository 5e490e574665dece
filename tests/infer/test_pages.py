import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.infer.pages import PagePool, bytes_for, cache_dtype, chain_key
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from tests.shapes import FAMILIES, small


def pool(pages=4, **options):
    return PagePool(small("llama"), pages=pages, page_size=2, dtype=torch.float32, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_counted_from_the_config(family, dtype):
    config = small(family)
    expected = count(config, cache_bytes=dtype.itemsize).kv_cache_bytes_per_token
    made = PagePool(config, pages=3, page_size=5, dtype=dtype)
    assert made.bytes_per_token == expected
    assert made.first.nbytes + made.second.nbytes == expected * 15 == expected * made.tokens
    assert bytes_for(config, 11, dtype, 5) == expected * 15


def test_latents_are_all_that_is_kept():
    made = PagePool(small("deepseek_v3"), pages=3, page_size=5, dtype=torch.float32, layers=4)
    assert (made.first.shape, made.second.shape) == ((4, 3, 5, 10), (4, 3, 5, 4))
    grouped = pool()
    assert grouped.first.shape == grouped.second.shape == (2, 4, 2, 2, 8)


def test_layers_of_prediction_modules_begin_as_numbers(monkeypatch):
    """Memory that was used before may hold anything."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, float("nan"), **options))
    made = PagePool(small("deepseek_v3"), pages=3, page_size=5, dtype=torch.float32, layers=4)
    for part in (made.first, made.second):
        assert part[:2].isnan().all()
        assert (part[2:] == 0).all()


@given(pages=st.integers(1, 50), spare=st.floats(0, 0.99), size=st.integers(1, 9))
def test_a_budget_is_used_up_and_not_exceeded(pages, spare, size):
    config = small("deepseek_v2")
    one = bytes_for(config, 1, torch.bfloat16, size)
    made = PagePool.for_budget(config, int(one * (pages + spare)), page_size=size, dtype=torch.bfloat16)
    assert made.pages == pages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pool(pages=0), "pages is 0; it must be at least 1"),
        (lambda: PagePool(small("llama"), pages=1, page_size=-1, dtype=torch.float32), "page_size is -1"),
        (lambda: PagePool.for_budget(small("llama"), 100, dtype=torch.float32), r"100 bytes holds no page of 16 tokens: give"),
    ],
)
def test_sizes_out_of_range_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_new_pages_follow_each_other_and_the_next_one_is_preferred():
    book = pool(6)
    first, second = book.take(2), book.take(2)
    assert (first, second) == ([0, 1], [2, 3])
    assert book.take(1, after=second[-1]) == [4]
    book.release(second)
    assert book.take(1, after=first[-1]) == [2]
    assert book.free == 2


def test_found_pages_are_overwritten_last_and_the_least_recently_used_first():
    book = pool(5)
    pages = book.take(4)
    for page in pages:
        book.publish(page, bytes([page]))
    book.release(pages[:2])
    book.release(pages[2:])
    other = book.take(1)
    assert other == [4]
    book.release(other)
    assert book.take(1) == [4]  # nobody would find it
    # Of each sequence the end goes first; using a page again puts it last.
    book.share(1)
    book.release([1])
    assert [book.take(1)[0] for _ in range(4)] == [0, 3, 2, 1]
    assert all(book.find(bytes([page])) is None for page in pages)
    assert book.free == 0


def test_the_first_page_under_a_key_stays_the_one_that_is_found():
    book = pool()
    one, other = book.take(2)
    book.publish(one, b"key")
    book.publish(other, b"key")
    assert book.find(b"key") == one
    book.release([one, other])
    book.check([])
    assert book.take(3) == [1, 2, 3]
    assert book.find(b"key") == one


@given(st.data())
@settings(max_examples=60)
def test_the_book_stays_true_whatever_happens(data):
    """Against an obviously right record: who holds which pages, and what was written where."""
    book, held, written = pool(data.draw(st.integers(1, 8))), [], {}
    for step in range(data.draw(st.integers(1, 30))):
        act = data.draw(st.sampled_from(["take", "share", "release", "publish", "recover"]))
        if act == "take" and book.free:
            after = data.draw(st.none() | st.integers(0, book.pages - 1))
            taken = book.take(data.draw(st.integers(1, book.free)), after)
            assert not {page for pages in held for page in pages} & set(taken)
            written = {key: page for key, page in written.items() if page not in taken}
            held.append(taken)
        elif act == "share" and written:
            key = data.draw(st.sampled_from(sorted(written)))
            book.share(written[key])
            held.append([written[key]])
        elif act == "release" and held:
            book.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif act == "publish" and held:
            page = data.draw(st.sampled_from([page for pages in held for page in pages]))
            if page not in written.values():
                book.publish(page, bytes([step]))
                written[bytes([step])] = page
        elif act == "recover":
            book.recover()
            held = []
        book.check(held)
        assert {key: book.find(key) for key in written} == written
        in_use = {page for pages in held for page in pages}
        assert all(book.is_idle(page) == (page not in in_use) for page in range(book.pages))


def test_recovery_after_an_interruption_keeps_what_can_be_found():
    book = pool()
    pages = book.take(3)
    book.publish(pages[0], b"key")
    book._idle.popitem()  # a page taken, but not yet noted by anyone
    book._references[pages[1]] = 7
    book.recover()
    book.check([])
    assert book.find(b"key") == pages[0]
    assert book.take(3) == [1, 2, 3]


def test_the_check_sees_leaks_and_double_use():
    book = pool()
    pages = book.take(2)
    book.check([pages])
    for wrong in ([], [pages, pages[:1]], [[2, 3]]):
        with pytest.raises(AssertionError, match="references"):
            book.check(wrong)


@given(st.lists(st.integers(0, 2**31), min_size=4, max_size=4), st.integers(0, 3))
def test_a_key_depends_on_every_id_before_it(ids, changed):
    def key(ids):
        return chain_key(chain_key(b"", ids[:2]), ids[2:])

    other = [token + (place == changed) for place, token in enumerate(ids)]
    assert key(ids) == key(list(ids)) != key(other)


@pytest.mark.parametrize(
    ("weights", "compute", "kept"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_the_cache_is_as_narrow_as_weights_or_arithmetic(weights, compute, kept):
    model = Transformer(small("llama")).to(weights)
    model.compute_dtype = compute
    assert cache_dtype(model) == kept
