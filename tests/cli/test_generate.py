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
from cadre.infer import generate as module
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
    text = library(model_dir, "é", max_new_tokens=20, seed=4)
    assert json.loads(result.stdout) == {"prompt": "é", "text": text, "finish_reason": "length", "tokens": 20}


def test_json_tells_log_probabilities(model_dir):
    arguments = [model_dir, "The", "--max-tokens", 5, "--temperature", 0, "--json"]
    told = json.loads(run(*arguments, "--logprobs", 2).stdout)["logprobs"]
    assert len(told) == 5
    for token in told:
        assert token["top"][0] == {name: token[name] for name in ("id", "text", "logprob")}
        assert token["logprob"] >= token["top"][1]["logprob"]
    text = "".join(token["text"] for token in told).replace("<|bos|>", "")  # special tokens give no text
    assert text == json.loads(run(*arguments).stdout)["text"]
    assert "top" not in json.loads(run(*arguments, "--logprobs", 0).stdout)["logprobs"][0]


def test_penalties_and_constraints_reach_the_sampling(model_dir, tmp_path):
    options = dict(min_p=0.1, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    given = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    text = library(model_dir, "yes", seed=1, max_new_tokens=30, **options)
    assert run(model_dir, "yes", *given, "--seed", 1, "--max-tokens", 30).stdout == text + "\n"
    for name in options:
        left_out = {other: value for other, value in options.items() if other != name}
        assert library(model_dir, "yes", seed=1, max_new_tokens=30, **left_out) != text, name
    assert run(model_dir, "yes", "--regex", "(un|yes)").stdout in ("un\n", "yes\n")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "people"]}')
    assert json.loads(run(model_dir, "yes", "--json-schema", schema).stdout) in ("yes", "people")


PROMPTS = ["The people", "of the naïve union", "answered 😀: yes.", "yes", "union", "people of the", "the", "naïve"]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": each, "id": f"p{i}"}) for i, each in enumerate(PROMPTS)) + "\n\n")
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts(model_dir, tmp_path, asked):
    out = tmp_path / "new" / "out.jsonl"
    result = run(model_dir, "--prompts", asked, "--out", out, "--max-tokens", 9, "--seed", 3, "--logprobs", 1)
    assert result.exit_code == 0, result.output
    told = answers(out)
    assert result.stdout.startswith(f"{out}: 8 answers, {sum(each['tokens'] for each in told)} tokens in ")
    assert [each["text"] for each in told] == library(model_dir, PROMPTS, max_new_tokens=9, seed=3)
    assert [(each["index"], each["id"], each["prompt"]) for each in told] == [(i, f"p{i}", p) for i, p in enumerate(PROMPTS)]
    assert all(len(each["logprobs"]) == each["tokens"] for each in told)
    assert all((each["finish_reason"] == "length") == (each["tokens"] == 9) for each in told)


def test_lines_of_prompts(model_dir, tmp_path):
    path, out = tmp_path / "asked.txt", tmp_path / "out.jsonl"
    path.write_bytes(b"\xef\xbb\xbfThe people\r\n\n yes\n")  # as Windows' editors begin a file
    assert run(model_dir, "--prompts", path, "--out", out, "--max-tokens", 4, "--temperature", 0).exit_code == 0
    assert [each["prompt"] for each in answers(out)] == ["The people", " yes"]


@pytest.mark.parametrize("torn", [b"", b'{"index": 5, "prompt": "na\xc3'])
def test_an_interrupted_file_goes_on(model_dir, tmp_path, asked, monkeypatch, torn):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    arguments = [model_dir, "--prompts", asked, "--max-tokens", 9, "--seed", 3]
    run(*arguments, "--out", whole)
    complete = module.complete

    def stopped(engine, requests):
        for number, completion in enumerate(complete(engine, requests)):
            if number == 3:
                raise KeyboardInterrupt
            yield completion

    monkeypatch.setattr(module, "complete", stopped)
    ended = run(*arguments, "--out", out)
    assert ended.exit_code != 0
    assert f"3 of 8 answers are in {out}; the same command goes on" in ended.stderr
    assert len(answers(out)) == 3
    with out.open("ab") as file:
        file.write(torn)
    worked = []
    monkeypatch.setattr(module, "complete", lambda engine, requests: worked.extend(requests) or complete(engine, requests))
    again = run(*arguments, "--out", out)
    assert again.exit_code == 0 and "has 3 of 8 answers already, which stay" in again.stderr
    assert len(worked) == 5
    assert out.read_bytes() == whole.read_bytes()
    assert run(*arguments, "--out", out).exit_code == 0 and len(worked) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "yes\n", r"a\.csv: must end in \.txt .* or \.jsonl"),
        ("a.txt", "\n \n", r"a\.txt: holds no prompt"),
        ("a.txt", "yes\n" + "the union " * 60, r"^prompt 2 of 2: the prompt has \d+ tokens, but the model's context is 64"),
        ("a.jsonl", '{"prompt": "a"}\n{', r"a\.jsonl, line 2: is not valid JSON"),
        ("a.jsonl", '\n["a"]', r"a\.jsonl, line 2: holds list, not a JSON object"),
        ("a.jsonl", '{"promt": "a"}', r"a\.jsonl, line 1: needs a field prompt that is a text"),
        ("a.jsonl", '{"prompt": "a", "text": "b"}', r"a\.jsonl, line 1: has a field text, which answers get"),
        ("a.jsonl", '{"prompt": "a", "note": "\\ud83d"}', r"a\.jsonl, line 1: is not valid JSON"),
        ("a.txt", None, r"a\.txt: cannot be read \(No such file"),
    ],
)
def test_bad_files_of_prompts(model_dir, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    refused = run(model_dir, "--prompts", tmp_path / name, "--out", tmp_path / "out.jsonl").exception
    assert isinstance(refused, UsageError)
    with pytest.raises(UsageError, match=message):
        raise refused
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_to_other_prompts_are_not_mixed_in(model_dir, tmp_path, asked):
    out = tmp_path / "out.jsonl"
    for line in ('{"index": 0, "prompt": "another"}\n', '{"index": 8, "prompt": "yes"}\n', '{"a": 1}\n', "[\n[\n"):
        out.write_text(line)
        refused = run(model_dir, "--prompts", asked, "--out", out).exception
        assert isinstance(refused, UsageError) and str(refused).startswith(f"{out}, line 1: is no")
        assert out.read_text() == line
    assert "is the file of prompts" in str(run(model_dir, "--prompts", asked, "--out", asked).exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a PROMPT to continue, or --prompts FILE"),
        (["yes", "--prompts", "a.txt", "--out", "b.jsonl"], "one of them"),
        (["--prompts", "a.txt"], "--prompts FILE and --out FILE go together"),
        (["yes", "--out", "b.jsonl"], "--prompts FILE and --out FILE go together"),
        (["--prompts", "a.txt", "--out", "b.jsonl", "--json"], "--json is for one PROMPT"),
        (["yes", "--logprobs", 1], "--logprobs are told with --json, or in --out"),
        (["yes", "--json-schema", "nowhere.json"], "nowhere.json: no such file"),
        (["yes", "--regex", "("], "regex cannot be used"),
    ],
)
def test_options_that_do_not_go_together(model_dir, arguments, message):
    refused = run(model_dir, *arguments).exception
    assert isinstance(refused, UsageError) and message in str(refused)


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
