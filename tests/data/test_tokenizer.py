import json
import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cadre.data.prepare import prepare
from cadre.data.tokenizer import MIN_VOCAB_SIZE, _in_stretches, sampled, train_tokenizer
from cadre.errors import UsageError
from cadre.hub.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    vocabulary_size,
)

TEXTS = [
    "It was the custom of the house to read aloud; the readers, in 1790 and 1791, were two.\n\nThey don't any more.",
    "The readers read the same page again and again, and the house was quiet. Ça alors!",
] * 3
ANY_TEXT = st.text() | st.lists(
    st.sampled_from([*TEXTS, "<|eos|>", "<|bos|", "\r\n", "\n\n", "  ", "\t", "12345", "ﬁ", "é", "🙂", "\x00"])
).map("".join)

TRAINED = train_tokenizer(TEXTS, 320)


def test_special_tokens_come_first_and_the_size_is_kept():
    assert [TRAINED.id_to_token(i) for i in range(4)] == ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
    assert vocabulary_size(TRAINED) == TRAINED.get_vocab_size() == 320
    assert vocabulary_size(train_tokenizer(["ab"], 1000)) == MIN_VOCAB_SIZE  # nothing to merge


@given(ANY_TEXT)
def test_any_text_comes_back_byte_for_byte(text):
    assert TRAINED.decode(TRAINED.encode(text).ids, skip_special_tokens=False) == text


def test_lines_that_are_nearly_too_long_are_looked_at_once():
    began = time.monotonic()
    assert len(list(_in_stretches(["\n".join(["字" * 1000] * 2000)]))) == 1
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("kind", ["ACGT", " "])
def test_text_without_a_space_takes_no_longer(kind):
    """In one stretch these would take minutes: the time grows with the square of its length."""
    text = "".join(random.Random(0).choices(kind, k=400_000))
    began = time.monotonic()
    tokenizer = train_tokenizer(["before ", text, " after"], 300)
    assert time.monotonic() - began < 20
    assert tokenizer.decode(tokenizer.encode(text[:1000]).ids) == text[:1000]


def test_only_long_stretches_are_cut():
    texts = ["a b " * 5000, "x" * 1000, "a " + "y" * 1100 + " b"]
    assert list(_in_stretches(texts))[:2] == texts[:2]
    assert "".join(_in_stretches(texts)) == "".join(texts)
    assert max(len(piece) for piece in list(_in_stretches(texts))[2:]) == 256


def test_the_same_texts_give_the_same_tokenizer():
    assert tokenizer_hash(train_tokenizer(iter(TEXTS), 320)) == tokenizer_hash(TRAINED)
    assert tokenizer_hash(train_tokenizer(TEXTS, 321)) != tokenizer_hash(TRAINED)


@given(st.integers(1, 12_000), st.booleans())
def test_a_tokenizer_of_a_large_corpus_learns_from_pieces_all_over_it(most, whole):
    texts = [f"{number:09} " for number in range(1000)]
    corpus = ["".join(texts)] if whole else texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cadre.data.tokenizer.MOST_CHARACTERS", most)
        patch.setattr("cadre.data.tokenizer._PIECE", 10)
        taken = list(sampled(iter(corpus), 10_000))
    if most >= 10_000:
        assert taken == corpus
        return
    places = [-1, *(int(piece) for piece in taken), 1000]
    assert abs(len(taken) - most / 10) <= 1
    assert all(0 < later - earlier < 10_000 / most + 2 for earlier, later in pairwise(places))


