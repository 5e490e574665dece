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

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cadre.data.sources import HELD_OUT_TEXT, MANIFEST, Document, held_out_document
from cadre.errors import UsageError
from cadre.files import kind_of, require_regular, stamp
from cadre.hub.template import ChatTemplate
from cadre.hub.tokenizer import load_tokenizer, special_ids

FORMAT = 1
PARTS = ("train", "held_out")
_KEYS = {"inputs", "source", "vocab_size", "dtype", "train", "held_out", "files"}


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
        manifest = read_manifest(path)
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
        train, held_out = (_open_tokens(path, part, manifest, ended) for part in PARTS)
        return cls(path, manifest, tokenizer, train, held_out)

    def read_held_out(self) -> Iterator[Document]:
        """The held-out documents' raw text, one after the other; none if nothing was held out."""
        with (self.path / HELD_OUT_TEXT).open("rb") as file:
            yield from map(held_out_document, file)


def read_manifest(path: Path) -> dict[str, Any]:
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
