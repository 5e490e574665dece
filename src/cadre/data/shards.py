"""Token shards on disk: a corpus is tokenised once, then memory-mapped.

A folder of token data holds
    train-00000.bin ...     the training documents' tokens, end to end: uint16, or uint32 beyond 65,536 entries
    train.idx               int64: the positions in that stream where documents start
    held_out-00000.bin ...  the same for the held-out documents
    held_out.idx
    held_out.jsonl          the held-out documents' names and raw text, which bits per byte are measured on
    train-00000.mask ...    where there are conversations: bool, which of the tokens are learned
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer

from cadre.data.conversations import Template, template_of
from cadre.data.sources import (
    HELD_OUT_TEXT,
    MANIFEST,
    SUFFIXES,
    Document,
    fingerprint,
    held_out_document,
    passed_over,
    read_documents,
    token_data,
)
from cadre.data.split import Split, pieces, split_documents
from cadre.data.tokenizer import check_size, sampled, train_tokenizer
from cadre.errors import UsageError, encodable, write_error
from cadre.files import kind_of, read_json_object, replace_file, require_local, require_regular, stamp, sync
from cadre.hub.template import ChatTemplate
from cadre.hub.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    vocabulary_size,
)

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
    ended: whether documents end with the token that separates them, and begin with none. masks: bool arrays, alike: which
    tokens are learned; None: all.
    """

    def __init__(
        self,
        shards: list[np.ndarray],
        document_starts: np.ndarray,
        ended: bool = False,
        masks: list[np.ndarray] | None = None,
    ) -> None:
        self._shards, self._masks = shards, masks
        self._bounds = np.cumsum([0, *(len(shard) for shard in shards)])
        self.document_starts = document_starts
        self.ended = ended

    @property
    def masked(self) -> bool:
        return self._masks is not None

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def part(self, start: int, stop: int) -> Tokens:
        """The documents that lie from position `start`, where one begins, to `stop`, where one ends; nothing is copied."""

        def cut(arrays: list[np.ndarray]) -> list[np.ndarray]:
            pairs = zip(arrays, self._bounds, strict=False)
            parts = [array[max(start - int(first), 0) : max(stop - int(first), 0)] for array, first in pairs]
            return [part for part in parts if len(part)]

        inside = (self.document_starts >= start) & (self.document_starts < stop)
        masks = None if self._masks is None else cut(self._masks)
        return Tokens(cut(self._shards), self.document_starts[inside] - start, self.ended, masks)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the ids at positions start to stop - 1. Raises IndexError outside the stream."""
        return self._gather(self._shards, start, stop, np.dtype(np.int64))

    def mask(self, start: int, stop: int) -> np.ndarray:
        """bool [stop - start]: which of these tokens are learned. Raises IndexError outside the stream."""
        if self._masks is None:
            return np.ones(stop - start, dtype=bool)
        return self._gather(self._masks, start, stop, np.dtype(bool))

    def _gather(self, arrays: list[np.ndarray], start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        gathered = np.empty(stop - start, dtype=dtype)
        shard = int(np.searchsorted(self._bounds, start, side="right")) - 1
        filled = 0
        while filled < len(gathered):
            begin = start + filled - int(self._bounds[shard])
            part = arrays[shard][begin : begin + len(gathered) - filled]
            gathered[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return gathered


@dataclass(frozen=True, eq=False)
class TokenData:
    """Token data on disk, opened. `train` and `held_out` are memory-mapped streams in which each document starts with what the
    tokenizer itself puts before a text and ends with its end-of-text token (or, where it has neither, starts with its
    beginning-of-text token). A conversation has those of them that its template does not write."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's greatest id."""
        return int(self.manifest["vocab_size"])

    @property
    def chat_template(self) -> ChatTemplate | None:
        """What conversations among the documents were written by; None if there are none."""
        source = self.manifest.get("chat_template")
        return None if source is None else ChatTemplate(source, self.manifest["template_tokens"])

    @property
    def answer_ends(self) -> list[int]:
        """The special tokens that end what the assistant says."""
        return self.manifest.get("answer_ends", [])

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
            yield from map(held_out_document, file)


