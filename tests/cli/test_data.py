import json

import pytest
import typer
from typer.testing import CliRunner

from cadre.cli.data import data
from cadre.data.shards import TokenData
from cadre.errors import UsageError

APP = typer.Typer()
APP.command()(data)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"File {i} holds a line of text, and {i} more.\n" * 20)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def test_json_is_one_object_on_standard_output(text, tmp_path):
    out = tmp_path / "out"
    result = run(text, "--out", out, "--vocab-size", 280, "--held-out", 0.2, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["path"] == str(out) and result.stderr == ""
    assert (printed["train"]["documents"], printed["held_out"]["documents"]) == (8, 2)
    assert printed["vocab_size"] == TokenData.open(out).vocab_size == 280


def test_summary_names_counts_and_folder(text, tmp_path):
    result = run(text / "0.txt", text / "1.txt", "--out", tmp_path / "out", "--vocab-size", 280)
    assert result.exit_code == 0, result.output
    opened = TokenData.open(tmp_path / "out")
    assert f"training: 1 documents, {len(opened.train):,} tokens" in result.stdout
    assert f"held out: 1 documents, {len(opened.held_out):,} tokens" in result.stdout
    assert f"{opened.manifest['bytes_per_token']:.2f} bytes per token" in result.stdout
    assert str(tmp_path / "out") in result.stdout
    assert result.stdout.startswith("reading ") and "tokenising 2 documents\n" in result.stdout  # in a job's log, too
    assert result.stderr == ""


def test_a_given_tokenizer_is_used(text, tmp_path):
    run(text, "--out", tmp_path / "one", "--vocab-size", 280)
    result = run(text, "--out", tmp_path / "two", "--tokenizer", tmp_path / "one", "--json")
    assert result.exit_code == 0, result.output
    one = TokenData.open(tmp_path / "one")
    assert json.loads(result.stdout)["tokenizer_hash"] == one.manifest["tokenizer_hash"]


def test_bad_input_is_a_usage_error_and_writes_nothing(text, tmp_path):
    result = run(tmp_path / "absent.txt", "--out", tmp_path / "out")
    assert isinstance(result.exception, UsageError)
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
