"""A run of a study: what it leaves, that it times only steps, and that a killed one goes on as if nothing had been."""

import json
import subprocess
import sys
import time

import pytest

from cadre.errors import DivergedError, RunError
from cadre.study import worker
from cadre.study.jobs import plan_jobs, recipe_of
from cadre.study.match import match
from cadre.study.spec import read_study
from cadre.study.worker import read_curve
from cadre.train import trainer
from cadre.train.checkpoint import checkpoints, read_state
from cadre.train.metrics import read_metrics
from tests.study.studies import write_study


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Recipe files of a run of each arm, 40 steps."""
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer, "gemm_flops_per_second", lambda *_: 1e11)
    study, _ = read_study(str(write_study(tmp_path)))
    arms = match(study, study.base_recipe(), 300)
    files = {}
    for job in plan_jobs(study, arms, {"dense": 0.01, "experts": 0.01}, 1.0)[4:6]:
        arm = next(arm for arm in arms if arm.name == job.arm)
        recipe = recipe_of(job, arm.recipe, 1.0, 5, "float32")
        recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 5})})
        files[job.arm] = tmp_path / f"{job.arm}.toml"
        files[job.arm].write_text(recipe.to_toml())
    return files


def test_a_run_leaves_its_times_curve_and_result(recipes, tmp_path, capsys):
    assert worker.main([str(recipes["experts"]), str(tmp_path / "run"), "run", "1"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["diverged"]) == (40, None)
    curve = read_curve(tmp_path / "run")
    assert [step for step, _ in curve] == [8, 16, 24, 32, 40]
    assert curve[-1][1] < curve[0][1]
    finals = [record["bits_per_byte"] for record in read_metrics(tmp_path / "run") if record.get("final")]
    assert finals == [result["bits_per_byte"]]
    (accepted,) = result["acceptance"]
    assert 0 < accepted <= 1
    assert result["drafting"].keys() == {"plain", "drafted"} and min(result["drafting"].values()) > 0
    # Steps alone: less than the run's clock, which holds six evaluations.
    assert 0 < result["wall_seconds"] < result["seconds"]
    assert result["cpu_seconds"] > 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[-1].get("note", "").startswith("finished") and any("loss" in record for record in said)
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_sweeps_run_ends_with_the_short_evaluation(recipes, tmp_path):
    assert worker.main([str(recipes["dense"]), str(tmp_path / "run"), "sweep", "1"]) == 0
    assert not any(record.get("final") for record in read_metrics(tmp_path / "run"))
    assert read_curve(tmp_path / "run")[-1][0] == 40


def test_a_killed_run_goes_on_as_if_nothing_had_been(recipes, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert worker.main([str(recipes["dense"]), str(whole), "run", "1"]) == 0
    command = [sys.executable, "-m", "cadre.study.worker", str(recipes["dense"]), str(broken), "run", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(broken.glob("checkpoints/step-*")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (broken / "result.json").exists()
    before = read_state(checkpoints(broken)[-1])
    assert worker.main([str(recipes["dense"]), str(broken), "run", "1"]) == 0
    assert read_curve(broken) == read_curve(whole)
    result = json.loads((broken / "result.json").read_text())
    # The steps before the end count too.
    assert all(0 < before[kind] < result[kind] for kind in ("wall_seconds", "cpu_seconds"))


def test_an_end_without_a_result_is_caught_up(recipes, tmp_path):
    run = tmp_path / "run"
    assert worker.main([str(recipes["dense"]), str(run), "run", "1"]) == 0
    before = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    assert worker.main([str(recipes["dense"]), str(run), "run", "1"]) == 0
    after = json.loads((run / "result.json").read_text())
    assert after["bits_per_byte"] == before["bits_per_byte"] and after["wall_seconds"] == before["wall_seconds"]
    last = [record.get("final") for record in read_metrics(run) if record["step"] == 40 and "bits_per_byte" in record]
    assert last == [False, True]  # what was scored again is told once
    # And one that is done is not begun again.
    stamp = (run / "result.json").stat().st_mtime_ns
    assert worker.main([str(recipes["dense"]), str(run), "run", "1"]) == 0
    assert (run / "result.json").stat().st_mtime_ns == stamp


def test_leavings_of_a_start_that_died_are_cleared(recipes, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.toml.1.partial").write_text("half")
    assert worker.main([str(recipes["dense"]), str(tmp_path / "run"), "sweep", "1"]) == 0


def test_divergence_is_a_result_and_other_failures_are_not(recipes, tmp_path, monkeypatch, capsys):
    def fail(error):
        def train(self):
            raise error

        monkeypatch.setattr(worker.Trainer, "train", train)

    fail(DivergedError("x: the loss was not finite in 5 steps in a row"))
    assert worker.main([str(recipes["dense"]), str(tmp_path / "a"), "run", "1"]) == 0
    assert "not finite" in json.loads((tmp_path / "a" / "result.json").read_text())["diverged"]
    fail(RunError("x: the disk is full"))
    assert worker.main([str(recipes["dense"]), str(tmp_path / "b"), "run", "1"]) == 1
    assert "the disk is full" in capsys.readouterr().err and not (tmp_path / "b" / "result.json").exists()
