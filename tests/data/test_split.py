import hashlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.data.sources import Document
from cadre.data.split import pieces, split_documents
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError

TEXTS = st.lists(st.text(min_size=2), min_size=1, max_size=30)
SHARES = st.floats(0, 1, exclude_max=True)


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


@given(TEXTS, SHARES)
def test_held_out_text_is_in_no_training_document(texts, share):
    split = split_documents(documents(texts), share)
    divided = list(split.divide(documents(texts)))
    train = {document.text for held, document in divided if not held}
    held_out = {document.text for held, document in divided if held}
    assert train
    distinct = len(set(texts))
    if distinct > 1:
        assert [document for _, document in divided] == documents(texts)
        assert not train & held_out
        wanted = min(max(1, round(share * distinct)), distinct - 1) if share else 0
        assert len(held_out) == wanted
    elif share:
        assert {head + tail for head in train for tail in held_out} == set(texts)
    else:
        assert train == set(texts)


def test_few_large_documents_give_up_their_ends():
    """Whole ones would be most of the text."""
    texts = [f"Book {name}.\n" + f"A line of book {name}.\n" * lines for name, lines in (("a", 5000), ("b", 300), ("c", 3))]
    split = split_documents(documents(texts), 0.05)
    divided = list(split.divide(documents(texts)))
    held = sum(len(document.text) for held, document in divided if held)
    assert 0.04 < held / sum(map(len, texts)) < 0.11
    by_name = {name: "".join(d.text for _, d in divided if d.name == name) for name in ("d0", "d1", "d2")}
    assert list(by_name.values()) == texts  # nothing is lost, and ends follow beginnings
    assert [held for held, d in divided if d.name == "d2"] == [False]  # too short to be cut
    assert all(document.text.startswith("A line") for held, document in divided if held)


def test_one_large_document_among_many_small_ones():
    """It gives up its end; the others are held out whole, as if it were not there."""
    small = [f"Letter {number}.\n" + "A line of a letter.\n" * 60 for number in range(100)]
    for name in range(200):  # one that ranks among the first
        large = f"Book {name}.\n" + "A line of a book.\n" * 20_000
        split = split_documents(documents([*small, large]), 0.05)
        if split.cut:
            break
    divided = list(split.divide(documents([*small, large])))
    whole = [document.text for held, document in divided if held and document.name != "d100"]
    assert len(split.cut) == 1 and len(whole) == 5 and set(whole) < set(small)
    (end,) = (document.text for held, document in divided if held and document.name == "d100")
    assert large.endswith(end) and 0.04 < len(end) / len(large) < 0.11


def test_documents_of_about_one_size_are_held_out_whole():
    texts = [f"Book {name}.\n" + f"A line of book {name}.\n" * 300 for name in range(30)]
    divided = list(split_documents(documents(texts), 0.05).divide(documents(texts)))
    assert sum(held for held, _ in divided) == 2 and [d.text for _, d in divided] == texts


@given(TEXTS, SHARES, st.randoms())
def test_the_choice_depends_on_neither_order_nor_name(texts, share, random):
    shuffled = list(texts)
    random.shuffle(shuffled)
    assert held_texts(texts, share) == held_texts(shuffled, share)


def held_texts(texts: list[str], share: float) -> set[str]:
    return {document.text for held, document in split_documents(documents(texts), share).divide(documents(texts)) if held}


@given(TEXTS, SHARES)
def test_those_are_held_out_whose_hashes_rank_first(texts, share):
    ranked = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    held = held_texts(texts, share)
    assert len(ranked) == 1 or held == set(ranked[: len(held)])


def test_a_document_takes_less_than_a_hundred_bytes():
    """Whoever has a hundred million of them has no hundred gigabytes beside the model."""
    count = 20_000
    tracemalloc.start()
    try:
        split = split_documents((Document("name", f"Note {number}.") for number in range(count)), 0.05)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert split.held_out.sum() == count * 0.05 and most < 100 * count


def test_content_tells_corpora_apart():
    def content(*texts: str) -> str:
        return split_documents([Document("any", text) for text in texts], 0.05).content

    assert content("a", "b") == content("a", "b")
    assert len({content("a", "b"), content("b", "a"), content("ab"), content("a", "b", "b")}) == 4


def test_one_document_gives_up_its_end_where_a_paragraph_ends():
    text = "".join(f"Paragraph {i} has one line\nand another.\n\n" for i in range(100))
    split = split_documents([Document("book", text)], 0.1)
    (_, head), (_, tail) = split.divide([Document("book", text)])
    assert head.text + tail.text == text
    assert head.text.endswith("\n\n") and tail.text.startswith("Paragraph")
    assert 0.1 <= len(tail.text) / len(text) < 0.2


@pytest.mark.parametrize("before, answer, after", [("Why? " * 99, "So. " * 20, ""), ("Why?", "So. " * 20, "And then? " * 99)])
def test_one_conversation_has_something_to_learn_on_both_sides_of_the_cut(before, answer, after):
    chat = Document("chat", before + answer + after, answers=((len(before), len(before + answer)),))
    (_, head), (_, tail) = split_documents([chat], 0.1).divide([chat])
    assert head.text + tail.text == chat.text
    assert head.learned_bytes + tail.learned_bytes == len(answer)
    assert 0.1 <= tail.learned_bytes / len(answer) < 0.2


def test_one_document_without_any_boundary_is_cut_at_the_share():
    split = split_documents([Document("d", "x" * 100)], 0.25)
    assert [len(document.text) for _, document in split.divide([Document("d", "x" * 100)])] == [75, 25]
    split = split_documents([Document("d", "x")], 0.25)
    with pytest.raises(UsageError, match="one character"):
        list(split.divide([Document("d", "x")]))


@pytest.mark.parametrize("share", [-0.1, 1.0, 5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UsageError, match="held_out"):
        split_documents(documents(["a", "b"]), share)


@pytest.mark.parametrize("changed", [["a"], ["a", "c"], ["a", "b", "c"]])
def test_text_that_changes_meanwhile_is_noticed(changed):
    split = split_documents(documents(["a", "b"]), 0.5)
    with pytest.raises(RunError, match="changed while"):
        list(split.divide(documents(changed)))


TOKENIZER = train_tokenizer(["one two three\nfour, five\n\nsix  seven 1234 don't. \n" * 5], 330)
WORDS = st.lists(st.sampled_from([*"ab1 \n\r\t.'", "  ", "\n\n", " the", "don't", "...\n", "1234", "\x1c", "\u2028", "é"]))


def ids_of(texts: list[str]) -> list[int]:
    return [token for text in texts for token in TOKENIZER.encode(text).ids]


@given(WORDS.map("".join), st.integers(1, 12))
def test_pieces_are_the_text_and_tokenise_alike(text, limit):
    cut = list(pieces(text, limit))
    assert "".join(cut) == text
    assert all(len(piece) <= limit for piece in cut)
    seams = [sum(map(len, cut[:i])) for i in range(1, len(cut))]
    clean = all(
        (text[s - 1] == "\n" and not text[s].isspace())
        or (text[s] == " " and not text[s - 1].isspace() and not text[s + 1 : s + 2].isspace() and s + 1 < len(text))
        for s in seams
    )
    if clean:  # no piece had to be cut at the limit
        assert ids_of(cut) == ids_of([text])


def test_prose_is_always_cut_cleanly():
    text = "The quick brown fox, who jumps.\n\nOver  the dogs: 1234 of them!\n" * 200
    cut = list(pieces(text, 500))
    assert len(cut) > 20
    assert ids_of(cut) == ids_of([text])
