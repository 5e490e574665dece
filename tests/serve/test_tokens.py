import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cadre.data.tokenizer import train_tokenizer
from cadre.serve.tokens import TokenTexts

BYTE_LEVEL = train_tokenizer(["The naïve café served 你好 and 😀🎉.\n" * 20], 300)


def sentencepiece_like():
    """Words with SentencePiece's mark of a space, and a token for every byte."""
    words = ["<unk>", "▁yes", "no", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@given(st.text(max_size=30))
def test_the_bytes_of_a_texts_tokens_are_the_texts(text):
    texts = TokenTexts(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    if not texts.special & set(ids):
        assert b"".join(map(texts.raw, ids)) == text.encode()
        assert sum(map(texts.begun, ids)) == len(text)


@given(st.lists(st.sampled_from(["The ", "café", "你好", "<|eos|>", "<|user|>", " 😀"]), min_size=1, max_size=8).map("".join))
def test_offsets_of_a_decoded_text(text):
    """Special tokens are written out in it. A token is where its characters are, or, of part of a character, after it."""
    texts = TokenTexts(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    offsets = texts.offsets(ids, text)
    assert len(offsets) == len(ids) and offsets[0] == 0
    for token, offset in zip(ids, offsets, strict=True):
        if not texts.text(token).startswith("bytes:"):
            assert text[offset:].startswith(texts.text(token))


def test_offsets_where_the_first_space_is_dropped():
    tokenizer = sentencepiece_like()
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    ids = [tokenizer.token_to_id(piece) for piece in ("▁yes", "no", "▁yes")]
    text = tokenizer.decode(ids)
    assert text == "yesno yes" and TokenTexts(tokenizer).offsets(ids, text) == (0, 3, 5)


def test_no_token_covers_more_characters_than_the_longest():
    for tokenizer in (BYTE_LEVEL, sentencepiece_like()):
        texts = TokenTexts(tokenizer)
        covered = (texts.raw(token).decode(errors="ignore") for token in range(tokenizer.get_vocab_size()))
        assert all(len(text) <= texts.longest for text in covered)


def test_bytes_that_are_no_character_are_spelt_out():
    texts = TokenTexts(BYTE_LEVEL)
    alphabet = {texts.raw(token): token for token in range(300) if len(texts.raw(token)) == 1}
    assert len(alphabet) == 256
    assert texts.text(alphabet[b"\xe2"]) == "bytes:\\xe2"
    assert texts.text(alphabet[b"a"]) == "a"
    assert texts.begun(alphabet[b"\xe2"]) == 1 and texts.begun(alphabet[b"\x82"]) == 0


def test_special_tokens_show_their_name_but_are_no_text():
    texts = TokenTexts(BYTE_LEVEL)
    token = BYTE_LEVEL.token_to_id("<|eos|>")
    assert (texts.text(token), texts.begun(token)) == ("<|eos|>", 0)


def test_an_id_without_a_token_is_empty():
    assert TokenTexts(BYTE_LEVEL).raw(BYTE_LEVEL.get_vocab_size() + 5) == b""


@pytest.mark.parametrize("piece, raw", [("▁yes", b" yes"), ("no", b"no"), ("<0xE2>", b"\xe2"), ("<s>", b"<s>")])
def test_sentencepiece_like_vocabularies(piece, raw):
    tokenizer = sentencepiece_like()
    assert TokenTexts(tokenizer).raw(tokenizer.token_to_id(piece)) == raw
