"""Token shards on disk: a corpus is tokenised once, then memory-mapped.

A folder of token data holds
    train-00000.bin ...     the training documents' tokens, end to end: uint16, or uint32 beyond 65,536 entries
    train.idx               int64: the positions in that stream where documents start
    held_out-00000.bin ...  the same for the held-out documents
    held_out.idx
    held_out.jsonl          the held-out documents' names and raw text, which bits per byte are measured on
    tokenizer.json, tokenizer_config.json
    manifest.json           what this was made from, counts, and every file's size and checksum

The training documents lie in the order of the source's entries, so each entry's are a run of the stream.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer

from cadre.data.sources import HELD_OUT_TEXT, MANIFEST, SUFFIXES, Document, passed_over, read_documents, token_data
from cadre.data.split import Split, pieces, split_documents
from cadre.data.tokenizer import check_size, train_tokenizer
from cadre.errors import UsageError, encodable, write_error
from cadre.files import kind_of, require_local, require_regular, stamp, sync
from cadre.hub.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_hash, vocabulary_size

FORMAT = 1
DEFAULT_VOCAB_SIZE = 4096
SHARD_TOKENS = 64 * 2**20
_PARTS = ("train", "held_out")
_KEYS = {"inputs", "source", "vocab_size", "dtype", "train", "held_out", "files"}
# Characters encoded at a time: the tokenizer's intermediate results take some hundred bytes for each token.
_CHUNK = 2 * 2**20


class Tokens:
    """A stream of tokens over any number of shards.

    shards: arrays of token ids, end to end. document_starts: int64 [documents], increasing positions in the stream.
    ended: whether documents end with the token that separates them, and begin with none.
    """

    def __init__(self, shards: list[np.ndarray], document_starts: np.ndarray, ended: bool = False) -> None:
        self._shards = shards
        self._bounds = np.cumsum([0, *(len(shard) for shard in shards)])
        self.document_starts = document_starts
        self.ended = ended

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def part(self, start: int, stop: int) -> Tokens:
        """The documents that lie from position `start`, where one begins, to `stop`, where one ends; nothing is copied."""
        shards = []
        for shard, first in zip(self._shards, self._bounds, strict=False):
            low, high = max(start - int(first), 0), min(stop - int(first), len(shard))
            if low < high:
                shards.append(shard[low:high])
        inside = (self.document_starts >= start) & (self.document_starts < stop)
        return Tokens(shards, self.document_starts[inside] - start, self.ended)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the ids at positions start to stop - 1. Raises IndexError outside the stream."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        ids = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._bounds, start, side="right")) - 1
        filled = 0
        while filled < len(ids):
            begin = start + filled - int(self._bounds[shard])
            part = self._shards[shard][begin : begin + len(ids) - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return ids


@dataclass(frozen=True, eq=False)
class TokenData:
    """Token data on disk, opened. `train` and `held_out` are memory-mapped streams in which each document starts with what the
    tokenizer itself puts before a text and ends with its end-of-text token (or, where it has neither, starts with its
    beginning-of-text token)."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's greatest id."""
        return int(self.manifest["vocab_size"])

    def train_of_each(self) -> list[Tokens]:
        """The training text of each entry of the source, in turn."""
        ends = np.cumsum(self.manifest["train"]["entries"]).tolist()
        return [self.train.part(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]

    @classmethod
    def open(cls, path: str | Path) -> TokenData:
        """Open a folder that `prepare` wrote.

        Raises UsageError if it is none, or if a file is missing or differs from the manifest in size or checksum.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, expected in manifest["files"].items():
            file = path / name
            if kind_of(file) != "file":
                raise UsageError(f"{path}: damaged token data, {name} is missing: delete the folder and prepare again")
            if stamp(file) != expected:
                raise UsageError(
                    f"{path}: damaged token data, {name} is not as it was written: delete the folder and prepare again"
                )
        tokenizer = load_tokenizer(path / "tokenizer.json")
        if "before" not in manifest["inputs"] and tokenizer.encode("").ids:
            raise UsageError(f"{path}: was made without what its tokenizer puts before a text: prepare again")
        ended = special_ids(tokenizer)[1] is not None and "before" not in manifest["inputs"]
        train, held_out = (_open_tokens(path, part, manifest, ended) for part in _PARTS)
        return cls(path, manifest, tokenizer, train, held_out)

    def held_out_documents(self) -> list[Document]:
        """The held-out documents' raw text; none if nothing was held out."""
        return list(self.read_held_out())

    def read_held_out(self) -> Iterator[Document]:
        """The same, one after the other."""
        with (self.path / HELD_OUT_TEXT).open("rb") as file:
            for line in file:
                yield Document(**json.loads(line))


def prepare(
    source: str | list[str],
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    out: Path | None = None,
    held_out: float = 0.05,
    progress: Callable[[str], None] | None = None,
) -> TokenData:
    """Tokenise a corpus into a folder, once: the same text with the same choices is found there again.

    source: as for `read_documents`. tokenizer: a tokenizer.json or its directory; without one a byte-level BPE of
    `vocab_size` entries (4,096 unless given) is trained, on the training documents only. out: the folder; by default
    a cache folder named after the content, under $CADRE_CACHE, $XDG_CACHE_HOME or ~/.cache. held_out: the share of
    documents held out (see `split_documents`). progress: called with one line as each stage starts.

    A source that is itself a folder of token data is opened as it is, with its tokenizer and held-out documents; no text is
    read.

    The folder appears whole or not at all. Raises UsageError for input that cannot be used and for an `out` that
    holds something else, RunError if the disk is full or the text changes meanwhile.
    """
    say = progress or (lambda line: None)
    if out is not None:
        require_local(Path(out))
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if given is not None and vocab_size is not None:
        raise UsageError("a tokenizer brings its own vocabulary: give tokenizer or vocab_size, not both")
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if given is None:
        check_size(size)
    if given is not None:
        _separator(given)
    names = [source] if isinstance(source, str) else list(source)
    if out is None and (made := token_data(source)) is not None:
        return _made(made, given, vocab_size)
    if names:  # without any, what follows says so
        say(f"reading {' '.join(names)}")
    if (others := passed_over(source)) is not None:
        say(f"passed over: {others} (what is read are {' '.join(SUFFIXES)})")
    split = split_documents(read_documents(source), held_out)
    inputs = {
        "text": split.content,
        "tokenizer": f"trained to {size:,} entries" if given is None else tokenizer_hash(given),
        "held_out": held_out,
    }
    if given is not None and (own := given.encode("").ids[:1]):
        inputs["before"] = own
    if split.cut and len(split.digests) > 1:
        inputs["ends"] = "of large documents"
        say(f"holding out the ends of {len(split.cut):,} large documents: whole ones would be too much of the text")
    if len(names) > 1:
        inputs["documents"] = [split.entries[number] for number in range(len(names))]
    key = hashlib.sha256(json.dumps([FORMAT, inputs], sort_keys=True).encode()).hexdigest()[:32]
    folder = _cache() / key if out is None else Path(out).resolve()
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        existing = _find(folder, inputs, cached=out is None)
        if existing is not None:
            return existing
        temporary.mkdir(parents=True)
        if given is None:
            say(f"training a tokenizer of {size:,} entries")
            texts = (document.text for held, document in split.divide(read_documents(source)) if not held)
            given = train_tokenizer(texts, size)
        say(f"tokenising {len(split.digests):,} documents")
        manifest = {"format": FORMAT, "key": key, "inputs": inputs, "source": names}
        _write(temporary, manifest, given, split, read_documents(source), len(names))
        _publish(temporary, folder, inputs)
        return TokenData.open(folder)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UsageError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error
        raise write_error(f"{folder}: cannot be written", error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _made(path: Path, tokenizer: Tokenizer | None, vocab_size: int | None) -> TokenData:
    """The token data in a folder, if its tokenizer is the one that is asked for, or not too large."""
    data = TokenData.open(path.resolve())
    if tokenizer is not None and tokenizer_hash(tokenizer) != data.manifest["tokenizer_hash"]:
        raise UsageError(
            f"{path}: was made with another tokenizer: the folder brings its own, so leave the tokenizer (or model.from) out"
        )
    if vocab_size is not None and data.vocab_size > vocab_size:
        raise UsageError(
            f"{path}: was made with a vocabulary of {data.vocab_size:,}, but {vocab_size:,} are asked for: set "
            "data.vocab_size, or model.vocab_size where the recipe has it, to that"
        )
    return data


def _publish(temporary: Path, folder: Path, inputs: dict[str, Any]) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process may have been first with the same text.
        if _find(folder, inputs, cached=False) is None:
            raise
    sync(folder.parent)


def _cache() -> Path:
    root = os.environ.get("CADRE_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache").resolve() / "cadre" / "data"


def _find(folder: Path, inputs: dict[str, Any], *, cached: bool) -> TokenData | None:
    """The token data in the folder if it was made from these inputs; None if it is still to be made."""
    there = kind_of(folder)
    if there is None:
        return None
    if there != "folder":
        raise UsageError(f"{folder}: is a file; give a folder")
    if not any(folder.iterdir()):
        return None
    try:
        if not (folder / MANIFEST).exists():
            raise UsageError(f"{folder}: is not empty and holds no token data; give a new or an empty folder")
        manifest = _read_manifest(folder)
        there = manifest["inputs"]
        changed = [
            f"{name} {there.get(name)} there, {wanted} asked" for name, wanted in inputs.items() if there.get(name) != wanted
        ]
        if changed:
            raise UsageError(
                f"{folder}: holds other token data, of {' '.join(manifest['source'])} ({'; '.join(changed)});"
                " give another folder or delete this one"
            )
        return TokenData.open(folder)
    except UsageError:
        if not cached:
            raise
        shutil.rmtree(folder)  # only Cadre writes in its cache, and all of it can be made again
        return None


class _Writer:
    """Appends documents' tokens to the shards of one part."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype, entries: int) -> None:
        self._folder, self._part, self._dtype = folder, part, dtype
        self._entry, self._entries = 0, [0] * entries
        self._file: IO[bytes] | None = None
        self._starts: list[int] = []
        self.tokens = self.bytes = self.shards = 0

    def start_document(self, document: Document) -> None:
        self._starts.append(self.tokens)
        self._entry = document.entry
        self.bytes += len(document.text.encode("utf-8"))

    def add(self, ids: list[int]) -> None:
        array = np.array(ids, dtype=self._dtype)
        self._entries[self._entry] += len(array)
        while len(array):
            room = -self.tokens % SHARD_TOKENS
            if room == 0:
                self._close()
                self._file = (self._folder / f"{self._part}-{self.shards:05}.bin").open("wb")
                self.shards += 1
                room = SHARD_TOKENS
            assert self._file is not None
            self._file.write(array[:room].tobytes())
            self.tokens += len(array[:room])
            array = array[room:]

    def finish(self) -> dict[str, Any]:
        self._close()
        (self._folder / f"{self._part}.idx").write_bytes(np.array(self._starts, dtype=np.int64).tobytes())
        counts = {"documents": len(self._starts), "tokens": self.tokens, "bytes": self.bytes}
        return {**counts, "shards": self.shards, "entries": self._entries}

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


def _write(
    folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer, split: Split, documents: Iterable[Document], entries: int
) -> None:
    """Fill a new folder: tokens, held-out text, tokenizer, and the manifest last."""
    size = vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
    before, after = _separator(tokenizer)
    # "<|eos|>" written out in a document is text, not the document's end.
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.encode_special_tokens = True
    train, held = (_Writer(folder, part, dtype, entries) for part in _PARTS)
    waiting: list[tuple[_Writer, Document | None, bool, str]] = []

    def flush() -> None:
        with encodable("the text"):
            encoded = encoder.encode_batch_fast([text for *_, text in waiting], add_special_tokens=False)
        for (writer, starting, last, _), encoding in zip(waiting, encoded, strict=True):
            if starting is not None:
                writer.start_document(starting)
                writer.add(before)
            writer.add(encoding.ids)
            if last:
                writer.add(after)
        waiting.clear()

    characters = 0
    with (folder / HELD_OUT_TEXT).open("w", encoding="utf-8", newline="\n") as held_out_text:
        for is_held_out, document in split.divide(documents):
            if is_held_out:
                record = {"name": document.name, "text": document.text}
                held_out_text.write(json.dumps(record, ensure_ascii=False) + "\n")
            start = 0
            for piece in pieces(document.text, _CHUNK):
                start += len(piece)
                first, last = start == len(piece), start == len(document.text)
                waiting.append((held if is_held_out else train, document if first else None, last, piece))
                characters += len(piece)
                if characters >= _CHUNK:
                    flush()
                    characters = 0
        flush()
    counts = {part: writer.finish() for part, writer in zip(_PARTS, (train, held), strict=True)}
    save_tokenizer(tokenizer, folder)
    files = sorted(folder.iterdir())
    for file in files:
        sync(file)
    manifest |= {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": size,
        "dtype": dtype.name,
        **counts,
        "bytes_per_token": round(train.bytes / train.tokens, 4),
        "files": {file.name: stamp(file) for file in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _separator(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
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


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        require_regular(file)
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        if version == FORMAT and not manifest.keys() >= _KEYS:
            raise KeyError(*(_KEYS - manifest.keys()))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: holds no token data ({MANIFEST} is missing); make it with cadre data") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file}: not a manifest of token data ({error!r})") from error
    if version != FORMAT:
        raise UsageError(f"{file}: format {version}, and this version of Cadre reads format {FORMAT}: prepare again")
    return manifest


def _open_tokens(path: Path, part: str, manifest: dict[str, Any], ended: bool) -> Tokens:
    names = [f"{part}-{number:05}.bin" for number in range(manifest[part]["shards"])]
    shards: list[np.ndarray] = [np.memmap(path / name, dtype=manifest["dtype"], mode="r") for name in names]
    starts = path / f"{part}.idx"
    places = np.memmap(starts, dtype=np.int64, mode="r") if starts.stat().st_size else np.zeros(0, dtype=np.int64)
    return Tokens(shards, places, ended)
