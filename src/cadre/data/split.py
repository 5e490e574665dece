"""Which documents are held out, and where long text may be cut."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cadre.data.sources import Document
from cadre.errors import RunError, UsageError

# Before a line's first character and before a single space between words no pre-tokenizer of ours (nor GPT-2's or
# DeepSeek's) makes one token of both sides, so the pieces' tokens are the whole's.
_SEAM = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")
_SEAM_REACH = 4096
# How far the held-out documents' share of the text may exceed what was asked for.
_MOST_TIMES = 3
# Characters of a document up to which its end is too little to hold out.
_LEAST_TO_CUT = 1000


class TextChangedError(RunError):
    """The corpus is not the one that was split."""


@dataclass(frozen=True, eq=False)
class Split:
    """A corpus divided into training and held-out text. Arrays, for a corpus may have a hundred million documents.

    digests: the documents' SHA-256 [documents], in the order they are read. held_out: bool [documents], which are held out, so
    that copies of a held-out document are held out too. entries: how many documents each entry of the source has. cut: the
    digests of documents whose end is held out, of each `tail`, a share. conversations: whether any of them is one.
    characters: of all of them together.
    """

    digests: np.ndarray
    held_out: np.ndarray
    entries: Counter[int]
    cut: frozenset[bytes] = frozenset()
    tail: float = 0.0
    conversations: bool = False
    characters: int = 0

    @property
    def content(self) -> str:
        """SHA-256, in hexadecimal, of the corpus: equal for equal documents in equal order, wherever they lie."""
        return hashlib.sha256(self.digests.view(np.uint8).data).hexdigest()

    def divide(self, documents: Iterable[Document]) -> Iterator[tuple[bool, Document]]:
        """(is held out, document), reading the corpus anew. Raises `TextChangedError` if it is not the one that was split."""
        count = 0
        for count, document in enumerate(documents, start=1):
            digest = _digest(document)
            if count > len(self.digests) or digest != self.digests[count - 1].tobytes():
                raise TextChangedError(f"{document.name}: the text changed while it was being prepared; run it again")
            if digest in self.cut:
                cut = _cut(document, self.tail)
                yield False, document.part(0, cut)
                yield True, document.part(cut, len(document.text))
            else:
                yield bool(self.held_out[count - 1]), document
        if count != len(self.digests):
            raise TextChangedError("the text changed while it was being prepared; run it again")


def split_documents(documents: Iterable[Document], held_out: float) -> Split:
    """Hold out a share of the documents: those whose hashes rank first, at least one, never all.

    The choice depends on the documents' contents alone, not on their order or names. A corpus of one document gives
    up its end instead, cut where a paragraph or line ends. Where the documents that rank first are more than three times that
    share of the text, so does each document that alone is more than the share, and the others are ranked without them.
    `held_out` 0 holds nothing out.

    Raises UsageError if `held_out` is not in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out {held_out} is out of range: a share of the documents, from 0 up to but not 1")
    read, lengths = bytearray(), array("q")
    entries: Counter[int] = Counter()
    conversations = False
    for document in documents:
        conversations |= document.answers is not None
        read += _digest(document)
        entries[document.entry] += 1
        lengths.append(len(document.text))
    digests, sizes = np.frombuffer(read, dtype=_DIGEST), np.frombuffer(lengths, dtype=np.int64)
    none = np.zeros(len(digests), dtype=bool)
    split = Split(digests, none, entries, conversations=conversations, characters=int(sizes.sum()))
    if not held_out:
        return split
    order, first = _ranked(digests)
    one_of_each = order[first]
    sizes = sizes[one_of_each]
    distinct = len(sizes)
    count = min(max(1, round(held_out * distinct)), distinct - 1)
    taken, share = int(sizes[:count].sum()), held_out * int(sizes.sum())
    if distinct == 1:
        return replace(split, cut=frozenset([digests[0].tobytes()]), tail=held_out)
    large = sizes > max(share, _LEAST_TO_CUT)
    chosen = np.zeros(distinct, dtype=bool)
    if not large.any() or taken <= _MOST_TIMES * share:
        chosen[:count] = True
        return replace(split, held_out=_of_copies(chosen, order, first))
    small = np.flatnonzero(~large)
    chosen[small[: round(held_out * len(small))]] = True
    cut = frozenset(digest.tobytes() for digest in digests[one_of_each[large]])
    return replace(split, held_out=_of_copies(chosen, order, first), cut=cut, tail=held_out)


# A SHA-256.
_DIGEST = np.dtype("V32")


def _ranked(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents' numbers in the order of their digests, int64 [documents], and which of them, bool, is the first of its
    copies there."""
    words = digests.view(">u8").reshape(-1, 4).T
    order = np.lexsort(words[::-1])
    first = np.ones(len(order), dtype=bool)
    if len(order):
        first[1:] = False
        for word in words:
            ranked = word[order]
            first[1:] |= ranked[1:] != ranked[:-1]
    return order, first


def _of_copies(chosen: np.ndarray, order: np.ndarray, first: np.ndarray) -> np.ndarray:
    """bool [documents]: which are chosen, from which of the distinct ones are, in the order of their digests."""
    held = np.empty(len(order), dtype=bool)
    held[order] = chosen[np.cumsum(first) - 1]
    return held


def pieces(text: str, limit: int) -> Iterator[str]:
    """Cut text into pieces of at most `limit` characters which tokenise to the tokens of the whole.

    Only text without any line or word end for 4,096 characters is cut elsewhere, at the limit.
    """
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        for seam in _SEAM.finditer(text, max(start + 1, stop - _SEAM_REACH), start + limit):
            stop = seam.start()
        yield text[start:stop]
        start = stop
    yield text[start:]


def _digest(document: Document) -> bytes:
    whole = document.text if document.answers is None else repr((document.text, document.answers))
    return hashlib.sha256(whole.encode("utf-8")).digest()


def _cut(document: Document, share: float) -> int:
    """Where the held-out end of a document starts: of a conversation within what is learned, so that both parts have some."""
    first, last = (document.answers[0][0], document.answers[-1][1]) if document.answers else (0, len(document.text))
    return first + _cut_tail(document.text[first:last], share)


def _cut_tail(text: str, share: float) -> int:
    """Where the held-out end starts: the last paragraph, line or word end that holds out up to twice the share."""
    if len(text) < 2:
        raise UsageError("the corpus is one character to learn, of which nothing can be held out: give more text")
    cut = min(max(round(len(text) * (1 - share)), 1), len(text) - 1)
    lowest = max(len(text) - 2 * (len(text) - cut), 0)
    for end in ("\n\n", "\n", " "):
        found = text.rfind(end, lowest, cut)
        if found >= 0:
            return found + len(end)
    return cut
