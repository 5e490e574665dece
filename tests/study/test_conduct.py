"""A whole study in this process: from its text to the report, interrupted and continued, and refused."""

import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cadre.errors import RunError, UsageError
from cadre.study import conduct as module
from cadre.study import decoding, turns, worker
from cadre.study import state as state_module
from cadre.study.conduct import Clock, begin, conduct, find
from cadre.study.spec import read_study
from cadre.study.state import open_state
from cadre.train import trainer
from tests.study.studies import InProcess, Notes, write_study

SECONDS = {"dense": 0.01, "experts": 0.02}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer, "gemm_flops_per_second", lambda *_: 1e11)
    monkeypatch.setattr(module, "subprocess", in_process(InProcess))
    monkeypatch.setattr(turns, "step_seconds", lambda recipes, *_, **__: {name: SECONDS[name] for name in recipes})
    return read_study(str(write_study(tmp_path)))


def in_process(popen):
    """What the study sees of `subprocess`, its processes run here and now."""
    return SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)


def started(study, path):
    return begin(study[0], study[1], path, quick=False, minutes=None, rent=3.6, cpu="a CPU", watch=Notes())


def test_another_text_comes_without_the_bases_weights(study, tmp_path):
    (tmp_path / "other.txt").write_text("Another text, of some words. " * 300)
    base = study[0].base_recipe()
    data = {**base.data.model_dump(exclude_none=True), "source": [str(tmp_path / "a.txt")] * 2, "weights": [1.0, 3.0]}
    mixed = study[0].model_copy(update={"recipe": {**study[0].recipe, "data": data}})
    source = [str(tmp_path / "other.txt")]
    state = begin(
        mixed, "", tmp_path / "out", quick=False, minutes=None, rent=3.6, cpu="a CPU", watch=Notes(), source=source
    )  # fmt: skip
    assert all(arm.recipe.data.source == source and arm.recipe.data.weights is None for arm in state.arms.values())


def test_a_study_runs_to_its_report_and_goes_on_where_it_was(study, tmp_path, monkeypatch):
    out, notes = tmp_path / "out", Notes()
    conduct_until(4, started(study, out), monkeypatch)
    done = sorted(path.parent.name for path in out.glob("*/*/result.json"))
    assert done == ["dense-x1", "dense-x3", "experts-x1", "experts-x3"]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}

    conduct(find(out, *study, False), notes)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    found = json.loads((out / "results.json").read_text())
    assert found["complete"] and found["runs_done"] == 8
    experts, dense = found["arms"]["experts"], found["arms"]["dense"]
    # The best factor of the sweep is what the runs were trained with.
    best = min(experts["sweep"], key=lambda point: point["bits_per_byte"])["factor"]
    assert experts["learning_rate_factor"] == best
    assert f"lr = {0.003 * best}" in (out / "runs" / "experts-seed1" / "recipe.toml").read_text()
    assert set(experts["curves"]) == {"0", "1"}
    # Seconds are steps times the time measured in turn, and the price follows: 3.6 dollars an hour are 0.001 a second.
    assert experts["seconds"] == pytest.approx(40 * 0.02) and experts["usd"] == pytest.approx(40 * 0.02 * 0.001)
    assert experts["curves"]["0"]["seconds"][-1] == pytest.approx(experts["seconds"])
    assert dense["curves"]["0"]["flops"][-1] == pytest.approx(dense["flops"])
    assert found["sooner"]["experts"]["dense"]["seeds"] == 2
    assert {(row["arm"], row["context"], row["batch"]) for row in found["decode"]} == {
        (arm, 8, batch) for arm in SECONDS for batch in (1, 2)
    }  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in found["decode"])
    assert found["verdict"]["headline"].startswith("The budget is too small to tell")
    page = (out / "report.html").read_text()
    assert found["verdict"]["headline"] in page and "experts" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for name in ("loss-flops.png", "loss-seconds.png", "decode.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert any("so far" in note for note in notes.notes) and any("left in all" in note for note in notes.notes)
    # Nothing is left to do: nothing is done again.
    monkeypatch.setattr(decoding, "decode_rates", None)
    conduct(open_state(out), Notes())


@pytest.mark.parametrize("content", ["[]", '{"format": 0}', "FORMAT", "{", '{"arms": 1}'])
def test_a_damaged_study_is_refused(tmp_path, content):
    content = content.replace("FORMAT", json.dumps({"format": state_module._FORMAT}))
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(UsageError, match=r"study.json: .*: choose another --out$"):
        open_state(tmp_path)


def conduct_until(runs, state, monkeypatch):
    """Conduct, and interrupt it in its run number `runs` + 1."""
    count = 0

    class Interrupted(InProcess):
        def __init__(self, command, **more):
            nonlocal count
            count += 1
            if count > runs:
                raise KeyboardInterrupt
            super().__init__(command, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "subprocess", in_process(Interrupted))
        with pytest.raises(KeyboardInterrupt):
            conduct(state, Notes())


def test_another_study_or_other_files_in_the_folder_are_refused(study, tmp_path):
    state = started(study, tmp_path / "out")
    with pytest.raises(UsageError, match="its text was another"):
        find(tmp_path / "out", study[0], "0" * 64, False)
    with pytest.raises(UsageError, match="began without --quick"):
        find(tmp_path / "out", *study, True)
    with pytest.raises(UsageError, match=r"began without --quick: .* leave --quick out"):
        find(tmp_path / "out", None, None, True)
    again = find(tmp_path / "out", None, None, False)
    assert again is not None and again.jobs == state.jobs and again.arms.keys() == state.arms.keys()
    assert again.arms["experts"].flops_per_token == state.arms["experts"].flops_per_token
    assert find(tmp_path / "none", *study, False) is None
    with pytest.raises(UsageError, match="holds other files"):
        started(study, tmp_path)


def test_a_stopped_run_interrupts_and_a_failed_one_is_named(study, tmp_path, monkeypatch):
    state = started(study, tmp_path / "out")
    monkeypatch.setattr(worker, "main", lambda arguments: worker.STOPPED)
    with pytest.raises(KeyboardInterrupt):
        conduct(state, Notes())
    monkeypatch.setattr(worker, "main", lambda arguments: 1)
    with pytest.raises(RunError, match=r"run sweep/dense-x1: its process died.*exit status 1"):
        conduct(state, Notes())


def test_a_run_that_dies_is_not_given_the_last_words_of_another_try(study, tmp_path, monkeypatch):
    state = started(study, tmp_path / "out")

    def reason(program):
        def dying(command, **options):
            return subprocess.Popen([sys.executable, "-c", program], **options)

        monkeypatch.setattr(module, "subprocess", in_process(dying))
        with pytest.raises(RunError) as caught:
            conduct(state, Notes())
        return str(caught.value)

    assert "run sweep/dense-x1: the disk is full (" in reason("import sys; sys.exit('a warning\\nthe disk is full')")
    killed = "import os, sys; print('a warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    for program in ("import sys; sys.exit(1)", killed):
        assert "run sweep/dense-x1: its process died, most likely for want of memory (" in reason(program)
    assert (tmp_path / "out/sweep/dense-x1.log").read_text() == "a warning\nthe disk is full\na warning\n"  # all of it is kept


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, TypeError])
def test_whatever_ends_a_study_ends_its_run(study, tmp_path, monkeypatch, error):
    state, processes = started(study, tmp_path / "out"), []

    def training(command, **options):
        endless = "import time; print('7\\n{\"step\": 1}', flush=True); time.sleep(600)"
        processes.append(subprocess.Popen([sys.executable, "-c", endless], **options))
        return processes[-1]

    class Gone(Notes):
        def moving(self, text):
            raise error

    monkeypatch.setattr(module, "subprocess", in_process(training))
    with pytest.raises(error):
        conduct(state, Gone())
    assert [process.poll() for process in processes] == [-signal.SIGTERM]


