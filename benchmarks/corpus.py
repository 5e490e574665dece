"""Assembles English text from Debian packages, for `cadre compare STUDY --data sotu --data DIR`.

    python benchmarks/corpus.py DIR [PACKAGE ...]

Takes linux-doc-6.1 (kernel documentation), python3.11-doc and anarchism (an FAQ) unless packages are named, 44 MB. `all` adds
perl-doc, git-doc and Python's own library and tests, 82 MB together; `prose` is anarchism, the Bible (bible-kjv-text) and Jane
Austen's novels (r-cran-janeaustenr), 20 MB without code or tables. A package that is installed is read where it lies; another
is downloaded with `apt-get download` and unpacked into a temporary folder, so that nothing is installed and no root is needed.
One `.jsonl` file a package, one document a line. The texts keep their packages' licences: train on them here, do not ship them.
With `sotu` (12 MB, a dependency of Cadre) beside them each choice exceeds 30 MB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

# Package: folder of its texts (under the root), and which files in it are read.
SOURCES = {
    "linux-doc-6.1": ("usr/share/doc/linux-doc-6.1/html/_sources", "**/*.rst.txt*"),
    "python3.11-doc": ("usr/share/doc/python3.11/html/_sources", "**/*.rst.txt*"),
    "anarchism": ("usr/share/doc/anarchism/markdown", "**/*.md*"),
    "perl-doc": ("usr/share/perl", "**/*.pod"),
    "git-doc": ("usr/share/doc/git-doc", "**/*.txt*"),
    "libpython3.11-stdlib": ("usr/lib/python3.11", "**/*.py"),
    "libpython3.11-testsuite": ("usr/lib/python3.11/test", "**/*.py"),
}
# A text that is packed in its own way, and the package of the program that unpacks it.
PROGRAMS = {"bible-kjv-text": "bible-kjv"}
# Folders that are left out: translations, and what belongs to other packages.
OTHERS = {"translations", "dist-packages", "test"}
USUAL = ("linux-doc-6.1", "python3.11-doc", "anarchism")
GROUPS = {"all": list(SOURCES), "prose": ["anarchism", "bible-kjv-text", "r-cran-janeaustenr"]}
LEAST_LETTERS = 500
# With sotu's 12 MB beside them these texts are then 30 MB.
ENOUGH = 18e6


def main() -> int:
    """Exit status: 0 done, 1 a download failed or a package holds no text where it should, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python benchmarks/corpus.py", description="Assemble text from Debian packages.")
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", default=list(USUAL))
    options = parser.parse_args()
    if len(options.packages) == 1:
        options.packages = GROUPS.get(options.packages[0], options.packages)
    known = [*SOURCES, *PACKED]
    unknown = [name for name in options.packages if name not in known]
    if unknown:
        parser.error(f"unknown package {unknown[0]}; known: {', '.join(known)}; or alone: {', '.join(GROUPS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for name in options.packages:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                root = Path("/") if installed(name) else unpack(name, Path(scratch))
            except (OSError, subprocess.CalledProcessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                print(f"corpus: {name} cannot be downloaded: {said[-1] if said else error}", file=sys.stderr)
                return 1
            size = documents = 0
            partial = options.out / f".{name}.partial"
            with partial.open("w", encoding="utf-8") as file:
                for text in texts(root, name):
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    size, documents = size + len(text.encode()), documents + 1
        if not documents:
            partial.unlink()
            print(f"corpus: {name} holds no text where it should", file=sys.stderr)
            return 1
        partial.replace(options.out / f"{name}.jsonl")
        total += size
        print(f"{name:18} {documents:6,} documents {size / 1e6:7.1f} MB")
    short = "" if total >= ENOUGH else ", with sotu less than 30 MB"
    print(f"{'in all':18} {total / 1e6:24.1f} MB in {options.out}{short}")
    return 0


def installed(name: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", name]
    return subprocess.run(query, capture_output=True, text=True).stdout == "installed" and any(texts(Path("/"), name))


def unpack(name: str, scratch: Path) -> Path:
    """The root of the package's files and its program's, downloaded into `scratch`."""
    wanted = [name, PROGRAMS[name]] if name in PROGRAMS else [name]
    subprocess.run(["apt-get", "-qq", "download", *wanted], cwd=scratch, check=True, capture_output=True, text=True)
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package.name, "root"], cwd=scratch, check=True, capture_output=True, text=True)
    return scratch / "root"


def texts(root: Path, name: str) -> Iterator[str]:
    """The package's documents, each once, tidied."""
    seen = set()
    for untidy in PACKED[name](root) if name in PACKED else files(root, *SOURCES[name]):
        text = tidy(untidy)
        if len(text) >= LEAST_LETTERS and text not in seen:
            seen.add(text)
            yield text


def files(root: Path, folder: str, pattern: str) -> Iterator[str]:
    """The files in order of their paths, translations left out."""
    for path in sorted((root / folder).glob(pattern)):
        if not path.is_file() or set(path.parts) & OTHERS - set(Path(folder).parts):
            continue
        data = path.read_bytes()
        try:
            yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        except (UnicodeDecodeError, gzip.BadGzipFile):
            continue


def bible(root: Path) -> Iterator[str]:
    """Its books, without the numbers of chapters and verses."""
    program, data = root / "usr/bin/bible", root / "usr/lib"
    if not program.exists():
        return
    command = [str(program), "-p", str(data), "-l9999", "gen1:1-rev22:21"]
    whole = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapter = re.compile(r"^(\d? ?[A-Z][A-Za-z ]+) \d+\n\n", re.MULTILINE)  # "Genesis 1", alone between empty lines
    _, *parts = chapter.split(whole)
    books: dict[str, str] = {}
    for book, verses in zip(parts[::2], parts[1::2], strict=True):
        books[book] = books.get(book, "") + re.sub(r"^ +\d+ ", "", verses, flags=re.MULTILINE)
    yield from books.values()


def novels(root: Path) -> Iterator[str]:
    """The novels in an R package's data: after its length each is a zlib stream, and in it each line a string, that is four
    bytes of flags, the last of them R's type 9, a big-endian length, and UTF-8."""
    data = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    packed = data.read_bytes() if data.exists() else b""
    while packed:
        stream = zlib.decompressobj()
        made, lines, at = stream.decompress(packed[4:]), [], 0
        packed = stream.unused_data
        for string in re.finditer(rb"\x00\x04.\x09(....)", made, re.DOTALL):
            if string.start() >= at:
                at = string.end() + struct.unpack(">I", string[1])[0]
                lines.append(made[string.end() : at].decode("utf-8"))
        yield "\n".join(lines)


PACKED = {"bible-kjv-text": bible, "r-cran-janeaustenr": novels}


def tidy(text: str) -> str:
    """Without trailing blanks, runs of empty lines, and the long rules that only underline headings."""
    text = re.sub(r"[ \t]+$", "", text.replace("\r\n", "\n"), flags=re.MULTILINE)
    text = re.sub(r"^([=\-~^\"'*#+_`])\1{7,}$\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
