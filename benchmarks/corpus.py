"""Assembles 40 MB or so of English text from Debian packages, for `cadre compare STUDY --data sotu --data DIR`.

    python benchmarks/corpus.py DIR [PACKAGE ...]

Takes linux-doc-6.1 (kernel documentation), python3.11-doc and anarchism unless packages are named; `all` adds perl-doc, git-doc
and Python's own library and tests, 80 MB together. A package that is installed is read where it lies; another is downloaded
with `apt-get download` and unpacked into a temporary folder, so that nothing is installed and no root is needed. One `.jsonl`
file a package, one document a line. The texts keep their packages' licences: train on them here, do not ship them. With `sotu`
(12 MB, a dependency of Cadre) beside them they exceed 30 MB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
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
# Folders that are left out: translations, and what belongs to other packages.
OTHERS = {"translations", "dist-packages", "test"}
USUAL = ("linux-doc-6.1", "python3.11-doc", "anarchism")
LEAST_LETTERS = 500
ENOUGH = 30e6


def main() -> int:
    """Exit status: 0 done, 1 a download failed or a package holds no text where it should, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python benchmarks/corpus.py", description="Assemble text from Debian packages.")
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", default=list(USUAL))
    options = parser.parse_args()
    if options.packages == ["all"]:
        options.packages = list(SOURCES)
    unknown = [name for name in options.packages if name not in SOURCES]
    if unknown:
        parser.error(f"unknown package {unknown[0]}; known: {', '.join(SOURCES)}")
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
            print(f"corpus: {name} holds no text under {SOURCES[name][0]}", file=sys.stderr)
            return 1
        partial.replace(options.out / f"{name}.jsonl")
        total += size
        print(f"{name:16} {documents:6,} documents {size / 1e6:7.1f} MB")
    print(f"{'in all':16} {total / 1e6:24.1f} MB in {options.out}" + ("" if total >= ENOUGH else ", less than 30 MB"))
    return 0


def installed(name: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", name]
    return subprocess.run(query, capture_output=True, text=True).stdout == "installed" and any(texts(Path("/"), name))


def unpack(name: str, scratch: Path) -> Path:
    """The root of the package's files, downloaded into `scratch`."""
    subprocess.run(["apt-get", "-qq", "download", name], cwd=scratch, check=True, capture_output=True, text=True)
    package = next(scratch.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", package.name, "root"], cwd=scratch, check=True, capture_output=True, text=True)
    return scratch / "root"


def texts(root: Path, name: str) -> Iterator[str]:
    """The package's documents in order of their paths, translations left out, each once, tidied."""
    folder, pattern = SOURCES[name]
    seen = set()
    for path in sorted((root / folder).glob(pattern)):
        if not path.is_file() or set(path.parts) & OTHERS - set(Path(folder).parts):
            continue
        data = path.read_bytes()
        try:
            text = tidy((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8"))
        except (UnicodeDecodeError, gzip.BadGzipFile):
            continue
        if len(text) >= LEAST_LETTERS and text not in seen:
            seen.add(text)
            yield text


def tidy(text: str) -> str:
    """Without trailing blanks, runs of empty lines, and the long rules that only underline headings."""
    text = re.sub(r"[ \t]+$", "", text.replace("\r\n", "\n"), flags=re.MULTILINE)
    text = re.sub(r"^([=\-~^\"'*#+_`])\1{7,}$\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
