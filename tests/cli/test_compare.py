"""`cadre compare` as users run it: a first look, the whole study, interrupted and continued, and refused in one line."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cadre.cli import main as module
from cadre.study import conduct, turns
from cadre.train import trainer
from cadre.train.run import only_writer
from tests.runs import write_corpus
from tests.study.studies import InProcess, write_study


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """The command in this process, its runs too; its exit status."""
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "gemm_flops_per_second", lambda *_: 1e11)
    monkeypatch.setattr(turns, "step_seconds", lambda recipes, *_, **__: dict.fromkeys(recipes, 0.01))
    inside = SimpleNamespace(Popen=InProcess, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(conduct, "subprocess", inside)
    write_study(tmp_path, ("[1.0, 3.0]", "[1.0]"), ("seeds = [0, 1]", "seeds = [0]"), tokens=20 * 64)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cadre", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        return ended.value.code or 0

    return run


def test_a_first_look_then_the_study_by_its_folder_alone(compare, tmp_path, capsys):
    assert compare("tiny.toml", "--out", "race", "--dry-run", "--rent", "7.2") == 0
    shown = capsys.readouterr().out
    for part in ("moe_intermediate_size = ", "20 steps of 0.010 s", "2 of 2 runs to go, about ", "cadre compare --out race"):
        assert part in shown
    assert not (tmp_path / "race" / "report.html").exists()

    assert compare("--out", "race") == 0
    shown = capsys.readouterr().out
    for part in ("[1/2] dense, rates x 1, seed 0", "The budget is too small to tell", "report           race/report.html"):
        assert part in shown

    assert compare("--out", "race", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and found["rent_usd_per_hour"] == 7.2


def test_an_interrupted_study_says_how_to_go_on(compare, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conduct, "_train", interrupted)
        assert compare("tiny.toml", "--out", "race") == 130
    assert "interrupted; continue with: cadre compare --out race" in capsys.readouterr().out
    assert "Not finished: 0 of 2 runs are done." in (tmp_path / "race" / "report.html").read_text()


def test_quick_fits_the_study_into_its_minutes(compare, tmp_path, capsys):
    assert compare("tiny.toml", "--out", "race", "--quick", "--dry-run", "--json") == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert seconds == pytest.approx(1000 * 60, rel=0.02)
    assert compare("tiny.toml", "--out", "other", "--minutes", "30", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == pytest.approx(30 * 60, rel=0.02)


def test_other_text_takes_the_place_of_the_studys(compare, tmp_path, capsys):
    write_corpus(tmp_path / "more", documents=20, seed=1)
    assert compare("tiny.toml", "--out", "race", "--data", "corpus", "--data", "more", "--dry-run") == 0
    source = json.loads((tmp_path / "race" / "study.json").read_text())["arms"]["experts"]["recipe"]
    assert f'source = ["{tmp_path}/corpus", "{tmp_path}/more"]' in source
    assert compare("tiny.toml", "--out", "other", "--data", "nowhere") == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["moe-vs-dens"], "did you mean moe-vs-dense"),
        (["corpus"], "cannot be read"),
        (["tiny.toml", "--out", "tiny.toml"], "--out tiny.toml: is a file"),
        (["tiny.toml", "--out", "corpus"], "--out corpus: holds other files"),
        (["tiny.toml", "--out", "s3://x/y"], "s3://x/y: is an address; give a place on this machine"),
        (["tiny.toml", "--minutes", "0"], "--minutes 0: must be above 0"),
        (["tiny.toml", "--rent", "inf"], "--rent inf: must be above 0"),
        (["tiny.toml", "--minutes", "0.5"], "0.5 minutes are too few"),
        (["tiny.toml", "--speed"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_status_2(compare, tmp_path, capsys, arguments, said):
    assert compare(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("cadre: ") and error.count("\n") == 1 and said in error


def test_a_study_that_is_refused_leaves_no_folder(compare, tmp_path):
    assert compare("tiny.toml", "--out", "deep/race", "--minutes", "0.5") == 2
    assert not (tmp_path / "deep" / "race").exists()
    (tmp_path / "mine").mkdir()
    assert compare("tiny.toml", "--out", "mine", "--minutes", "0.5") == 2
    assert (tmp_path / "mine").is_dir()


def test_options_of_a_new_study_are_refused_for_one_that_has_begun(compare, capsys):
    assert compare("tiny.toml", "--out", "race", "--dry-run") == 0
    assert compare("--out", "race", "--minutes", "5") == 2
    assert "has begun; --minutes, --data and --rent are for a new one" in capsys.readouterr().err
    for arguments in (["tiny.toml"], []):
        assert compare(*arguments, "--quick", "--out", "race") == 2
        assert "began without --quick" in capsys.readouterr().err


def test_a_quick_study_goes_on_with_or_without_being_called_so(compare, capsys):
    assert compare("tiny.toml", "--out", "race", "--quick", "--dry-run") == 0
    assert compare("--out", "race", "--quick", "--dry-run") == 0
    assert compare("--out", "race", "--dry-run") == 0


def test_a_study_at_work_is_left_alone(compare, tmp_path, capsys):
    (tmp_path / "race").mkdir()
    with only_writer(tmp_path / "race"):
        assert compare("tiny.toml", "--out", "race", "--dry-run") == 2
    assert "--out race: another process conducts this study: wait for it or stop it" in capsys.readouterr().err