def test_the_sample_is_what_the_tokenizer_is_trained_on(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("to read aloud again " * 500 + "zebra crossing " * 500)
    monkeypatch.setattr("cadre.data.tokenizer.MOST_CHARACTERS", 30)
    monkeypatch.setattr("cadre.data.tokenizer._PIECE", 4000)
    data = prepare(str(tmp_path / "text.txt"), vocab_size=300, out=tmp_path / "out")
    assert vocabulary_size(data.tokenizer) == 260  # nothing was seen


def test_numbers_are_cut_into_groups_of_three():
    tokenizer = train_tokenizer(["1234567 " * 50], 400)
    assert tokenizer.encode("1234567").tokens == ["123", "456", "7"]


@pytest.mark.parametrize("size", [-1, 0, MIN_VOCAB_SIZE - 1])
def test_a_vocabulary_below_the_bytes_is_refused(size):
    with pytest.raises(UsageError, match=f"vocab_size {size} is too small.*260"):
        train_tokenizer(TEXTS, size)


@pytest.mark.parametrize("size", [2**24 + 1, 2**31, 2**63, 10**20])
def test_a_vocabulary_beyond_all_bounds_is_refused(size, tmp_path):
    with pytest.raises(UsageError, match=f"^vocab_size {size} is too large: it must be at most 16,777,216$"):
        train_tokenizer(TEXTS, size)
    with pytest.raises(UsageError, match=f"^vocab_size {size} is too large"):
        prepare("sotu", vocab_size=size, out=tmp_path / "out")


def test_save_and_load_keep_the_tokenizer(tmp_path):
    save_tokenizer(TRAINED, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        assert tokenizer_hash(load_tokenizer(path)) == tokenizer_hash(TRAINED)


def test_a_runs_tokenizer_is_that_of_its_model_and_a_folders_own_comes_first(tmp_path):
    save_tokenizer(TRAINED, tmp_path / "model")
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(TRAINED)
    other = train_tokenizer(TEXTS, 300)
    save_tokenizer(other, tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(other) != tokenizer_hash(TRAINED)


@pytest.mark.parametrize("model_type", [None, "deepseek_v3", "deepseek_v2", "llama", "glm4_moe"])
def test_transformers_loads_it_with_the_same_ids(tmp_path, model_type):
    from transformers import AutoTokenizer

    save_tokenizer(TRAINED, tmp_path)
    if model_type is not None:
        # AutoTokenizer may prefer a class by the model's type over the saved file.
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 320}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.bos_token_id) == ("<|bos|>", 0)
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|eos|>", 1)
    for text in [*TEXTS, "", " a  b \r\n\n\t12345 é中🙂\x00", "<|bos|>x<|eos|>", "it 's , wasn 't ."]:
        ids = TRAINED.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why"},
    ]
    assert (
        theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "Be brief.<|user|>Hi<|assistant|>Yes?<|eos|><|user|>Why<|assistant|>"
    )


def test_loading_switches_truncation_and_padding_off(tmp_path):
    tokenizer = Tokenizer.from_str(TRAINED.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXTS[0]).ids == TRAINED.encode(TEXTS[0]).ids


def test_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent.json")
    file = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\xff\xfe", TRAINED.to_str().encode()[:-100]):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"not a tokenizer\.json") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<s>", "</s>"], (0, 1)),
        (["<|begin_of_text|>", "<|end_of_text|>"], (0, 1)),
        (["<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"], (0, 1)),
        (["<pad>", "<|endoftext|>"], (None, 1)),
        (["<bos>"], (0, None)),
        ([], (None, None)),
    ],
)
def test_special_tokens_of_other_tokenizers_are_recognised(tmp_path, tokens, expected):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(tokens)
    assert special_ids(tokenizer) == expected
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [config.get(name) for name in ("bos_token", "eos_token")]
    assert named == [None if i is None else tokens[i] for i in expected]
    assert "chat_template" not in config  # it would name tokens that this one lacks


def test_an_ordinary_entry_is_no_special_token():
    assert special_ids(Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))) == (None, None)


def test_ids_beyond_the_vocabulary_are_refused():
    check_vocabulary(TRAINED, 320)
    with pytest.raises(UsageError, match="ids up to 319, beyond the vocabulary of 319"):
        check_vocabulary(TRAINED, 319)
    gap = Tokenizer(models.BPE(vocab={"a": 0, "b": 900}, merges=[]))
    with pytest.raises(UsageError, match="ids up to 900, beyond the vocabulary of 2"):
        check_vocabulary(gap, 2)