def prepare(
    source: str | list[str],
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    out: Path | None = None,
    held_out: float = 0.05,
    progress: Callable[[str], None] | None = None,
) -> TokenData:
    """Tokenise a corpus into a folder, once: the same text with the same choices is found there again. In the cache it is found
    without being read, if by its files (see `fingerprint`) it has not changed since.

    source: as for `read_documents`. tokenizer: a tokenizer.json or its directory; without one a byte-level BPE of
    `vocab_size` entries (4,096 unless given) is trained, on the training documents only (see `sampled`). out: the folder;
    by default a cache folder named after the content, under $CADRE_CACHE, $XDG_CACHE_HOME or ~/.cache. held_out: the
    share of documents held out (see `split_documents`). progress: called with one line as each stage starts.

    Conversations are written by the chat template beside the tokenizer (`conversations.py`); only what the assistant says
    in them is learned.

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
    template = template_of(tokenizer)
    choices = {
        "tokenizer": f"trained to {size:,} entries" if given is None else tokenizer_hash(given),
        "held_out": held_out,
    }
    if given is not None and (own := given.encode("").ids[:1]):
        choices["before"] = own
    record = _record_of(source, choices) if out is None else None
    known = None if record is None else _follow(record, choices, template)
    if names:  # without any, what follows says so
        say(f"{'reading' if known is None else 'tokenised already, and unchanged since:'} {' '.join(names)}")
    if (others := passed_over(source)) is not None:
        say(f"passed over: {others} (what is read are {' '.join(SUFFIXES)})")
    if known is not None:
        return known
    split = split_documents(read_documents(source, template), held_out)
    if record is not None and _record_of(source, choices) != record:  # then which of the two was read?
        record = None
    found: dict[str, Any] = {"text": split.content}
    if split.cut and len(split.digests) > 1:
        found["ends"] = "of large documents"
        say(f"holding out the ends of {len(split.cut):,} large documents: whole ones would be too much of the text")
    written_by = template() if split.conversations else None
    if written_by is not None:
        found["template"] = _template_hash(written_by)
    if len(names) > 1:
        found["documents"] = [split.entries[number] for number in range(len(names))]
    inputs = {**found, **choices}
    key = _key(inputs)
    folder = _cache() / key if out is None else Path(out).resolve()
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        existing = _find(folder, inputs, cached=out is None)
        if existing is not None:
            _remember(record, found)
            return existing
        temporary.mkdir(parents=True)
        if given is None:
            say(f"training a tokenizer of {size:,} entries")
            documents = (document for held, document in split.divide(read_documents(source, template)) if not held)
            given = train_tokenizer(sampled(map(_without_special, documents), split.characters), size)
        say(f"tokenising {len(split.digests):,} documents")
        manifest = {"format": FORMAT, "key": key, "inputs": inputs, "source": names}
        if written_by is not None:
            manifest |= {"chat_template": written_by.source, "template_tokens": written_by.special}
        _write(temporary, manifest, given, split, read_documents(source, template), len(names))
        _publish(temporary, folder, inputs)
        _remember(record, found)
        return TokenData.open(folder)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UsageError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error
        raise write_error(f"{folder}: cannot be written", error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _without_special(document: Document) -> str:
    """The text that a tokenizer learns from: what a template writes as special tokens is none."""
    text = document.text
    if document.answers is not None:
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "\n")
    return text


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


def _key(*values: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *values], sort_keys=True).encode()).hexdigest()[:32]


def _template_hash(template: ChatTemplate | None) -> str | None:
    if template is None:
        return None
    return hashlib.sha256(json.dumps([template.source, template.special]).encode()).hexdigest()


def _record_of(source: str | list[str], choices: dict[str, Any]) -> Path | None:
    """Where the cache keeps what was found when the source, as it is now, was last read for these choices: small files beside
    the token data, of which any may be missing. None if it cannot be told by its files whether a source has changed."""
    try:
        state = fingerprint(source)
        return None if state is None else _cache() / "read" / f"{_key(_reader(), choices, state)}.json"
    except (OSError, UsageError):  # which whoever reads it is told
        return None


def _reader() -> str:
    """SHA-256, in hexadecimal, of the code that reads text: changed code may read something else from the same files."""
    here = Path(__file__).parent
    code = [*sorted(here.glob("*.py")), here.parent / "hub" / "template.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()


def _follow(record: Path, choices: dict[str, Any], template: Template) -> TokenData | None:
    """The token data that a record leads to, verified as always; None if it leads nowhere, and the text has to be read."""
    try:
        values = read_json_object(record)
        found = values["found"]
        if values["name"] != record.name or ("template" in found and found["template"] != _template_hash(template())):
            return None
        inputs = {**found, **choices}
        return _find(_cache() / _key(inputs), inputs, cached=True)
    except (OSError, UsageError, LookupError, TypeError, ValueError, RecursionError):  # nothing that is wrong with it matters
        return None


def _remember(record: Path | None, found: dict[str, Any]) -> None:
    if record is not None:
        with suppress(OSError):  # the next start reads the text, as this one did
            record.parent.mkdir(exist_ok=True)
            replace_file(record, json.dumps({"name": record.name, "found": found}).encode())


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
    """Appends documents' tokens to the shards of one part, and if `masked` which of them are learned."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype, entries: int, masked: bool) -> None:
        self._folder, self._part, self._dtype, self._masked = folder, part, dtype, masked
        self._entry, self._entries = 0, [0] * entries
        self._file: IO[bytes] | None = None
        self._mask: IO[bytes] | None = None
        self._starts: list[int] = []
        self.tokens = self.bytes = self.shards = self.learned = self.learned_bytes = 0

    def start_document(self, document: Document) -> None:
        self._starts.append(self.tokens)
        self._entry = document.entry
        self.bytes += len(document.text.encode("utf-8"))
        self.learned_bytes += document.learned_bytes if self._masked else 0

    def add(self, ids: list[int], learned: bool | list[bool] = True) -> None:
        array = np.array(ids, dtype=self._dtype)
        mask = np.broadcast_to(np.array(learned, dtype=bool), len(array))
        self.learned += int(mask.sum())
        self._entries[self._entry] += len(array)
        while len(array):
            room = -self.tokens % SHARD_TOKENS
            if room == 0:
                self._close()
                self._file = (self._folder / f"{self._part}-{self.shards:05}.bin").open("wb")
                if self._masked:
                    self._mask = (self._folder / f"{self._part}-{self.shards:05}.mask").open("wb")
                self.shards += 1
                room = SHARD_TOKENS
            assert self._file is not None
            self._file.write(array[:room].tobytes())
            if self._mask is not None:
                self._mask.write(mask[:room].tobytes())
            self.tokens += len(array[:room])
            array, mask = array[room:], mask[room:]

    def finish(self) -> dict[str, Any]:
        self._close()
        (self._folder / f"{self._part}.idx").write_bytes(np.array(self._starts, dtype=np.int64).tobytes())
        counts = {"documents": len(self._starts), "tokens": self.tokens, "bytes": self.bytes}
        if self._masked:
            counts |= {"learned": self.learned, "learned_bytes": self.learned_bytes}
        return {**counts, "shards": self.shards, "entries": self._entries}

    def _close(self) -> None:
        for file in (self._file, self._mask):
            if file is not None:
                file.close()


