"""The C++ kernels of decoding: compiled for this machine on first use, kept in the user's cache, loaded through ctypes.

Where they cannot be built (no compiler) everything runs through torch, slower; `why_missing` says why. Set
CADRE_NATIVE=off to do without them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from cadre.kernels.native.structs import declare

SOURCES = ("attention.cpp", "feed_forward.cpp", "causal_attention.cpp")
HEADERS = ("vector.h", "matrix.h", "step.h")
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


class _MissingError(Exception):
    """Why the kernels cannot be had, in one line."""


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they cannot be built."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded


def why_missing() -> str | None:
    """Why `library` is None, in one line; None if it is not."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _load() -> ctypes.CDLL | str:
    if os.environ.get("CADRE_NATIVE", "").lower() in ("off", "0"):
        return "switched off by CADRE_NATIVE"
    import torch  # noqa: F401  its OpenMP runtime must be loaded first, so that both share one pool of threads

    try:
        library = ctypes.CDLL(str(_built()))
        declare(library)
        return library
    except (_MissingError, OSError) as error:
        return str(error)


def _built() -> Path:
    """The shared library for these sources, this compiler and this processor, built if it is not there yet."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        raise _MissingError("no C++ compiler was found (g++ or clang++)")
    here = Path(__file__).parent
    key = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        key.update((here / name).read_bytes())
    key.update("\n".join((compiler, _output([compiler, "--version"]), *FLAGS, platform.machine(), _processor())).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cadre" / "native"
    target = home / f"{key.hexdigest()[:16]}.so"
    if not target.exists():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        _build(compiler, here, target)
    return target


def _build(compiler: str, here: Path, target: Path) -> None:
    """Compile beside the target and rename: another process never sees half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{name}.o" for name in SOURCES]
        jobs = [
            subprocess.Popen([compiler, *FLAGS, "-c", str(here / name), "-o", str(to)], stderr=subprocess.PIPE, text=True)
            for name, to in zip(SOURCES, objects, strict=True)
        ]
        for job in jobs:
            _, complaint = job.communicate()
            if job.returncode:
                raise _MissingError(f"{compiler} failed: {(complaint.strip().splitlines() or ['no message'])[0]}")
        made = Path(folder) / target.name
        _output([compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(made)])
        made.replace(target)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise _MissingError(f"{command[0]} failed: {error}") from None


def _processor() -> str:
    """What the processor can do: a cache on a shared home must not serve another machine's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
