"""What evaluations on the way are for: a loss that rises is said, and the best model stays beside the last."""

import math
from dataclasses import replace

import pytest
import torch

from cadre.hub.directory import set_aside
from cadre.hub.load import load
from cadre.model.scoring import Score
from cadre.train.checkpoint import checkpoints, read_state
from cadre.train.parallel.group import Parallel
from cadre.train.trainer import Trainer
from tests.train.conftest import interrupt


@pytest.mark.parametrize(("passes", "why"), [(3, "is being learned by heart"), (1, "with a lower rate")])
def test_held_out_loss_that_rises_is_said_once(lab, monkeypatch, passes, why):
    run = lab.start("run", "eval.every=2")
    run.data = replace(run.data, train=range(8 * 64 // passes))
    scores = iter([3.0, 2.0, 2.01, 2.1, 2.2, 2.2])

    def score(*_, **__):
        return Score(next(scores) * math.log(2), 1, 1)

    monkeypatch.setattr(Parallel, "score", score)
    _, watcher = lab.train(run)
    (note,) = [note for note in watcher.notes if note.startswith("risen")]
    assert read_state(checkpoints(run.path)[-1])["risen"] == ["text" if passes > 2 else "rate"]  # a resumed run says it no more
    assert note.startswith("risen held-out loss is 2.1000 and was 2.0000 at step 4: ") and why in note


@pytest.mark.parametrize(("scores", "best"), [([3.0, 2.0, 2.5, 2.6, 2.7, 2.8], 4), ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5], 12)])
def test_the_best_model_is_kept_beside_the_last(lab, monkeypatch, scores, best):
    """The last evaluation but one is of the same text as those on the way, so that the last model can be the best."""
    run, asked, seen = lab.start("run", "eval.every=2", "checkpoint.best=true"), iter([*scores, 9.0]), {}
    real = Trainer.evaluate

    def evaluate(trainer, final):
        seen[trainer.progress.step] = trainer.model.embed_tokens.weight.detach().clone()
        real(trainer, final)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    monkeypatch.setattr(Parallel, "score", lambda *_, **__: Score(next(asked) * math.log(2), 1, 1))
    result, _ = lab.train(run)
    assert result.best_step == best and result.bits_per_byte == pytest.approx(9.0)
    kept, last = (load(run.path / name)[0].embed_tokens.weight for name in ("best", "model"))
    torch.testing.assert_close(kept, seen[best], atol=0, rtol=0)
    torch.testing.assert_close(last, seen[12], atol=0, rtol=0)
    assert not torch.equal(seen[4], seen[12])


def test_a_finished_run_that_goes_on_keeps_its_best(lab, monkeypatch):
    """The checkpoint of its last step knows of the evaluation there. A run that has kept none so far keeps its next one."""
    asked = iter([3.0, 2.9, 2.8, 2.7, 2.6, 2.0, 9.0, 2.5, 2.4, 9.0])
    monkeypatch.setattr(Parallel, "score", lambda *_, **__: Score(next(asked) * math.log(2), 1, 1))
    assert lab.train(lab.start("run", "eval.every=2", "checkpoint.best=true"))[0].best_step == 12
    kept = (lab.folder / "run" / "best" / "model.safetensors").read_bytes()
    assert lab.train(lab.resume("run", "train.steps=14"))[0].best_step == 12
    assert (lab.folder / "run" / "best" / "model.safetensors").read_bytes() == kept
    asked = iter([2.0, 9.0, 3.0, 9.0])
    lab.train(lab.start("late", "eval.every=8"))
    assert lab.train(lab.resume("late", "train.steps=14", "checkpoint.best=true"))[0].best_step == 14
    assert (lab.folder / "late" / "best" / "config.json").is_file()


def test_a_run_that_is_ended_where_it_stopped_keeps_its_best(lab, monkeypatch):
    """The checkpoint of that step was there before the evaluation was."""
    asked = iter([2.0, 9.0, 3.0, 3.1, 9.0])
    monkeypatch.setattr(Parallel, "score", lambda *_, **__: Score(next(asked) * math.log(2), 1, 1))
    options = ("eval.every=8", "checkpoint.best=true", "train.log_every=1")
    assert lab.train(lab.start("run", *options), at={6: interrupt()})[0].stopped
    assert lab.train(lab.resume("run", "train.steps=6"))[0].best_step == 6
    kept = (lab.folder / "run" / "best" / "model.safetensors").read_bytes()
    assert lab.train(lab.resume("run", "train.steps=12"))[0].best_step == 6
    assert (lab.folder / "run" / "best" / "model.safetensors").read_bytes() == kept


def test_a_best_model_that_a_crash_left_aside_is_still_the_best(lab, monkeypatch):
    """Between the two renames of `save` it lies beside its place, and a worse one must not take that."""
    asked = iter([2.0, 9.0, 2.5, 2.5, 9.0])
    monkeypatch.setattr(Parallel, "score", lambda *_, **__: Score(next(asked) * math.log(2), 1, 1))
    options = ("eval.every=4", "checkpoint.best=true", "train.log_every=1")
    assert lab.train(lab.start("run", *options), at={6: interrupt()})[0].best_step == 4
    best = lab.folder / "run" / "best"
    kept = (best / "model.safetensors").read_bytes()
    best.rename(set_aside(best))
    assert lab.train(lab.resume("run"))[0].best_step == 4
    assert (best / "model.safetensors").read_bytes() == kept and not set_aside(best).exists()


def test_a_score_that_is_no_number_is_no_lowest(lab, monkeypatch):
    run, scores = lab.start("run", "eval.every=2", "checkpoint.best=true"), iter([math.nan, 2.0, *[2.5] * 5])
    monkeypatch.setattr(Parallel, "score", lambda *_, **__: Score(next(scores) * math.log(2), 1, 1))
    assert lab.train(run)[0].best_step == 4
