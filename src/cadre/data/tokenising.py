"""Tokenising documents into the files of a folder of token data (`shards.py` says which), so that whoever is interrupted goes
on where they were."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer

from cadre.data.pace import Pace
from cadre.data.shards import PARTS
from cadre.data.sources import HELD_OUT_TEXT, MANIFEST, Document
from cadre.data.split import Split, TextChangedError, pieces
from cadre.errors import UsageError, encodable
from cadre.files import read_json_object, replace_file, stamp, sync
from cadre.hub.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_hash, vocabulary_size

SHARD_TOKENS = 64 * 2**20
# Characters encoded at a time: the tokenizer's intermediate results take some hundred bytes for each token.
CHUNK = 2 * 2**20
# How far the work has come is written down so often.
SAVE_SECONDS = 30.0
STATE = "state.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def unfinished(folder: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder beside `folder`, in which its content grows until it is renamed: of one process at a time, another waits. It may
    hold what an earlier process left. Afterwards it is gone, except when work ends early that has written down how far it came.
    Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}.lock"
    handle = _locked(lock, say)
    # Where a file system knows no locks each process has a folder of its own, to which nobody comes back.
    path = folder.parent / f".{folder.name}.{uuid.uuid4().hex if handle is None else 'partial'}"
    kept = False
    try:
        path.mkdir(exist_ok=handle is not None)
        yield path
    except BaseException as error:
        hopeless = isinstance(error, TextChangedError) or (isinstance(error, OSError) and error.errno in _FULL)
        kept = handle is not None and not hopeless and (path / STATE).exists()
        if kept:
            say(f"what is tokenised stays in {path}: the same command goes on with it")
        raise
    finally:
        if not kept:
            shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _locked(lock: Path, say: Callable[[str], None]) -> int | None:
    """An open handle of the file, locked: for other machines, too, where a network file system takes locks, since it is opened
    for writing. None where there are no locks."""
    told = False
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    say("another process is preparing this text: waiting for it")
                    told = True
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(lock, handle):  # whoever had it deletes it
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


class _Part:
    """The tokens of one part, appended to its shards, and if `masked` which of them are learned."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, entries: int, masked: bool, state: dict[str, Any]) -> None:
        """state: as `state` gave it, for the files of the folder, which may hold more by now; empty for a new part. Raises
        OSError, or ValueError if they hold less."""
        self._folder, self._name, self._dtype, self._masked = folder, name, dtype, masked
        self._entries = list(state.get("entries", [0] * entries))
        self.documents, self.tokens, self.bytes, self.shards, self.learned, self.learned_bytes = (
            state.get(count, 0) for count in ("documents", "tokens", "bytes", "shards", "learned", "learned_bytes")
        )
        self._file: IO[bytes] | None = None
        self._mask: IO[bytes] | None = None
        for shard in range(self.shards):
            tokens = min(SHARD_TOKENS, self.tokens - shard * SHARD_TOKENS)
            _shorten(self._shard(shard, "bin"), tokens * dtype.itemsize)
            if masked:
                _shorten(self._shard(shard, "mask"), tokens)
        if state:
            _shorten(folder / f"{name}.idx", 8 * self.documents)
        if self.tokens % SHARD_TOKENS:
            self._open(self.shards - 1, "ab")
        self._starts = (folder / f"{name}.idx").open("ab" if state else "wb")

    def start_document(self, document: Document) -> None:
        self._starts.write(np.int64(self.tokens).tobytes())
        self.documents += 1
        self.bytes += len(document.text.encode("utf-8"))
        self.learned_bytes += document.learned_bytes if self._masked else 0

    def add(self, ids: list[int], entry: int, learned: bool | list[bool] = True) -> None:
        """Append tokens of a document of the source's entry with this number."""
        array = np.array(ids, dtype=self._dtype)
        mask = np.broadcast_to(np.array(learned, dtype=bool), len(array))
        self.learned += int(mask.sum())
        self._entries[entry] += len(array)
        while len(array):
            room = -self.tokens % SHARD_TOKENS
            if room == 0:
                self.sync()
                self._open(self.shards, "wb")
                self.shards += 1
                room = SHARD_TOKENS
            assert self._file is not None
            self._file.write(array[:room].tobytes())
            if self._mask is not None:
                self._mask.write(mask[:room].tobytes())
            self.tokens += len(array[:room])
            array, mask = array[room:], mask[room:]

    def state(self) -> dict[str, Any]:
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        if self._masked:
            counts |= {"learned": self.learned, "learned_bytes": self.learned_bytes}
        return {**counts, "shards": self.shards, "entries": self._entries}

    def sync(self) -> None:
        """Have all of it on the disk."""
        for file in (self._file, self._mask, self._starts):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self._file, self._mask, self._starts):
            if file is not None:
                file.close()

    def _open(self, shard: int, mode: str) -> None:
        for file in (self._file, self._mask):
            if file is not None:
                file.close()
        self._file = self._shard(shard, "bin").open(mode)
        self._mask = self._shard(shard, "mask").open(mode) if self._masked else None

    def _shard(self, shard: int, ending: str) -> Path:
        return self._folder / f"{self._name}-{shard:05}.{ending}"


