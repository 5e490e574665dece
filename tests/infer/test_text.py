from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.infer.text import AnswerLine, Detokenizer, StopStrings
from tests.infer.conftest import TEXT

BYTE_LEVEL = train_tokenizer([TEXT * 20], 300)
REPLACEMENT = "\ufffd"


def byte_fallback():
    """A vocabulary as SentencePiece makes it: a space in front of words, single bytes for what is missing."""
    words = ["▁", "▁hello", "▁world", "a", "wor", "!"]
    entries = [("<unk>", 0.0), ("<s>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256)), *((w, -1.0) for w in words)]
    tokenizer = Tokenizer(models.Unigram(entries, 0, byte_fallback=True))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


FALLBACK = byte_fallback()


def pieces(tokenizer, ids, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return [detokenizer.push(token) for token in ids]


@given(text=st.text(max_size=40))
def test_text_comes_back_in_whole_characters(text):
    ids = BYTE_LEVEL.encode(text).ids
    parts = pieces(BYTE_LEVEL, ids)
    assert "".join(parts).rstrip(REPLACEMENT) == text.rstrip(REPLACEMENT)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in part for part in parts)


def test_a_split_emoji_waits_for_its_last_byte():
    ids = BYTE_LEVEL.encode("🫖").ids
    assert len(ids) > 1
    assert pieces(BYTE_LEVEL, ids) == [""] * (len(ids) - 1) + ["🫖"]


@given(ids=st.lists(st.integers(0, 299), max_size=30), prompt=st.text(max_size=6))
def test_any_ids_give_what_decoding_them_at_once_adds(ids, prompt):
    """Bytes that are no UTF-8 among them; only an incomplete end is left out."""
    context = BYTE_LEVEL.encode(prompt).ids
    start = BYTE_LEVEL.decode(context)
    whole = BYTE_LEVEL.decode(context + ids)
    joined = start + "".join(pieces(BYTE_LEVEL, ids, context))
    assert whole.startswith(joined)
    assert not whole[len(joined) :].strip(REPLACEMENT)


@given(st.lists(st.sampled_from(["▁", "▁hello", "▁world", "a", "wor", "!", "你", "🎉", "é"]), min_size=1, max_size=8))
def test_sentencepiece_text_comes_back(words):
    vocabulary = FALLBACK.get_vocab()
    ids = []
    for word in words:
        ids += [vocabulary[word]] if word in vocabulary else [vocabulary[f"<0x{b:02X}>"] for b in word.encode()]
    assert "".join(pieces(FALLBACK, ids)) == FALLBACK.decode(ids)
    context = [vocabulary["<s>"], vocabulary["▁hello"]]
    assert "hello" + "".join(pieces(FALLBACK, ids, context)) == FALLBACK.decode(context + ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FALLBACK])
def test_bytes_that_never_make_a_character_are_given_out_and_forgotten(tokenizer):
    """Each token costs the same, in a prompt or an answer of any length, and the text goes on rightly after them."""
    vocabulary = tokenizer.get_vocab()
    bad, good = vocabulary.get("<0x80>", BYTE_LEVEL.encode("🫖").ids[1]), vocabulary["a"]
    assert tokenizer.decode([bad]) == REPLACEMENT
    detokenizer, longest = Detokenizer(tokenizer, [bad] * 500), 0
    parts = []
    for token in [bad] * 500:
        parts.append(detokenizer.push(token))
        longest = max(longest, len(detokenizer.window))
        assert len(detokenizer.window) <= 20 or len(parts) == 1
    assert "".join(parts) == REPLACEMENT * 493
    parts += [detokenizer.push(good), detokenizer.push(good)]
    assert "".join(parts) == REPLACEMENT * 500 + "aa"


@given(
    ids=st.lists(st.integers(0, 299), max_size=12),
    middle=st.integers(0, 40),
    after=st.lists(st.integers(0, 299), max_size=12),
)
def test_a_long_run_of_broken_bytes_reads_as_decoded_at_once(ids, middle, after):
    ids += [BYTE_LEVEL.encode("🫖").ids[1]] * middle + after
    whole, joined = BYTE_LEVEL.decode(ids), "".join(pieces(BYTE_LEVEL, ids))
    assert whole.startswith(joined)
    assert not whole[len(joined) :].strip(REPLACEMENT)


def test_a_long_prompt_is_not_decoded():
    """Only its end matters to the first tokens that follow."""
    context = BYTE_LEVEL.encode(TEXT * 20).ids
    detokenizer = Detokenizer(BYTE_LEVEL, context)
    assert len(detokenizer.window) < 40
    assert "".join(detokenizer.push(token) for token in BYTE_LEVEL.encode("naïve 你好").ids) == "naïve 你好"


@given(st.lists(st.integers(0, FALLBACK.get_vocab_size() - 1), max_size=30))
def test_byte_fallback_survives_bytes_that_are_no_text(ids):
    assert all(isinstance(piece, str) for piece in pieces(FALLBACK, ids))


def test_special_tokens_give_no_text():
    eos, user = BYTE_LEVEL.token_to_id("<|eos|>"), BYTE_LEVEL.token_to_id("<|user|>")
    ids = BYTE_LEVEL.encode("the union").ids
    assert "".join(pieces(BYTE_LEVEL, [eos, *ids, user, *ids])) == "the unionthe union"


@given(
    text=st.text("ab\n", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stop=st.text("ab\n", min_size=1, max_size=4),
)
def test_a_stop_string_ends_the_text_wherever_it_is_cut(text, cuts, stop):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stops, out = StopStrings([stop]), ""
    for start, end in pairwise(bounds):
        out += stops.push(text[start:end])
        assert stop not in out
        if stops.hit:
            break
    assert out + stops.rest() == text.partition(stop)[0]
    assert stops.hit == (stop in text)


def test_what_cannot_be_a_stop_string_is_given_at_once():
    stops = StopStrings(["###", "\n\n"])
    assert [stops.push(piece) for piece in ["a#", "#", "b", "\n", "c", "##", "#d"]] == ["a", "", "##b", "", "\nc", "", ""]
    assert stops.hit and stops.rest() == ""


def test_the_earliest_of_several_stop_strings_counts():
    assert StopStrings(["c", "b"]).push("abc") == "a"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["x", ""])


@pytest.mark.parametrize("pieces, answer", [
    (["yes", " we", " do\nno"], "yes we do"),
    (["\n", " \n", "\tyes", "\n"], "yes"),
    (["\n\nyes\nno"], "yes"),
    (["yes"], "yes"),
    (["\n", ""], ""),
])  # fmt: skip
def test_an_answer_is_one_line(pieces, answer):
    line = AnswerLine()
    given = ""
    for piece in pieces:
        given += line.push(piece)
        if line.ended:
            break
    assert given == answer
    assert line.ended == ("\n" in "".join(pieces).lstrip())
