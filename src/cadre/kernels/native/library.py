"""The C++ kernels: compiled for this machine on first use, kept in the user's cache, loaded through ctypes.

Where they cannot be built (no compiler) everything runs through torch, slower; `why_missing` says why. Set
CADRE_NATIVE=off to do without them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cadre.kernels.native.structs import declare

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SOURCES = (
    *("attention.cpp", "feed_forward.cpp", "causal_attention.cpp", "gemm.cpp"),
    *("experts_training.cpp", "norm_training.cpp", "rotary.cpp", "routing.cpp", "cross_entropy.cpp", "newton_schulz.cpp"),
    *("total_norm.cpp", "adamw.cpp", "meet.cpp"),
)
_HERE = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    # For AMD's processors GCC forms a multiply-add of some sums and not of others: a token's bits would depend on how many
    # tokens are computed beside it. (clang takes no notice of this.)
    "--param=avoid-fma-max-bits=0",
)
# Libraries that nobody has loaded for so long are removed: of other versions, compilers and processors.
_KEPT_SECONDS = 30 * 24 * 3600


class _MissingError(Exception):
    """Why the kernels cannot be had, in one line."""


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they cannot be built."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded


def kernels() -> ctypes.CDLL:
    """The loaded kernels, for whoever has asked already whether they take what he has."""
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"the C++ kernels are missing: {why_missing()}")
    return loaded


@functools.cache
def training_library() -> ctypes.CDLL | None:
    """The same for the kernels that multiply by the BLAS that torch brought along; None also where torch has none to lend."""
    loaded = library()
    if loaded is None:
        return None
    import torch

    try:
        suffix = "dylib" if platform.system() == "Darwin" else "so"
        sgemm = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}")).sgemm_
    except (OSError, AttributeError):
        return None
    loaded.cadre_use_sgemm(ctypes.cast(sgemm, ctypes.c_void_p))
    return loaded


@functools.cache
def own_products_faster(narrow: bool) -> bool:
    """Whether our own products are faster here than torch's of float32: of factors rounded to bfloat16 (`narrow`) where the
    processor multiplies those itself, of float32 where torch's BLAS leaves it half idle."""
    loaded = training_library()
    return loaded is not None and bool(loaded.cadre_multiplies(narrow))


def training_kernels_take(*tensors: Tensor) -> bool:
    """Whether the training kernels take these: `is_plain` tensors, and the kernels can be had."""
    return is_plain(*tensors) and training_library() is not None


def kernels_take_rows(x: Tensor, *weights: Tensor, narrow: bool) -> bool:
    """Whether the training kernels take rows x and these matrices: float32 all of them; or, where products are to be `narrow`
    and without gradients, matrices of bfloat16."""
    import torch

    if training_kernels_take(x, *weights):
        return True
    halves = narrow and not torch.is_grad_enabled() and is_plain(*weights, dtype=torch.bfloat16)
    return halves and training_kernels_take(x) and own_products_faster(narrow=True)


