from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.data.sources import Document, read_documents
from cadre.errors import UsageError
from cadre.study import excerpts as module
from cadre.study.excerpts import Excerpt, group, held_out_text, read_text, sample
from cadre.train.recipe import read_recipe
from tests.runs import write_recipe

words = st.lists(st.text("ab\n \u00e9", min_size=1, max_size=30), min_size=1, max_size=40).map(" ".join)
corpora = st.lists(words, min_size=1, max_size=8).map(lambda texts: [Document(f"d{i}", t) for i, t in enumerate(texts)])


@given(corpora, st.integers(5, 60))
def test_with_room_for_all_the_excerpts_are_the_text(documents, piece):
    chosen = sample(documents, 10**6, piece)
    assert (chosen.documents, chosen.complete) == (len(documents), True)
    for document in documents:
        assert "".join(e.text for e in chosen.excerpts if e.document == document.name) == document.text
    whole = "".join(document.text for document in documents)
    for excerpt in chosen.excerpts:
        assert len(excerpt.text) <= piece + module._SEAM_REACH
        assert excerpt.text[:piece] in whole[excerpt.place : excerpt.place + 2 * piece + module._SEAM_REACH]


@given(st.integers(1, 3000), st.integers(50, 500))
def test_without_room_they_are_as_much_of_it_evenly_spread(pieces, letters):
    text = "".join(f"{number:08d} x" for number in range(pieces))  # ten letters each
    chosen = sample([Document("a", text)], letters, 10).excerpts
    total = sum(len(excerpt.text) for excerpt in chosen)
    assert min(len(text), letters) * 0.9 - 20 <= total <= 2 * letters + 20
    places = [excerpt.place for excerpt in chosen]
    gaps = {b - a for a, b in pairwise(places)}
    assert places[0] == 0 and len(gaps) <= 1 and (len(places) == 1 or len(text) - places[-1] <= 2 * max(gaps))


def test_no_word_is_cut():
    text = "the people of the united states " * 50
    assert all(e.text.split() == e.text.strip().split(" ") and set(e.text.split()) <= set(text.split())
               for e in sample([Document("a", text)], 300, 37).excerpts)  # fmt: skip


def test_reading_ends_at_its_limit(monkeypatch):
    monkeypatch.setattr(module, "READ_AT_MOST", 1000)
    seen = []
    documents = (seen.append(n) or Document(str(n), "word " * 60) for n in range(100))
    chosen = sample(documents, 10**6, 50)
    assert not chosen.complete and len(seen) == chosen.documents == 4


# ------------------------------------------------------------------------------------------------- reading


def test_a_large_text_file_comes_in_blocks_and_is_all_there(tmp_path, monkeypatch):
    text = "".join(f"line {number} of caf\u00e9\r\n" for number in range(300))
    (tmp_path / "big.txt").write_text("\ufeff" + text, encoding="utf-8", newline="")
    (tmp_path / "a.md").write_text("small")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / ".hidden.txt").write_text("unseen")
    whole = list(read_documents(str(tmp_path)))
    assert list(read_text([str(tmp_path)])) == whole
    monkeypatch.setattr(module, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(module, "_BLOCK_LETTERS", 100)
    (tmp_path / "big2.txt").symlink_to(tmp_path / "big.txt")  # read once
    documents = list(read_text([str(tmp_path), str(tmp_path / "big.txt")]))
    assert [d for d in documents if "big" not in d.name] == [d for d in whole if "big" not in d.name]
    blocks = [d.text for d in documents if "big" in d.name]
    assert len(blocks) > 20 and max(map(len, blocks)) <= 200 and "".join(blocks) == text


@pytest.mark.parametrize("content, words", [(b"ab\0c" * 100, "binary file"), (b"\xff\xfe" * 200, "not UTF-8")])
def test_a_large_file_that_is_no_text_is_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(module, "WHOLE_FILE_BYTES", 100)
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        list(read_text([str(tmp_path / "x.txt")]))


def test_what_cannot_be_read_is_refused_at_once(tmp_path):
    for name in ("absent.txt", "picture.png"):
        with pytest.raises(UsageError, match=name):
            read_text([str(tmp_path / name)]) if name[0] == "a" else read_text([_touched(tmp_path / name)])


def _touched(path: Path) -> str:
    path.write_bytes(b"x")
    return str(path)


def test_the_held_out_text_of_a_run_is_what_its_training_held_out(tmp_path, monkeypatch):
    from cadre.data.prepare import prepare

    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    recipe = read_recipe(str(write_recipe(tmp_path)))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    data = prepare(recipe.data.source, vocab_size=300, held_out=recipe.data.held_out)
    assert list(held_out_text(tmp_path)) == list(data.read_held_out()) != []
    for changes, words in ((["data.held_out=0"], "held no text out: say with --data"), (
        [f"data.source={tmp_path}/gone"], "its text cannot be read .*gone.*: say with --data")):  # fmt: skip
        (tmp_path / "recipe.toml").write_text(read_recipe(str(tmp_path / "tiny.toml"), changes).to_toml())
        with pytest.raises(UsageError, match=words):
            held_out_text(tmp_path)


# ------------------------------------------------------------------------------------------------- groups


def excerpts(*documents: str, titles: list[str] | None = None, length: int = 10) -> list[Excerpt]:
    return [Excerpt(name, (titles or documents)[place], place * length, "x" * length) for place, name in enumerate(documents)]


@pytest.mark.parametrize("names, groups", [
    (["1790-Washington-1", "1799-Adams-1", "1801-Jefferson-1"], ["1790s", "1790s", "1800s"]),
    (["/a/1962_x.txt", "/b/1971.txt"], ["1960s", "1970s"]),
    (["/a/1962_x.txt", "/b/1965.txt"], ["1962_x.txt", "1965.txt"]),  # one decade tells nothing apart
    (["/a/19621.txt", "/b/1971.txt"], ["19621.txt", "1971.txt"]),
    (["a/x.txt", "b/x.txt"], ["a/x.txt", "b/x.txt"]),
    (["a/x.jsonl:1", "a/x.jsonl:2", "b.txt"], ["x.jsonl", "x.jsonl", "b.txt"]),
])  # fmt: skip
def test_documents_belong_to_decades_or_files(names, groups):
    assert group(excerpts(*names)) == groups


def test_the_documents_of_one_file_go_by_their_titles():
    names = ["a.jsonl:1", "a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert group(excerpts(*names, titles=["One", "One", "Two", "Two", ""])) == ["One", "One", "2 Two", "3 Two", "4"]


def test_one_document_is_cut_into_parts():
    names = group(excerpts(*["book.txt"] * 16))
    assert names == [f"part {1 + place // 2} of 8" for place in range(16)]
    assert group(excerpts("book.txt")) == ["part 1 of 8"]


def test_the_smallest_of_many_files_are_put_together():
    found = [Excerpt(f"{n}.txt", "", 0, "x" * (100 + n)) for n in range(40)]
    names = group(found)
    assert len(set(names)) == module.GROUPS_AT_MOST
    assert [n for n, name in enumerate(names) if name == "other files"] == list(range(17))


def test_titles_are_first_lines_cut(tmp_path):
    lines = ["A title\nand text", "  \n\n" + "long " * 60]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    chosen = sample(read_text([str(tmp_path / "x.jsonl")]), 1000, 500)
    assert [e.title for e in chosen.excerpts] == ["A title", ("long " * 8).strip()]
