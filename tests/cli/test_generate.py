import json
import sys
from types import SimpleNamespace

import pytest
import typer
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

import cadre
from cadre.cli.generate import generate
from cadre.errors import UsageError
from cadre.model.transformer import Transformer
from tests.shapes import small

APP = typer.Typer()
APP.command()(generate)


def run(*arguments: object, **options: object):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments], **options)


def library(model_dir, prompt, **options):
    return cadre.generate(*cadre.load(model_dir), prompt, **options)


def test_prints_the_continuation_and_nothing_else(model_dir):
    result = run(model_dir, "The people", "--max-tokens", 20, "--seed", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout == library(model_dir, "The people", max_new_tokens=20, seed=4) + "\n"


def test_json_is_one_object(model_dir):
    result = run(model_dir, "é", "--max-tokens", 20, "--seed", 4, "--json")
    assert json.loads(result.stdout) == {"prompt": "é", "text": library(model_dir, "é", max_new_tokens=20, seed=4)}


def test_options_reach_the_sampling(model_dir):
    options = ["--temperature", 1.7, "--top-p", 0.5, "--top-k", 7, "--seed", 1, "--max-tokens", 30]
    text = library(model_dir, "yes", temperature=1.7, top_p=0.5, top_k=7, seed=1, max_new_tokens=30)
    assert run(model_dir, "yes", *options).stdout == text + "\n"
    for left_out in ({"top_k": 7}, {"top_p": 0.5}):
        assert library(model_dir, "yes", temperature=1.7, **left_out, seed=1, max_new_tokens=30) != text
    stopped = run(model_dir, "yes", *options, "--stop", "nowhere", "--stop", text[4:6])
    assert stopped.stdout == text.partition(text[4:6])[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["the union " * 60], r"the prompt has \d+ tokens, but the model's context is 64"),
        (["yes", "--temperature", -1], "temperature is -1.0"),
        (["yes", "--top-p", 2], "top_p is 2.0"),
        (["yes", "--top-k", -3], "top_k is -3"),
        (["yes", "--stop", ""], "stop string is empty"),
        (["yes", "--seed", -1], "seed is -1"),
    ],
)
def test_bad_input_is_a_usage_error_and_prints_nothing(model_dir, arguments, message):
    result = run(model_dir, *arguments)
    assert isinstance(result.exception, UsageError)
    assert result.stdout == ""
    with pytest.raises(UsageError, match=message):
        raise result.exception


def test_a_prompt_from_standard_input(model_dir):
    assert run(model_dir, "-", "--seed", 4, input="The people").stdout == run(model_dir, "The people", "--seed", 4).stdout
    refused = run(model_dir, "-", input=b"caf\xe9").exception
    assert isinstance(refused, UsageError) and str(refused) == "standard input is not UTF-8 (byte 0xe9)"


def test_a_prompt_from_a_folder(model_dir, monkeypatch):
    def read():
        raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, read=read))
    with pytest.raises(UsageError, match=r"^standard input: cannot be read \(Is a directory\)$"):
        generate(model_dir, "-")


def test_standard_output_may_be_closed(model_dir, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    generate(model_dir, "yes", max_tokens=2)


def test_a_text_that_the_tokenizer_has_no_tokens_for(model_dir, tmp_path):
    model, _ = cadre.load(model_dir)
    cadre.save(model, tmp_path / "m", Tokenizer(models.WordLevel({"yes": 0})))
    refused = run(tmp_path / "m", "no").exception
    assert isinstance(refused, UsageError) and str(refused).startswith("the tokenizer cannot encode the prompt (WordLevel ")


def test_no_tokens_to_generate_is_bad_usage(model_dir):
    assert run(model_dir, "yes", "--max-tokens", 0).exit_code == 2


def test_a_directory_that_is_no_model(tmp_path):
    assert "is no model directory" in str(run(tmp_path, "yes").exception)


@pytest.mark.parametrize("content", ["[" * 200_000, "[]", "{"])
def test_a_damaged_config_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    refused = run(tmp_path, "yes").exception
    assert isinstance(refused, UsageError)
    assert str(refused).startswith(str(tmp_path / "config.json")) and "\n" not in str(refused)


def test_a_model_without_a_tokenizer(tmp_path):
    cadre.save(Transformer(small("llama")).initialize(0), tmp_path / "m")
    result = run(tmp_path / "m", "yes")
    assert isinstance(result.exception, UsageError)
    assert "has no tokenizer.json" in str(result.exception)


@pytest.mark.parametrize(
    ("compiles", "missing", "told"),
    [
        (False, None, ""),
        (True, None, "compiling the C++ kernels for this machine, once: about half a minute\n"),
        (False, "no compiler", "C++ kernels are missing, all is slower: no compiler\n"),
    ],
)
def test_the_state_of_the_kernels_is_told_on_standard_error(model_dir, compiles, missing, told, monkeypatch):
    monkeypatch.setattr("cadre.kernels.native.library.must_compile", lambda: compiles)
    monkeypatch.setattr("cadre.kernels.native.library.why_missing", lambda: missing)
    result = run(model_dir, "the", "--max-tokens", 2, "--seed", 1)
    assert result.exit_code == 0
    assert result.stderr == told
