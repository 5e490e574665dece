"""Files that appear whole or not at all, and JSON that is read or refused in a line."""

import errno
import json
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cadre.errors import UsageError, read_error

_BLOCK = 2**22
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def kind_of(path: Path) -> Literal["file", "folder", "other"] | None:
    """What is at a path, links followed; "other" are pipes and devices, None is nothing. Raises `UsageError` where that cannot
    be told: below a folder that is closed to us, for a name that is too long."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise read_error(path, error) from None
    except ValueError:  # no file has such a name
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def require_regular(path: Path) -> None:
    """Raises `UsageError` for a pipe or a device, which might keep a reader waiting for ever."""
    if kind_of(path) == "other":
        raise UsageError(f"{path}: is a pipe or a device; wanted a file")


def replace_file(path: Path, content: bytes) -> None:
    """Writes `path` atomically: readers, and a crash, see the old file or the whole new one. Raises OSError."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write what `path` is to hold into, which takes its place when all is written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require_local(path: Path) -> None:
    """Raises `UsageError` for the address of a store, such as s3://bucket/folder: what is written stays on this machine, and
    the address would make folders of its parts."""
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(path))
    if address:
        raise UsageError(f"{address[1]}://{str(path)[address.end() :]}: is an address; give a place on this machine")


def require_folder(path: Path) -> None:
    """Raises OSError if a folder can neither be made nor written to, and `UsageError` for an address; leaves nothing behind."""
    require_local(path)
    # Not made for the trial: who is at the same in a common parent would find it gone.
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    longest = os.pathconf(there, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in path.absolute().relative_to(there).parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=there):
        pass


def read_json(path: Path) -> Any:
    """The file's content. Raises `UsageError` if it is missing or no JSON."""
    require_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # a file of many brackets is too deep for the reader
        raise UsageError(f"{path}: cannot be read as JSON ({error})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The file's content, which must be an object. Raises `UsageError` otherwise."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds {type(values).__name__}, not a JSON object")
    return values


def sync(path: Path) -> None:
    """Have the kernel write a file, or a folder's list of names, to the disk itself. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stamp(path: Path) -> dict[str, Any]:
    """Size, and CRC-32 of the first and last MiB, where a torn write shows: constant time whatever the size. Raises OSError."""
    size, edge = path.stat().st_size, 2**20
    with path.open("rb") as stream:
        crc = zlib.crc32(stream.read(edge))
        stream.seek(max(edge, size - edge))
        crc = zlib.crc32(stream.read(), crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def checksum(path: Path) -> dict[str, Any]:
    """Size, and CRC-32 of all of it. Raises OSError."""
    size, crc = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}