@pytest.mark.parametrize("slow, chosen", [(2.5, 1.0), (2.512, 1.0), (2.513, 3.0)])
def test_of_rates_that_are_level_in_the_sweep_the_lowest_is_trained_with(study, tmp_path, slow, chosen):
    state = started(study, tmp_path / "out")
    for job in state.jobs:
        folder = tmp_path / "out" / job.folder
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"diverged": None}))
        score = slow if job.factor == 1.0 else 2.5
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 20, "bits_per_byte": score, "final": False}) + "\n")
    assert state.factor(state.jobs[-1]) == chosen


def test_a_diverged_sweep_loses_and_a_diverged_run_is_left_out(study, tmp_path):
    state = started(study, tmp_path / "out")
    for job in state.jobs:
        folder = tmp_path / "out" / job.folder
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"diverged": "not finite" if job.factor != 1.0 else None}))
        (folder / "metrics.jsonl").write_text('{"step": 20, "bits_per_byte": 2.5, "final": false}\n')
    assert state.sweep("dense") == {1.0: 2.5, 3.0: None}
    assert state.factor(state.jobs[-1]) == 1.0
    from cadre.study.results import results

    found = results(state)
    assert found["arms"]["dense"]["bits_per_byte"] is None
    assert [run["seed"] for run in found["arms"]["dense"]["diverged"]] == [0, 1]


def test_held_out_text_is_needed(study, tmp_path):
    text = write_study(tmp_path, ("held_out = 0.1", "held_out = 0.0"))
    with pytest.raises(UsageError, match="leaves nothing to compare by"):
        started(read_study(str(text)), tmp_path / "out")


def test_time_left_follows_what_steps_take_now(study, tmp_path):
    state = started(study, tmp_path / "out")
    clock = Clock(state)
    before = clock.seconds()
    clock.heard("dense", 0.03)
    assert clock.seconds() - before == pytest.approx(2 * sum(job.steps * SECONDS[job.arm] for job in state.jobs))
    for job in state.jobs:
        clock.done(job)
    assert clock.seconds() == pytest.approx(40)


def test_time_left_knows_what_an_unfinished_run_has_saved(study, tmp_path):
    state = started(study, tmp_path / "out")
    whole, run = Clock(state).seconds(), state.jobs[-1]
    folder = tmp_path / "out" / run.folder / "checkpoints"
    for step in (4, 12):
        (folder / f"step-{step:08d}").mkdir(parents=True)
    clock = Clock(state)
    assert whole - clock.seconds() == pytest.approx(12 * SECONDS[run.arm])
    # At work it is where it says, and what it had saved counts once.
    assert whole - clock.seconds(run, 15) == pytest.approx(15 * SECONDS[run.arm])
    other = state.jobs[0]
    assert whole - clock.seconds(other, 5) == pytest.approx(12 * SECONDS[run.arm] + 5 * SECONDS[other.arm])
    clock.done(run)
    assert clock.seconds() == pytest.approx(Clock(state).seconds() - (run.steps - 12) * SECONDS[run.arm]
                                            - 12.0 - clock.evaluation[run.arm])  # fmt: skip