def _shorten(path: Path, size: int) -> None:
    if path.stat().st_size < size:
        raise ValueError(f"{path} lacks what was written")
    os.truncate(path, size)


def _pieces(document: Document) -> Iterator[str]:
    """What is encoded at once: of a text parts, of a conversation all, for where its answers lie is told of the whole."""
    return pieces(document.text, CHUNK) if document.answers is None else iter([document.text])


class _Encoder:
    """Turns documents into tokens, many at a time, and appends these to parts. `answer_ends`: the special tokens that end what
    the assistant says, found so far."""

    def __init__(self, tokenizer: Tokenizer, answer_ends: Iterable[int]) -> None:
        self._before, self._after = separator(tokenizer)
        self._tokenizer = tokenizer
        # "<|eos|>" written out in a document is text, not the document's end; in a conversation it is what the template writes.
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        decoder = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in decoder.items() if token.special}
        self.answer_ends = set(answer_ends)
        self._waiting: list[tuple[_Part, Document, int, str]] = []
        self._characters = 0

    def add(self, part: _Part, document: Document, start: int, piece: str) -> None:
        """Add the piece of a document that begins at the letter `start`."""
        if document.answers is not None:
            self.flush()
            self._add_conversation(part, document)
            return
        self._waiting.append((part, document, start, piece))
        self._characters += len(piece)
        if self._characters >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write what waits to be encoded together."""
        with encodable("the text"):
            encoded = self._plain.encode_batch_fast([piece for *_, piece in self._waiting], add_special_tokens=False)
        for (part, document, start, piece), encoding in zip(self._waiting, encoded, strict=True):
            if start == 0:
                part.start_document(document)
                part.add(self._before, document.entry)
            part.add(encoding.ids, document.entry)
            if start + len(piece) == len(document.text):
                part.add(self._after, document.entry)
        self._waiting.clear()
        self._characters = 0

    def _add_conversation(self, part: _Part, document: Document) -> None:
        with encodable("the text"):
            encoding = self._tokenizer.encode(document.text, add_special_tokens=False)
        ids, before, after = encoding.ids, self._before, self._after
        part.start_document(document)
        if ids[: len(before)] != before:
            part.add(before, document.entry, False)
        learned = document.learned(encoding.offsets)
        part.add(ids, document.entry, learned)
        end = None
        for first, last in document.answers or ():
            said = document.text[first:last].rstrip()
            end = next((number for content, number in self._special.items() if said.endswith(content)), None)
            self.answer_ends.update(() if end is None else (end,))
        if ids[len(ids) - len(after) :] != after:
            # By it a model learns to stop whose template has no token for that.
            part.add(after, document.entry, end is None and learned[-1:] == [True])


class Tokenising:
    """The work in a folder, from its beginning or from where an earlier process left it. `version` names all that goes into it:
    what is there of another version is deleted. Raises OSError."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder, version
        self._saved_at = time.monotonic()
        try:
            state = read_json_object(folder / STATE)
        except UsageError:  # there is none
            state = {}
        self._state = state if state.get("version") == version else {}
        # All of another version, and what a killed process was just about to put in place.
        for path in folder.glob(".*.partial") if self._state else folder.iterdir():
            path.unlink()

    def tokenizer(self) -> Tokenizer | None:
        """The one that the work was begun with, if it was."""
        return load_tokenizer(self.folder / "tokenizer.json") if self._state else None

    def write(
        self, tokenizer: Tokenizer, split: Split, documents: Iterable[Document], entries: int, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Tokenise the documents that were split; what the manifest says of the result. Raises as `Split.divide` does, OSError,
        and UsageError for text that the tokenizer cannot encode."""
        save_tokenizer(tokenizer, self.folder)
        size = vocabulary_size(tokenizer)
        dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
        parts, held_out_text = self._open(dtype, entries, split.conversations)
        train, held_out = parts
        encoder = _Encoder(tokenizer, self._state.get("answer_ends", ()))
        # Documents that are done, letters of the next one, and letters of all.
        done, within, characters = (self._state.get(count, 0) for count in ("done", "within", "characters"))
        pace = Pace(say, "tokenising", split.characters, characters)
        try:
            for is_held_out, document in islice(split.divide(documents), done, None):
                if is_held_out and not within:
                    record: dict[str, Any] = {"name": document.name, "text": document.text}
                    if document.answers is not None:
                        record["answers"] = document.answers
                    held_out_text.write(json.dumps(record, ensure_ascii=False) + "\n")
                start = 0
                for piece in _pieces(document):
                    if start >= within:
                        encoder.add(held_out if is_held_out else train, document, start, piece)
                        within, characters = start + len(piece), characters + len(piece)
                        pace.add(len(piece))
                        if time.monotonic() - self._saved_at > SAVE_SECONDS:
                            encoder.flush()
                            place = {"done": done, "within": within, "characters": characters}
                            self._save(place, parts, held_out_text, encoder.answer_ends)
                    start += len(piece)
                done, within = done + 1, 0
            encoder.flush()
        finally:
            for file in (*parts, held_out_text):
                file.close()
        ends = {"answer_ends": sorted(encoder.answer_ends)} if split.conversations else {}
        return {
            **ends,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "vocab_size": size,
            "dtype": dtype.name,
            **{name: part.state() for name, part in zip(PARTS, parts, strict=True)},
            "bytes_per_token": round(train.bytes / train.tokens, 4),
        }

    def finish(self, manifest: dict[str, Any]) -> None:
        """Add the manifest, with all of it on the disk. How far the work came stays there until the folder has its name."""
        files = sorted(path for path in self.folder.iterdir() if path.name not in (STATE, MANIFEST))
        for file in files:
            sync(file)
        manifest = {**manifest, "files": {file.name: stamp(file) for file in files}}
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(self.folder / MANIFEST)
        sync(self.folder)

    def _open(self, dtype: np.dtype, entries: int, masked: bool) -> tuple[tuple[_Part, _Part], IO[str]]:
        try:
            train, held = (
                _Part(self.folder, name, dtype, entries, masked, self._state["parts"][name] if self._state else {})
                for name in PARTS
            )
            if self._state:
                _shorten(self.folder / HELD_OUT_TEXT, self._state["held_out_text"])
        except (FileNotFoundError, ValueError):  # a machine that lost power
            if not self._state:
                raise
            self._state = {}
            return self._open(dtype, entries, masked)
        # The name of a file need not be Unicode; what stands for its other bytes is written as JSON's escapes are.
        text = (self.folder / HELD_OUT_TEXT).open(
            "a" if self._state else "w", encoding="utf-8", errors="backslashreplace", newline="\n"
        )
        return (train, held), text

    def _save(self, place: dict[str, int], parts: tuple[_Part, _Part], held_out_text: IO[str], answer_ends: set[int]) -> None:
        for part in parts:
            part.sync()
        held_out_text.flush()
        os.fsync(held_out_text.fileno())
        self._saved_at = time.monotonic()
        state = {
            "version": self.version,
            **place,
            "parts": {name: part.state() for name, part in zip(PARTS, parts, strict=True)},
            "held_out_text": os.fstat(held_out_text.fileno()).st_size,
            "answer_ends": sorted(answer_ends),
        }
        replace_file(self.folder / STATE, json.dumps(state).encode())


def separator(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids before, ids after) each document: what the tokenizer itself puts before a text, and the end-of-text token; one of
    them is enough."""
    bos, eos = special_ids(tokenizer)
    own = tokenizer.encode("").ids[:1]
    if own:
        return own, [eos] if eos is not None and eos != own[0] else []
    if eos is not None:
        return [], [eos]
    if bos is not None:
        return [bos], []
    raise UsageError("the tokenizer has no end-of-text token (such as </s> or <|endoftext|>) to separate documents")
