import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import cadre
from cadre.cli.evaluate import evaluate
from cadre.data.prepare import prepare
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError
from cadre.kernels.native.library import own_products_faster
from cadre.model.scoring import token_nats
from cadre.model.transformer import Transformer
from cadre.train.recipe import read_recipe
from cadre.train.run import start
from cadre.train.trainer import Silent, Trainer
from tests.runs import write_recipe
from tests.shapes import small

APP = typer.Typer()
APP.command()(evaluate)
ONE = "The people of the naïve union answered 😀: yes.\n" * 5
TWO = "And then?\nNothing followed.\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "one.txt").write_text(ONE)
    with gzip.open(tmp_path / "two.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in (TWO, ONE, TWO))
    return [tmp_path / "one.txt", tmp_path / "two.jsonl.gz"]


def run(*arguments: object):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def expected_nats(model_dir, text, context, stride):
    loaded, tokenizer = cadre.load(model_dir)
    return float(token_nats(loaded, tokenizer.encode(text).ids, first=1, context=context, stride=stride).sum())


@pytest.mark.parametrize("options", [(), ("--context", 16), ("--context", 16, "--stride", 3)])
def test_json_has_every_file_and_the_whole(model_dir, files, options):
    result = run(model_dir, "--data", files[0], "--data", files[1], "--json", *options)
    assert result.exit_code == 0, result.output
    score = json.loads(result.stdout)
    context, stride = {0: (64, 32), 2: (16, 8), 4: (16, 3)}[len(options)]
    assert score.keys() == {"bits_per_byte", "bytes", "tokens", "files"}
    assert [file["path"] for file in score["files"]] == [str(file) for file in files]
    nats = [sum(expected_nats(model_dir, text, context, stride) for text in texts) for texts in ([ONE], [TWO, ONE, TWO])]
    for file, texts, expected in zip(score["files"], ([ONE], [TWO, ONE, TWO]), nats, strict=True):
        assert file.keys() == {"path", "bytes", "tokens", "bits_per_byte"}
        assert file["bytes"] == sum(len(text.encode()) for text in texts)
        assert math.isclose(file["bits_per_byte"], expected / math.log(2) / file["bytes"], rel_tol=1e-4)
    for name in ("bytes", "tokens"):
        assert score[name] == sum(file[name] for file in score["files"])
    assert math.isclose(score["bits_per_byte"], sum(nats) / math.log(2) / score["bytes"], rel_tol=1e-4)


@pytest.mark.parametrize("ours", [True, False])
def test_weights_of_bfloat16_score_as_their_values_do(model_dir, files, tmp_path, monkeypatch, ours):
    """By our products or by torch's in bfloat16."""
    ours = ours and own_products_faster(narrow=True)
    monkeypatch.setattr("cadre.kernels.limits.products_keep_up", lambda: ours)
    chosen, compute_in = [], Transformer.compute_in
    monkeypatch.setattr(Transformer, "compute_in", lambda model, dtype: chosen.append(dtype) or compute_in(model, dtype))
    loaded, tokenizer = cadre.load(model_dir)
    for name, dtype in (("narrow", torch.bfloat16), ("wide", torch.float32)):
        cadre.save(loaded.to(dtype), tmp_path / name, tokenizer)
    narrow, wide = (json.loads(run(tmp_path / name, "--data", *files, "--json").stdout) for name in ("narrow", "wide"))
    assert chosen == ([torch.bfloat16] if ours else [])
    assert cadre.load(tmp_path / "narrow")[0].embed_tokens.weight.dtype == torch.bfloat16
    assert math.isclose(narrow["bits_per_byte"], wide["bits_per_byte"], rel_tol=0.01)


def test_files_after_one_data_option_and_folders(model_dir, files):
    apart = run(model_dir, "--data", files[0], "--data", files[1], "--json").stdout
    assert run(model_dir, "--data", *files, "--json").stdout == apart
    assert run(model_dir, "--data", files[0].parent, "--json").stdout == apart


def test_plain_output_names_files_and_overall(model_dir, files):
    lines = run(model_dir, "--data", *files).stdout.splitlines()
    score = json.loads(run(model_dir, "--data", *files, "--json").stdout)
    assert [line.split()[-1] for line in lines] == [*map(str, files), "overall"]
    for line, part in zip(lines, [*score["files"], score], strict=True):
        assert line.startswith(f"{part['bits_per_byte']:.4f} bits per byte")
        assert f"{part['bytes']:,} bytes" in line and f"{part['tokens']:,} tokens" in line


def test_bytes_do_not_depend_on_the_tokenizer(model_dir, files, tmp_path):
    other = tmp_path / "other"
    cadre.save(Transformer(small("llama", vocab_size=300, eos_token_id=1)).initialize(0), other, train_tokenizer([ONE], 262))
    scores = [json.loads(run(path, "--data", *files, "--json").stdout) for path in (model_dir, other)]
    assert scores[0]["bytes"] == scores[1]["bytes"] and scores[0]["tokens"] != scores[1]["tokens"]


def test_text_that_cannot_be_read(model_dir, tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\0\1")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" ")
    wrong = {"absent.txt": "no such file", "binary.txt": "binary", "latin.txt": "not UTF-8", "empty.txt": "empty"}
    for name, message in wrong.items():
        result = run(model_dir, "--data", tmp_path / name, "--json")
        assert isinstance(result.exception, UsageError) and message in str(result.exception)
        assert result.stdout == ""


def test_windows_out_of_range(model_dir, files):
    assert "context is 65; it must be from 1 to 64" in str(run(model_dir, "--data", files[0], "--context", 65).exception)
    assert "stride is 9" in str(run(model_dir, "--data", files[0], "--context", 8, "--stride", 9).exception)


def test_without_data_a_model_that_is_no_run_is_refused(model_dir, tmp_path):
    assert "is no run with text held out: say with --data what to read" in str(run(model_dir).exception)
    assert "no such file or folder" in str(run(tmp_path / "absent").exception)


def test_a_run_is_scored_on_what_it_held_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path)
    source = json.loads(re.search(r"source = (.*)", recipe.read_text())[1])
    made = start(read_recipe(str(recipe)), tmp_path / "run", torch.device("cpu"), lambda line: None)
    trained = Trainer(made, Silent()).train()
    result = run(tmp_path / "run", "--json", "--context", "16", "--stride", "8")
    assert json.loads(result.stdout)["bits_per_byte"] == pytest.approx(trained.bits_per_byte)
    assert result.stderr == ""
    assert run(tmp_path / "run" / "model", "--json", "--context", "16", "--stride", "8").stdout == result.stdout
    monkeypatch.chdir(tmp_path / "run" / "model")
    assert run(".", "--json", "--context", "16", "--stride", "8").stdout == result.stdout
    for part in (source, next(str(file) for file in Path(source).iterdir())):
        own = run(tmp_path / "run", "--data", part)
        assert f"was trained on {part}: leave --data out to score what it held out" in own.stderr


def test_a_run_whose_text_is_another_by_now_is_not_scored_on_what_it_was_trained_on(tmp_path):
    made = start(read_recipe(str(write_recipe(tmp_path)), ["train.steps=1"]), tmp_path / "run", torch.device("cpu"), print)
    Trainer(made, Silent()).train()
    assert run(tmp_path / "run").exit_code == 0
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text("")  # the model can be scored without it
    assert run(tmp_path / "run").exit_code == 0
    (newest / "state.json").write_text(state)
    (tmp_path / "corpus" / "more.txt").write_text("One more document.")
    result = run(tmp_path / "run")
    assert isinstance(result.exception, UsageError)
    assert "its text is not the one that it was trained on" in str(result.exception)


def test_a_run_on_prepared_text_of_which_nothing_is_held_out_needs_data(tmp_path):
    recipe = write_recipe(tmp_path)
    prepare(str(tmp_path / "corpus"), vocab_size=300, out=tmp_path / "shards", held_out=0.0)
    asked = [f"data.source={json.dumps(str(tmp_path / 'shards'))}", "train.steps=1"]
    Trainer(start(read_recipe(str(recipe), asked), tmp_path / "run", torch.device("cpu"), print), Silent()).train()
    assert "the run held no text out: say with --data what to read" in str(run(tmp_path / "run").exception)


def test_a_tokenizer_that_drops_letters_is_named(tmp_path, files):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "the": 2, "people": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["[UNK]", "</s>"])
    model = Transformer(small("llama", vocab_size=300, eos_token_id=1)).initialize(0)
    cadre.save(model, tmp_path / "words", words)
    said = run(tmp_path / "words", "--data", files[0]).stderr
    assert re.search(r"note: the tokenizer gives back \d+\.\d% of the text's letters", said)


def test_a_broken_model_fails_clearly(files, tmp_path):
    broken = Transformer(small("llama", vocab_size=300, eos_token_id=1)).initialize(0)
    broken.norm.weight.data = torch.full_like(broken.norm.weight, 3e38)
    cadre.save(broken, tmp_path / "broken", train_tokenizer([ONE], 262))
    result = run(tmp_path / "broken", "--data", files[0], "--json")
    assert isinstance(result.exception, RunError) and "not finite" in str(result.exception)
