"""Text into token data, once: what was tokenised before is found again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cadre.data.conversations import Template, template_of
from cadre.data.pace import Pace
from cadre.data.shards import FORMAT, TokenData, read_manifest
from cadre.data.sources import MANIFEST, SUFFIXES, Document, fingerprint, passed_over, read_documents, token_data
from cadre.data.split import Split, split_documents
from cadre.data.tokenising import STATE, Tokenising, separator, unfinished
from cadre.data.tokenizer import check_size, sampled, train_tokenizer
from cadre.errors import UsageError, write_error
from cadre.files import kind_of, read_json_object, replace_file, require_local, sync
from cadre.hub.template import ChatTemplate
from cadre.hub.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_hash

DEFAULT_VOCAB_SIZE = 4096


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

    source: as for `read_documents`. tokenizer: a tokenizer.json, its directory or a run; without one a byte-level BPE of
    `vocab_size` entries (4,096 unless given) is trained, on the training documents only (see `sampled`). out: the folder;
    by default a cache folder named after the content, under $CADRE_CACHE, $XDG_CACHE_HOME or ~/.cache. held_out: the
    share of documents held out (see `split_documents`). progress: called with one line as each stage starts, and as long
    ones go on.

    Conversations are written by the chat template beside the tokenizer (`conversations.py`); only what the assistant says
    in them is learned.

    A source that is itself a folder of token data is opened as it is, with its tokenizer and held-out documents; no text is
    read.

    The folder appears whole or not at all; after an interrupt the same call goes on where it was. Raises UsageError for input
    that cannot be used and for an `out` that holds something else, RunError if the disk is full or the text changes meanwhile.
    """
    say = progress or (lambda line: None)
    if out is not None:
        require_local(Path(out))
    given, size = _asked_tokenizer(tokenizer, vocab_size)
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
    split = split_documents(Pace(say, "reading").of(read_documents(source, template)), held_out)
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
    folder = _cache() / _key(inputs) if out is None else Path(out).resolve()
    manifest: dict[str, Any] = {"format": FORMAT, "key": _key(inputs), "inputs": inputs, "source": names}
    if written_by is not None:
        manifest |= {"chat_template": written_by.source, "template_tokens": written_by.special}
    corpus = _Corpus(partial(read_documents, source, template), split, len(names), given, size)
    data = _found_or_written(corpus, folder, manifest, say, cached=out is None)
    _remember(record, found)
    return data


def _asked_tokenizer(tokenizer: str | Path | None, vocab_size: int | None) -> tuple[Tokenizer | None, int]:
    """The tokenizer that is given, or None and the size of the one to train. Raises `UsageError` for what cannot be used."""
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if tokenizer is None:
        check_size(size)
        return None, size
    given = load_tokenizer(tokenizer)
    if vocab_size is not None:
        raise UsageError("a tokenizer brings its own vocabulary: give tokenizer or vocab_size, not both")
    separator(given)
    return given, size


@dataclass(frozen=True)
class _Corpus:
    """Text that was read and split, from so many entries, and its tokenizer, or how large a one is to be trained."""

    documents: Callable[[], Iterator[Document]]
    split: Split
    entries: int
    tokenizer: Tokenizer | None
    vocab_size: int

    def write(self, folder: Path, manifest: dict[str, Any], say: Callable[[str], None]) -> None:
        """Fill the folder, or go on filling it."""
        work = Tokenising(folder, _key(manifest["inputs"], _reader()))
        tokenizer = self.tokenizer or work.tokenizer()
        if tokenizer is None:
            say(f"training a tokenizer of {self.vocab_size:,} entries")
            train = (document for is_held_out, document in self.split.divide(self.documents()) if not is_held_out)
            tokenizer = train_tokenizer(sampled(map(_without_special, train), self.split.characters), self.vocab_size)
        say(f"tokenising {len(self.split.digests):,} documents")
        work.finish(manifest | work.write(tokenizer, self.split, self.documents(), self.entries, say))


def _found_or_written(
    corpus: _Corpus, folder: Path, manifest: dict[str, Any], say: Callable[[str], None], *, cached: bool
) -> TokenData:
    """The token data that the manifest describes: the folder's, or what is written there now. Raises `UsageError` for a folder
    that cannot be written to, `RunError` if the disk is full."""
    inputs = manifest["inputs"]
    try:
        data = _find(folder, inputs, cached=cached)
        if data is None:
            with unfinished(folder, say) as path:
                data = _find(folder, inputs, cached=cached)  # another process was first
                if data is None:
                    corpus.write(path, manifest, say)
                    _publish(path, folder, inputs)
                    data = TokenData.open(folder)
        return data
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            instead = "set CADRE_CACHE to a folder of yours" if cached else "give another folder"
            raise UsageError(f"{folder}: cannot be written ({error.strerror}); {instead}") from error
        raise write_error(f"{folder}: cannot be written", error) from error


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
    else:
        (folder / STATE).unlink(missing_ok=True)
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
    try:
        return (Path(root) if root else Path.home() / ".cache").resolve() / "cadre" / "data"
    except RuntimeError:  # an unknown user, as in a container
        raise UsageError("there is no home folder to keep tokens in: set CADRE_CACHE to a folder of yours") from None


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
        manifest = read_manifest(folder)
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
