"""Commands that train by themselves, with several processes: a comparison, and a budget with a recipe and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cadre.train.metrics import read_metrics
from cadre.train.recipe import read_recipe
from tests.runs import write_recipe
from tests.study.studies import write_study

PATIENCE = 600


def cadre(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CADRE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cadre", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_a_comparison_trains_every_run_with_two_processes(tmp_path):
    study = write_study(tmp_path, ("seeds = [0, 1]", "seeds = [0]"), ("factors = [1.0, 3.0]", "factors = [1.0]"))
    ended = cadre(tmp_path, "compare", str(study), "--out", "out", "--nproc", "2", "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["complete"] and found["runs_done"] == 2
    for arm in ("dense", "experts"):
        run = tmp_path / "out" / "runs" / f"{arm}-seed0"
        assert list((run / "checkpoints").glob("step-*/shard-00002-*"))  # the second process's part
        result = json.loads((run / "result.json").read_text())
        assert result["steps"] == 40 and result["cpu_seconds"] > 0 and found["arms"][arm]["step_seconds"] > 0
    assert len(json.loads((tmp_path / "out" / "runs" / "experts-seed0" / "result.json").read_text())["acceptance"]) == 1
    refused = cadre(tmp_path, "compare", "--out", "out", "--nproc", "4")
    assert refused.returncode == 2 and "began with --nproc 2" in refused.stderr


def test_arms_that_processes_cannot_share_are_refused_before_anything_is_prepared(tmp_path):
    ended = cadre(tmp_path, "compare", str(write_study(tmp_path)), "--out", "out", "--nproc", "3")
    assert ended.returncode == 2 and "--nproc 3, arm dense: train.batch is 4, which 3 processes" in ended.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("budget, recipe", [("20s", True), ("2e8flops", True), ("4e11flops", False)])
def test_a_budget_is_kept_by_two_processes(tmp_path, budget, recipe):
    written = str(write_recipe(tmp_path))
    given = [written] if recipe else ["--set", "data.source=corpus", "--set", "data.vocab_size=300"]
    ended = cadre(tmp_path, "train", *given, "--budget", budget, "--nproc", "2", "--out", "run")
    assert ended.returncode == 0, ended.stderr
    last = read_metrics(tmp_path / "run")[-1]
    assert last["event"] == "finished" and last["step"] > 1
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/shard-00002-*"))
    if not budget.endswith("flops"):
        # A machine that has other work may pause the last step and the evaluation.
        assert max(record.get("seconds", 0) for record in read_metrics(tmp_path / "run")) < 1.5 * float(budget[:-1])
    if not recipe:
        chosen = read_recipe(str(tmp_path / "run.toml"))
        assert chosen.train.batch % 2 == 0 and chosen.train.steps == last["step"] and "chosen for 4e11flops" in ended.stdout