def _write(
    folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer, split: Split, documents: Iterable[Document], entries: int
) -> None:
    """Fill a new folder: tokens, held-out text, tokenizer, and the manifest last."""
    size = vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
    before, after = _separator(tokenizer)
    # "<|eos|>" written out in a document is text, not the document's end; in a conversation it is what the template writes.
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.encode_special_tokens = True
    train, held = (_Writer(folder, part, dtype, entries, split.conversations) for part in _PARTS)
    waiting: list[tuple[_Writer, Document | None, bool, str]] = []
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    answer_ends: set[int] = set()

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

    def add_conversation(writer: _Writer, document: Document) -> None:
        with encodable("the text"):
            encoding = tokenizer.encode(document.text, add_special_tokens=False)
        ids = encoding.ids
        writer.start_document(document)
        if ids[: len(before)] != before:
            writer.add(before, False)
        learned = document.learned(encoding.offsets)
        writer.add(ids, learned)
        end = None
        for first, last in document.answers or ():
            said = document.text[first:last].rstrip()
            end = next((number for content, number in special.items() if said.endswith(content)), None)
            answer_ends.update(() if end is None else (end,))
        if ids[len(ids) - len(after) :] != after:
            # By it a model learns to stop whose template has no token for that.
            writer.add(after, end is None and learned[-1:] == [True])

    characters = 0
    # The name of a file need not be Unicode; what stands for its other bytes is written as JSON's escapes are.
    with (folder / HELD_OUT_TEXT).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as held_out_text:
        for is_held_out, document in split.divide(documents):
            if is_held_out:
                record: dict[str, Any] = {"name": document.name, "text": document.text}
                if document.answers is not None:
                    record["answers"] = document.answers
                held_out_text.write(json.dumps(record, ensure_ascii=False) + "\n")
            writer = held if is_held_out else train
            if document.answers is not None:
                flush()
                add_conversation(writer, document)
                continue
            start = 0
            for piece in pieces(document.text, _CHUNK):
                start += len(piece)
                first, last = start == len(piece), start == len(document.text)
                waiting.append((writer, document if first else None, last, piece))
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
    if split.conversations:
        manifest["answer_ends"] = sorted(answer_ends)
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
    masks: list[np.ndarray] | None = None
    if "chat_template" in manifest:
        masks = [np.memmap((path / name).with_suffix(".mask"), dtype=bool, mode="r") for name in names]
    return Tokens(shards, places, ended, masks)
