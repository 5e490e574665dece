"""The console entry: whatever is wrong ends in one line on standard error and the right status."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from cadre import __version__
from cadre.cli import main as module
from cadre.errors import DiskFullError, RunError, UsageError, printable


def cadre(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "cadre.cli.main", *arguments], capture_output=True, text=True)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["cadre", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code or 0


@pytest.mark.parametrize("error, status, line", [
    (UsageError("two\nlines  of\ttext"), 2, "cadre: two lines of text\n"),
    (RunError("the loss was not finite"), 1, "cadre: the loss was not finite\n"),
    (UsageError("x" * 5000 + " is wrong"), 2, "cadre: " + "x" * 747 + "..." + "x" * 241 + " is wrong\n"),
    (UsageError("m: unexpected tensor a\x1b[2J\x07"), 2, "cadre: m: unexpected tensor a\\x1b[2J\\x07\n"),
    (DiskFullError("the disk is full"), 2, "cadre: the disk is full\n"),
])  # fmt: skip
def test_errors_become_one_line_and_a_status(monkeypatch, capsys, error, status, line):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("cadre.cli.train._train", failing)
    assert call(monkeypatch, "train") == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error, status, line", [
    (PermissionError(13, "Permission denied", "a/b"), 2, "cadre: a/b: Permission denied\n"),
    (OSError(36, "File name too long", "xxx"), 2, "cadre: xxx: File name too long\n"),
    (OSError(5, "Input/output error", "a/b"), 1, "cadre: a/b: Input/output error\n"),
])  # fmt: skip
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error, status, line):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("cadre.cli.train._train", failing)
    assert call(monkeypatch, "train") == status
    assert capsys.readouterr() == ("", line)


def test_a_word_that_is_no_choice_is_refused_in_plain_words(monkeypatch, capsys):
    assert call(monkeypatch, "bench", "train", "--config", "x", "--peer", "foo") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("cadre: Invalid value for '--peer': 'foo' is not")


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("cadre.cli.train._train", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    assert call(monkeypatch, "train") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("cadre: this machine has not enough memory") and shown.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["generate", "eval", "routes", "plan", "convert", "data", "train"])
def test_a_name_that_is_too_long_is_one_line(monkeypatch, capsys, tmp_path, verb):
    monkeypatch.chdir(tmp_path)
    further = {"generate": ["x"], "convert": ["y"], "data": ["--out", "y"]}.get(verb, [])
    assert call(monkeypatch, verb, "x" * 300, *further) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("cadre: ") and shown.err.count("\n") == 1
    assert "File name too long" in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_told_and_has_its_own_status(monkeypatch, capsys, number, status):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("cadre.cli.train._train", lambda *_, **__: signal.raise_signal(number))
    try:
        assert call(monkeypatch, "train") == status
        assert capsys.readouterr() == ("", "cadre: interrupted\n")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # one of several processes: their launcher tells
        assert call(monkeypatch, "train") == 130
        assert capsys.readouterr() == ("", "")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0 and capsys.readouterr().out == f"cadre {__version__}\n"


def test_what_a_model_writes_moves_no_terminal():
    assert printable("a\x1b[2Jb\tc\n\x0e\x9bd\x7f") == "a\\x1b[2Jb\tc\n\\x0e\\x9bd\\x7f"


def test_names_that_are_not_unicode_can_be_printed():
    """Of files in a folder, which no argument names."""
    program = (
        "import sys; from cadre.cli import main; sys.argv = ['cadre']\n"
        'main._app = lambda: lambda standalone_mode: print(\'{"path": "a/\\udcff.txt"}\')\n'
        "main.main()"
    )
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=strict)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"path": "a/\udcff.txt"}


def test_help_names_every_verb(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in ("train", "generate", "chat", "eval", "data", "bench"))


@pytest.mark.parametrize("arguments", [["frobnicate"], ["train", "--frobnicate"], ["train", "--steps", "0"], ["bench", "x"]])
def test_unknown_commands_and_options_are_bad_usage(monkeypatch, capsys, arguments):
    assert call(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("cadre: ") and len(shown.err.splitlines()) == 1


def test_the_installed_command_refuses_in_one_line():
    done = cadre("train", "no-such-recipe")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cadre: recipe 'no-such-recipe' is neither a file nor a shipped recipe (gpu, laptop, ")
    assert done.stderr.count("\n") == 1


def test_arguments_that_are_no_text_are_refused():
    done = cadre("train", "--set", "data.source=caf\udce9.txt")  # a Latin-1 byte, as the shell hands it over
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cadre: arguments must be UTF-8") and done.stderr.count("\n") == 1
