from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cadre.errors import RunError, UsageError
from cadre.train.parallel import launch as launch_module
from cadre.train.parallel.launch import _cause, joined, launch
from cadre.train.parallel.ranks import Ranks
from cadre.train.recipe import read_recipe
from cadre.train.run import start
from tests.runs import write_recipe
from tests.train.parallel.world import world


def test_what_a_process_knows_of_its_launch(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "CADRE_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    assert not launch_module.by_torchrun() and not launch_module.may_resume_existing()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launch_module.by_torchrun() and launch_module.may_resume_existing()  # a count of restarts is one machine's alone
    monkeypatch.setenv("CADRE_LAUNCHED", "1")
    assert not launch_module.by_torchrun() and not launch_module.may_resume_existing()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch_module.may_resume_existing()


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40000"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("pair closure"), False),
    ],
)
def test_the_end_of_the_others_is_told_from_a_fault_of_ones_own(error, lost):
    assert launch_module._lost(error) == lost


def test_machines_that_could_not_start_again_together_say_so(monkeypatch):
    several = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in launch_module.without_restarts()
    for name, value in (
        ("GROUP_WORLD_SIZE", "1"),
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert launch_module.without_restarts() is None


DONE = launch_module._DONE
GONE = "rank 0 lost the other processes: the process of rank 1 is gone"


@pytest.mark.parametrize("told, why", [
    ({0: GONE, 1: None}, "rank 1 ended without a word"),
    ({0: GONE, 1: GONE}, GONE),
    ({0: None, 1: DONE}, "rank 0 ended without a word"),
    ({0: GONE, 1: "rank 1: the disk is full"}, "rank 1: the disk is full"),
    ({}, "nobody knows why"),
])  # fmt: skip
def test_who_is_started_again_knows_why(tmp_path, monkeypatch, told, why):
    for rank, message in told.items():
        file = tmp_path / "attempt_1" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        if message == DONE:
            file.with_name(DONE).touch()
        elif message is not None:
            file.write_text(json.dumps({"message": message, "timestamp": 0}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_2" / "0" / "error.json"))
    monkeypatch.delenv("CADRE_LAUNCHED", raising=False)
    assert launch_module.started_again() is None
    monkeypatch.setenv("CADRE_LAUNCHED", "1")
    assert launch_module.started_again() == f"started again: {why}"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert launch_module.started_again() is None


def failure(exitcode: int, told: str = "<NONE>", timestamp: int = 100) -> Any:
    name = signal.Signals(-exitcode).name if exitcode < 0 else "<N/A>"
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, error_file_data={"message": told}, signal_name=lambda: name)


LOST = "rank 0 lost the other processes: Connection closed by peer"


@pytest.mark.parametrize("failures, kind, message", [
    # Killed; the other noticed at once, and may be found first.
    ({0: failure(75, LOST), 1: failure(-9)}, RunError, "rank 1 was ended by SIGKILL"),
    ({0: failure(-11), 1: failure(75, LOST)}, RunError, "rank 0 was ended by SIGSEGV; what it printed is in logs"),
    # An error of one, after which the agent ended the other.
    ({0: failure(2, "train.batch is 3"), 1: failure(-15)}, UsageError, "train.batch is 3"),
    ({0: failure(-15, timestamp=101), 1: failure(1, "rank 1: the disk is full")}, RunError, "rank 1: the disk is full"),
    ({0: failure(130), 1: failure(3)}, RunError, "rank 1 ended with status 3; what it printed is in logs"),
    # One hung: the other gave up, and long after the agent had to kill it.
    ({0: failure(75, LOST), 1: failure(-9, timestamp=130)}, RunError, f"rank 1 did not answer any more ({LOST})"),
    ({0: failure(75, LOST)}, RunError, LOST),
])  # fmt: skip
def test_the_cause_is_the_failure_that_the_others_followed_from(failures, kind, message):
    cause = _cause(SimpleNamespace(failures=failures), Path("logs"))  # type: ignore[arg-type]
    assert (type(cause), str(cause)) == (kind, message)


def test_a_folder_for_logs_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cadre.train.parallel.launch.os.environ", {})
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"^--logs .*/file/logs: cannot be made"):
        launch(2, [], logs=tmp_path / "file" / "logs")


def test_a_process_that_nobody_started_is_alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(1.0) as (parallel, device):
        assert (parallel.rank, parallel.size, parallel.main, device.type) == (0, 1, True, torch.device(device).type)
        assert parallel.agree(2.5) == 2.5 and parallel.anyone(True) and not parallel.anyone(False)


@pytest.mark.parametrize("there, missing", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE, as in one of several processes, but not RANK, MASTER_ADDR, MASTER_PORT"),
    ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "but not MASTER_PORT: start them"),
])  # fmt: skip
def test_half_of_what_torchrun_sets_is_refused_by_name(monkeypatch, there, missing):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=missing), joined(1.0):
        pass


def in_turn(ranks: Ranks, folder: Path) -> str:
    said = "went on"
    try:
        with ranks.in_turn():
            if ranks.main:
                raise UsageError("no such text")
    except (UsageError, RunError) as error:
        said = str(error)
    ranks.anyone(False)  # the first keeps the store until the other has read it
    return said


def test_what_the_first_cannot_prepare_ends_all(tmp_path):
    assert world(2, in_turn, tmp_path) == ["no such text", "rank 0 could not prepare the run"]


def begin(ranks: Ranks, recipe: Path, out: Path, settings: list[list[str]]) -> str:
    try:
        start(read_recipe(str(recipe), settings[ranks.rank]), out, torch.device("cpu"), lambda line: None, ranks)
    except RunError as error:
        return str(error)
    return "began"


@pytest.mark.parametrize("setting, other", [
    ("optimizer.lr=0.01", "rank 1 was given optimizer.lr = 0.01, and rank 0 0.003"),
    ("train.seed=7", "rank 1 was given train.seed = 7, and rank 0 0"),
    ("model.n_routed_experts=8", "rank 1 was given model.n_routed_experts = 8, and rank 0 4"),
    ('data.source=["{corpus}/*.txt"]', None),
])  # fmt: skip
def test_machines_that_were_given_other_recipes_do_not_train(tmp_path, monkeypatch, setting, other):
    """Each would step with its own rate, from weights of its own seed, and nobody would notice."""
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    said = "began" if other is None else f"{other}: give all the same recipe"
    settings = [[], [setting.format(corpus=tmp_path / "corpus")]]
    assert world(2, begin, write_recipe(tmp_path), tmp_path / "run", settings) == [said] * 2


def sums(ranks: Ranks) -> tuple:
    counts, scale = torch.tensor([[1, 2], [3, 2**40]]), torch.tensor(0.5)
    ranks.add(counts, scale)
    first, any_one = ranks.agree(float(ranks.rank + 7)), ranks.anyone(ranks.rank == 1)
    return counts.tolist(), float(scale), first, any_one


def test_sums_and_agreements():
    assert world(2, sums) == [([[2, 4], [6, 2**41]], 1.0, 7.0, True)] * 2
