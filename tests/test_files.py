"""Files appear whole or not at all."""

import os

import pytest

from cadre.errors import DiskFullError, RunError, write_error
from cadre.files import replace_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def failing(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (OSError(28, "No space left on device"), DiskFullError, "out: not saved: the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), DiskFullError, "out: not saved: the disk is full"),
        (OSError(5, "Input/output error"), RunError, "out: not saved: Input/output error"),
    ],
)
def test_what_failed_writing_says(error, kind, message):
    raised = write_error("out: not saved", error)
    assert type(raised) is kind and str(raised) == message
    assert raised.status == (2 if kind is DiskFullError else 1)
