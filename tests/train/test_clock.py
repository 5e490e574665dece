"""Runs that the clock ends: in time, with their schedule, and what of the time evaluation takes."""

import json
import time

import pytest

from cadre.train import objective
from cadre.train.checkpoint import checkpoints, read_state
from cadre.train.evaluation import Evaluation
from cadre.train.resume import FinishedError


@pytest.mark.parametrize("steps", [1000000, None])
def test_minutes_end_the_run_in_time_and_the_schedule_with_it(lab, steps):
    given = "" if steps is None else f"steps = {steps}\n"
    lab.recipe.write_text(lab.recipe.read_text().replace("steps = 12\n", given))
    run = lab.start("run", "train.minutes=0.04", "schedule.decay_share=0.5", "schedule.final=0.0",
                    "checkpoint.every=100000", "eval.every=100000")  # fmt: skip
    start = time.perf_counter()
    result, watcher = lab.train(run)
    assert time.perf_counter() - start < 0.04 * 60 + 2
    assert 20 < result.steps < 1000000 and result.stopped is None and result.bits_per_byte is not None
    assert result.seconds < 0.04 * 60 + 2
    assert watcher.totals[-1] == result.steps
    rates = [record["learning_rate"] for record in watcher.records if "learning_rate" in record]
    assert rates[-1] < 0.3 * max(rates)
    kept = read_state(checkpoints(run.path)[-1])
    assert (kept["total_steps"], kept["length"]) == (result.steps, [steps, 0.04])


def test_steps_the_clock_has_room_for_are_all_made(lab):
    result, _ = lab.train(lab.start("run", "train.minutes=60", "train.steps=30"))
    assert result.steps == 30


def test_steps_longer_than_the_budget_end_after_few(lab, monkeypatch):
    real = objective.losses
    monkeypatch.setattr(objective, "losses", lambda *a, **k: (time.sleep(0.15), real(*a, **k))[1])
    result, _ = lab.train(lab.start("run", "train.minutes=0.01", "train.log_every=100"))
    assert 1 <= result.steps <= 5


def test_a_run_whose_minutes_are_over_has_ended(lab):
    """They count from its start: a run must not begin a last step at the peak rate."""
    lab.train(lab.start("run", "train.minutes=0.02", "train.steps=1000000"))
    with pytest.raises(FinishedError, match=r"has taken 0\.0 minutes already, and 0\.0 are given in all"):
        lab.resume("run", "train.minutes=0.005")


def test_a_run_of_more_minutes_goes_on_where_its_schedule_is(lab):
    run = lab.start("run", "train.minutes=0.06", "train.steps=1000000", "train.log_every=1")
    lab.train(run)
    state = read_state(checkpoints(run.path)[-1])
    more = lab.resume("run", f"train.minutes={state['seconds'] / 60 * 1.08}", "train.log_every=1")
    assert state["step"] < more.total_steps <= state["step"] * 1.08
    _, watcher = lab.train(more)
    rates = [record["learning_rate"] for record in watcher.records if "learning_rate" in record]
    assert state["step"] > 20 and rates[0] < 0.6 * 0.003  # in the last part of its decay


def test_much_held_out_text_leaves_time_to_train(lab, monkeypatch):
    """The last evaluation takes a share of the minutes, whatever there is to read, and says so."""
    monkeypatch.setattr(Evaluation, "most_tokens", lambda evaluation, seconds: 250)
    result, watcher = lab.train(lab.start("run", "train.minutes=0.05", "train.steps=1000000", "data.held_out=0.5"))
    assert result.steps > 12
    assert any(note.startswith("in part the last evaluation reads 250 of") for note in watcher.notes)
    last = [record for record in watcher.records if "bits_per_byte" in record][-1]
    assert last["final"] and last["part"] == result.read_share < 1


def test_much_held_out_text_takes_no_more_than_its_share(lab):
    """Without an evaluation on the way, too."""
    text = lab.folder / "corpus" / "long.txt"
    text.write_text("the people of a nation and its house were here to see what old law had made " * 6000)
    run = lab.start("run", "train.minutes=0.05", "train.steps=1000000", "eval.every=1000000", "data.held_out=0.9")
    result, watcher = lab.train(run)
    last = [record for record in watcher.records if "bits_per_byte" in record]
    assert len(last) == 1 and last[0]["part"] == result.read_share < 1
    assert last[0]["eval_seconds"] < 0.5 * 0.05 * 60


def test_a_run_that_ended_by_the_clock_goes_on_when_given_more(lab):
    run = lab.start("run", "train.minutes=0.01", "train.steps=1000000")
    first, _ = lab.train(run)
    more = lab.resume("run", "train.minutes=0.02")
    assert more.total_steps == pytest.approx(2 * first.steps, rel=0.7)  # at the pace so far
    second, _ = lab.train(more)
    assert second.steps > first.steps and 0.01 * 60 * 0.8 < second.seconds < 0.02 * 60 + 2
    assert json.loads((checkpoints(run.path)[-1] / "state.json").read_text())["length"] == [1000000, 0.02]