def is_plain(*tensors: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all are tensors of a dtype (float32) on a CPU whose elements lie where they say, computed now, not traced."""
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    if any(x.device.type != "cpu" for x in tensors):  # soonest said, and often asked of a card's tensors
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if _get_current_dispatch_mode() is not None:  # it must see every operation, and may give tensors without elements
        return False
    kinds = (torch.Tensor, torch.nn.Parameter)  # a distributed tensor, for one, holds its elements elsewhere
    dtype = dtype or torch.float32
    return all(x.dtype == dtype and type(x) in kinds and x.layout == torch.strided and not x.is_neg() for x in tensors)


# Elements below which more than one thread costs more than it brings.
_FEW = 1 << 15


def threads_for(x: Tensor) -> int:
    """How many threads one pass over x takes."""
    import torch

    return 1 if x.numel() < _FEW else torch.get_num_threads()


def as_rows(x: Tensor) -> Tensor:
    """[N, D] of [..., D], a view where rows are evenly spaced."""
    x_ND = x.flatten(0, -2)
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def why_missing() -> str | None:
    """Why `library` is None, in one line; None if it is not."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def must_compile() -> bool:
    """Whether `library` will first compile, for half a minute or so: nobody has used these kernels on this machine yet."""
    if _load.cache_info().currsize or _switched_off():
        return False
    try:
        return _found(*_place(_compiler())) is None
    except (_MissingError, OSError):
        return False


def _switched_off() -> bool:
    return os.environ.get("CADRE_NATIVE", "").lower() in ("off", "0")


@functools.cache
def _load() -> ctypes.CDLL | str:
    if _switched_off():
        return "switched off by CADRE_NATIVE"
    import torch  # noqa: F401  its OpenMP runtime must be loaded first, so that both share one pool of threads

    try:
        library = ctypes.CDLL(str(_built()))
        declare(library)
        return library
    except _MissingError as error:
        return str(error)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{error.filename}: {error.strerror}: set XDG_CACHE_HOME to a folder of yours"
        return str(error)


def _built() -> Path:
    """The shared library for these sources, this compiler and this processor, built if it is not there yet."""
    compiler = _compiler()
    folder, key = _place(compiler)
    return _found(folder, key) or _build(compiler, folder, key)


def _compiler() -> list[str]:
    """The command; CXX may hold several words, as in `ccache g++`."""
    try:
        command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    except ValueError as error:
        raise _MissingError(f"CXX cannot be read: {error}") from None
    if not command[0]:
        raise _MissingError("no C++ compiler was found (g++ or clang++)")
    if shutil.which(command[0]) is None:
        raise _MissingError(f"the compiler that CXX names, {command[0]}, was not found")
    return command


def _place(compiler: list[str]) -> tuple[Path, str]:
    """The folder of libraries, and what the names of those for these sources, this compiler and this processor begin with."""
    key = hashlib.sha256()
    for path in (*(_HERE / name for name in SOURCES), *sorted(_HERE.glob("*.h"))):
        key.update(path.read_bytes())
    key.update("\n".join((*compiler, _output([*compiler, "--version"]), *FLAGS, platform.machine(), _processor())).encode())
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise _MissingError("there is no home folder to keep them in: set XDG_CACHE_HOME to a folder of yours") from None
    return cache / "cadre" / "native", key.hexdigest()[:16]


def _found(folder: Path, key: str) -> Path | None:
    """A whole library of that key. Its name ends with the hash of its content: one that a crash or a full disk left half
    written would end every process that loads it, for good."""
    for path in folder.glob(f"{key}-*.so"):
        for part in (folder.parent, folder, path):
            _require_own(part)
        if hashlib.sha256(path.read_bytes()).hexdigest()[:16] == path.stem.removeprefix(f"{key}-"):
            os.utime(path)
            return path
    return None


def _require_own(path: Path) -> None:
    """Whoever may write there runs code here. Raises `_MissingError`."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise _MissingError(f"{path} belongs to another user: set XDG_CACHE_HOME to a folder of yours")
    if status.st_mode & 0o022:
        path.chmod(status.st_mode & 0o755)


def _build(compiler: list[str], home: Path, key: str) -> Path:
    """Compile beside the target and rename: another process never sees half a library."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for part in (home.parent, home):
        _require_own(part)
    _prune(home)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        objects = [Path(folder) / f"{name}.o" for name in SOURCES]
        jobs = [
            subprocess.Popen([*compiler, *FLAGS, "-c", str(_HERE / name), "-o", str(to)], stderr=subprocess.PIPE, text=True)
            for name, to in zip(SOURCES, objects, strict=True)
        ]
        complaints = [job.communicate()[1].strip().splitlines() for job in jobs]
        for job, complaint in zip(jobs, complaints, strict=True):
            if job.returncode:
                raise _MissingError(f"{shlex.join(compiler)} failed: {_complaint(complaint)}")
        made = Path(folder) / "made.so"
        _output([*compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(made)])
        made.chmod(0o700)
        with made.open("rb") as file:
            content = file.read()
            os.fsync(file.fileno())
        target = home / f"{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"
        return made.replace(target)


def _prune(folder: Path) -> None:
    """Remove what nobody has used for long, and what killed builds left."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime > time.time() - _KEPT_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix == ".so":
                path.unlink()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise _MissingError(f"{command[0]} failed: {_complaint(error.stderr.strip().splitlines())}") from None
    except OSError as error:
        raise _MissingError(f"{command[0]} failed: {error}") from None


def _complaint(lines: list[str]) -> str:
    """What a compiler or linker stumbled over."""
    return next((line for line in lines if "error" in line or "cannot find" in line), (lines or ["no message"])[0])


def _processor() -> str:
    """What the processor can do: a cache on a shared home must not serve another machine's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
