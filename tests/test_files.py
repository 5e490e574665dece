"""Files appear whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cadre.cli.main import _app
from cadre.data.prepare import prepare
from cadre.errors import DiskFullError, RefusedError, RunError, UsageError, write_error
from cadre.files import replace_file, require_folder, require_local


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
        (PermissionError(13, "Permission denied"), RefusedError, "out: not saved: Permission denied: choose another place"),
        (OSError(36, "File name too long"), RefusedError, "out: not saved: File name too long: choose another place"),
        (OSError(16, "Device or resource busy"), RefusedError, "out: not saved: Device or resource busy: choose another place"),
        (OSError(5, "Input/output error"), RunError, "out: not saved: Input/output error"),
    ],
)
def test_what_failed_writing_says(error, kind, message):
    raised = write_error("out: not saved", error)
    assert type(raised) is kind and str(raised) == message
    assert raised.status == (1 if kind is RunError else 2)


def test_a_folder_that_can_be_had_is_left_as_it_was(tmp_path):
    require_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "file").touch()
    require_folder(tmp_path / "held")
    assert [path.name for path in (tmp_path / "held").iterdir()] == ["file"]


@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://b", "file:///x"])
def test_an_address_is_no_place_to_write_to(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    for write in (require_folder, lambda path: prepare("sotu", out=path)):
        with pytest.raises(UsageError, match=f"^{address.replace(':///', '://')}: is an address"):
            write(Path(address))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [["data", "t.txt", "--out"], ["convert", "m"], ["routes", "m", "--data", "t.txt", "--out"]])
def test_no_verb_makes_folders_of_an_address(tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(_app(), [*verb, "s3://bucket/x"])
    assert str(result.exception) == "s3://bucket/x: is an address; give a place on this machine"
    assert list(tmp_path.iterdir()) == []


def test_a_name_with_a_colon_is_no_address(tmp_path):
    require_local(tmp_path / "a:b")
    require_local(Path("12:/x"))


def test_folders_of_a_common_parent_are_tried_at_once(tmp_path):
    with ThreadPoolExecutor(4) as threads:
        for trial in [threads.submit(require_folder, tmp_path / "runs" / str(n % 4)) for n in range(200)]:
            trial.result()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/run", "file", "a" * 300, "b/" + "a" * 300])
def test_a_place_for_no_folder_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        require_folder(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
