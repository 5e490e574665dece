from __future__ import annotations

import json
import shutil

import pytest
import typer
from typer.testing import CliRunner

import cadre
from cadre.cli.routes import routes
from cadre.errors import RunError, UsageError
from cadre.model.transformer import Transformer
from cadre.train.recipe import read_recipe
from cadre.train.report import NO_ROUTES_YET
from tests.runs import write_recipe
from tests.shapes import small

APP = typer.Typer()
APP.command()(routes)


def run(*arguments: object):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"The people of the union answered {name}: yes.\n" * 20)
    return [tmp_path / "one.txt", tmp_path / "two.txt"]


@pytest.fixture
def run_dir(tmp_path, model_dir):
    """A run directory as training leaves it: recipe, model, and a report that waits for its link."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.toml").write_text(read_recipe(str(write_recipe(tmp_path))).to_toml())
    (path / "model").symlink_to(model_dir)
    (path / "report.html").write_text(f"<p>{NO_ROUTES_YET}</p>")
    return path


def test_json_says_who_got_what(model_dir, text):
    result = run(model_dir, "--data", *text, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"] == "m" and found["documents"] == 2 and found["complete"]
    assert [group["name"] for group in found["groups"]] == ["one.txt", "two.txt"]
    assert sum(group["tokens"] for group in found["groups"]) == found["tokens"]
    (layer,) = found["layers"]
    assert layer["layer"] == 1 and len(layer["experts"]) == 6 and sum(layer["load"]) == pytest.approx(1, abs=1e-4)
    assert any(expert["tokens"] and expert["contexts"] for expert in layer["experts"])
    few = json.loads(run(model_dir, "--data", *text, "--json", "--max-tokens", 50).stdout)
    assert 25 <= few["tokens"] <= 50


def test_a_page_goes_where_it_is_asked_to(model_dir, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(model_dir, "--data", *text)
    assert result.exit_code == 0 and result.stdout.startswith("routes.html: 1 x 6 experts on ")
    assert "Expert 5" in (tmp_path / "routes.html").read_text(encoding="utf-8")
    result = run(model_dir, "--data", text[0], "--json", "--out", tmp_path / "x.html")
    assert json.loads(result.stdout)["documents"] == 1 and (tmp_path / "x.html").stat().st_size > 5000


def test_a_run_reads_its_held_out_text_and_its_report_links_to_the_page(run_dir, tmp_path, monkeypatch):
    result = run(run_dir)
    assert result.exit_code == 0, result.output
    page = (run_dir / "routes.html").read_text(encoding="utf-8")
    assert "its held-out text" in page and "What the experts of run took up" in page
    assert (run_dir / "report.html").read_text().count('href="routes.html"') == 1
    shutil.copytree(run_dir / "model", run_dir / "best")
    assert json.loads(run(run_dir / "best", "--json").stdout)["model"] == "run"  # of the same text
    monkeypatch.chdir(tmp_path)
    assert run(run_dir / "best").stdout.startswith("routes.html: ")  # not in the place of the last model's
    assert (run_dir / "routes.html").read_text(encoding="utf-8") == page


def test_a_page_elsewhere_is_no_part_of_the_run(run_dir, text, tmp_path):
    run(run_dir, "--data", text[0], "--out", tmp_path / "elsewhere.html")
    assert NO_ROUTES_YET in (run_dir / "report.html").read_text()


def test_bad_input_is_one_line(model_dir, text, tmp_path):
    for arguments, words in (
        ([model_dir], "is no run with text held out: say with --data what to read"),
        ([model_dir, "--data", tmp_path / "absent.txt"], "absent.txt: no such file"),
        ([tmp_path, "--data", text[0]], "is no model directory"),
        *(
            ([model_dir, "--data", text[0], "--out", out], f"--out {out or '.'}: is a folder; give a file, such as")
            for out in ("", ".", "..", "/", str(tmp_path))
        ),
    ):
        error = run(*arguments).exception
        assert isinstance(error, UsageError) and words in str(error) and "\n" not in str(error)
    error = run(model_dir, "--data", text[0], "--out", tmp_path / "absent" / "x.html").exception
    assert isinstance(error, RunError) and "x.html: cannot be written" in str(error)


def test_a_dense_model_has_no_routes(text, tmp_path, model_dir):
    _, tokenizer = cadre.load(model_dir)
    cadre.save(Transformer(small("llama", vocab_size=300)).initialize(0), tmp_path / "dense", tokenizer)
    error = run(tmp_path / "dense", "--data", text[0]).exception
    assert isinstance(error, UsageError) and "is dense" in str(error)
