"""Files in remote stores, through fsspec: whatever protocol is installed (`s3://`, `gs://`, `https://`, ...)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import IO, Any

from cadre.errors import UsageError, first_line

# Letters and "://": a drive letter of another system is no protocol. Chains such as simplecache::s3:// are fsspec's own.
_ADDRESS = re.compile(r"(\w+::)*[a-zA-Z][a-zA-Z0-9+.-]+://")
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"), **dict.fromkeys(("gs", "gcs"), "gcsfs"), "hf": "huggingface_hub",
    **dict.fromkeys(("http", "https"), "aiohttp"), **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
}  # fmt: skip

# What stores call the tag that every version of a file has for itself: S3; Google's and Azure's; Hugging Face's.
_TAGS = ("ETag", "etag", "blob_id")


def is_remote(entry: str) -> bool:
    return _ADDRESS.match(entry) is not None


@dataclass(frozen=True)
class Remote:
    """A file of a store, as much of a path as a reader needs. `address`: with its protocol."""

    address: str

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def mark(self) -> str | None:
        """What the store says by which the file, once it is changed, differs; None if it says nothing of the kind."""
        # A chain such as simplecache::s3:// may read something older than what is there; web servers' tags may count seconds.
        if "::" in self.address or self.address.startswith("http"):
            return None
        try:
            store, path = _store(self.address)
            held = store.info(path)
        except Exception:  # a store's own: whoever reads the file is told
            return None
        tag = next((held[name] for name in _TAGS if isinstance(held.get(name), str)), None)
        return None if tag is None or tag.startswith("W/") else f"{tag} {held.get('size')}"

    def open(self, mode: str) -> IO[bytes]:
        """A seekable stream. Raises OSError, whatever the store itself raises."""
        try:
            store, path = _store(self.address)
            return store.open(path, mode)
        except UsageError:
            raise
        except Exception as error:
            raise error if isinstance(error, OSError) else OSError(first_line(error)) from error


def list_remote(entry: str) -> list[Remote]:
    """The files of a store that an address stands for, sorted: a file, all below a folder, or all that match a pattern; hidden
    ones passed over. Raises UsageError if there is nothing, or the protocol is not installed."""
    try:
        store, path = _store(entry)
        store.invalidate_cache()  # what this process has listed before may have changed
        if has_magic(path):
            found = [name for name in store.glob(path) if store.isfile(name)]
        else:
            found = [path] if store.isfile(path) else store.find(path)
    except UsageError:
        raise
    except Exception as error:  # a store's own: no access, no such bucket, no network
        raise UsageError(f"{entry}: cannot be read ({first_line(error)})") from error
    root = re.split(r"[*?[]", path)[0]
    shown = [name for name in sorted(found) if not any(part.startswith(".") for part in name[len(root) :].split("/"))]
    if not shown:
        raise UsageError(f"{entry}: no such file or folder in the store")
    return [Remote(_address(entry, store, name)) for name in shown]


def _address(entry: str, store: Any, path: str) -> str:
    chain = entry.rpartition("::")[0]
    address = store.unstrip_protocol(path)
    return f"{chain}::{address}" if chain else address


def _store(address: str) -> tuple[Any, str]:
    """The file system of an address, and its path in there."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        protocol = address.rpartition("::")[2].partition("://")[0]
        if protocol in _PACKAGES and isinstance(error, ImportError):
            raise UsageError(f"{address}: reading {protocol}:// needs a package: pip install {_PACKAGES[protocol]}") from error
        raise UsageError(f"{address}: cannot be read ({first_line(error)})") from error
