"""Where the compiled kernels lie and when they are compiled anew; a stand-in for the compiler keeps it short."""

from __future__ import annotations

import errno
import functools
import os
import shlex
import time
from pathlib import Path

import pytest

from cadre.kernels.native import library

COMPILER = """
case "$*" in *--version*) echo stand-in 1.0; exit;; esac
if [ -n "{complaint}" ]; then printf 'note\\n{complaint}\\nmore\\n' >&2; exit 1; fi
while [ "$1" != -o ]; do shift; done
printf x >> "{folder}/calls"
printf made > "$2"
"""


class Place:
    """A cache folder and a compiler of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, complaint: str = "") -> None:
        self.folder, self.libraries = folder, folder / "cache" / "cadre" / "native"
        script = folder / "compiler.sh"
        script.write_text(COMPILER.format(folder=folder, complaint=complaint))
        patch.setenv("CXX", shlex.join(["sh", str(script)]))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.delenv("CADRE_NATIVE", raising=False)
        patch.setattr(library, "_load", functools.cache(library._load.__wrapped__))

    @property
    def calls(self) -> int:
        return len((self.folder / "calls").read_text()) if (self.folder / "calls").exists() else 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_it_is_compiled_once(place: Place) -> None:
    """By a compiler command of several words."""
    assert library.must_compile()
    made = library._built()
    assert made.parent == place.libraries and made.read_text() == "made"
    assert place.calls == len(library.SOURCES) + 1
    assert not library.must_compile()
    assert library._built() == made
    assert place.calls == len(library.SOURCES) + 1
    assert list(place.libraries.iterdir()) == [made]


@pytest.mark.parametrize("damaged", ["", "mad", "made!"])
def test_a_damaged_one_is_compiled_anew(place: Place, damaged: str) -> None:
    """As a crash or a full disk leaves it: loading that would end the process, at every start."""
    made = library._built()
    made.write_text(damaged)
    assert library.must_compile()
    assert library._built().read_text() == "made"
    assert not library.must_compile()


def test_nothing_of_another_user_is_loaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    library._built()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    reason = library.why_missing()
    assert reason is not None
    assert "belongs to another user: set XDG_CACHE_HOME to a folder of yours" in reason


def test_a_folder_of_another_user_is_not_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.libraries.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in (library.why_missing() or "")
    assert place.calls == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_where_nothing_may_be_written_it_says_what_to_do(place: Place, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As for a user of a container whose home is /."""

    def refused(folder: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(Path, "mkdir", refused)
    reason = f"{place.libraries}: {os.strerror(number)}: set XDG_CACHE_HOME to a folder of yours"
    assert library.why_missing() == reason


def test_others_may_not_write_there(place: Place) -> None:
    place.libraries.mkdir(parents=True)
    for folder in (place.libraries, place.libraries.parent):
        folder.chmod(0o777)
    made = library._built()
    made.chmod(0o666)
    assert library._built() == made
    for path in (made, place.libraries, place.libraries.parent):
        assert path.stat().st_mode & 0o022 == 0


def test_no_home_is_a_reason_in_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an unknown user in a container."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert not library.must_compile()
    assert library.why_missing() == "there is no home folder to keep them in: set XDG_CACHE_HOME to a folder of yours"
    assert library.library() is None


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler -x", "the compiler that CXX names, no-such-compiler, was not found"), ('g++ "', "CXX cannot be read")],
)
def test_a_wrong_compiler_is_a_reason(place: Place, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert not library.must_compile()
    assert (library.why_missing() or "").startswith(reason)


def test_what_the_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Place(tmp_path, monkeypatch, complaint="x.cpp:3: error: no")
    assert (library.why_missing() or "").endswith("failed: x.cpp:3: error: no")


def test_what_the_linker_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linker = tmp_path / "link"
    linker.write_text("#!/bin/sh\necho warning >&2; echo '/usr/bin/ld: cannot find -lomp' >&2; exit 1\n")
    linker.chmod(0o700)
    with pytest.raises(library._MissingError, match=r"link failed: /usr/bin/ld: cannot find -lomp$"):
        library._output([str(linker), "-shared"])


def test_what_nobody_used_for_long_goes(place: Place) -> None:
    place.libraries.mkdir(parents=True)
    old, young = place.libraries / "0123.so", place.libraries / "4567-89.so"
    left = place.libraries / "tmp123"
    left.mkdir()
    for path in (old, young, left / "made.so"):
        path.write_text("x")
    for path in (old, left):
        os.utime(path, (time.time() - 31 * 24 * 3600,) * 2)
    made = library._built()
    assert set(place.libraries.iterdir()) == {young, made}


def test_use_keeps_it(place: Place) -> None:
    made = library._built()
    os.utime(made, (1.0, 1.0))
    library._built()
    assert made.stat().st_mtime > 1e9


def test_switched_off_compiles_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADRE_NATIVE", "off")
    assert not library.must_compile()
    assert library.why_missing() == "switched off by CADRE_NATIVE"
    assert place.calls == 0
