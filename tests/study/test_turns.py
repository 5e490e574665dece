"""Step times in turn: real steps of every arm's recipe, from initialisation or from trained weights, and nothing left over."""

import pytest
import torch

import cadre
from cadre.study.match import match
from cadre.study.spec import read_study
from cadre.study.turns import Stepper, step_seconds
from cadre.train.parallel.group import Parallel
from tests.study.studies import write_study


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    study, _ = read_study(str(write_study(tmp_path)))
    return {arm.name: arm.recipe for arm in match(study, study.base_recipe(), 300)}


def test_the_arms_step_in_turn_in_processes_of_their_own(recipes, tmp_path):
    notes = []
    seconds = step_seconds(recipes, tmp_path / ".turns", 2, note=notes.append)
    assert seconds.keys() == recipes.keys() and all(0 < value < 60 for value in seconds.values())
    assert notes[-1] == "step times, turn 4 of 4"
    assert not (tmp_path / ".turns").exists()


def test_a_trained_arm_goes_on_from_its_weights(recipes, tmp_path):
    first = Stepper(recipes["experts"], tmp_path / "a", None, Parallel(), torch.device("cpu"))
    first()
    cadre.save(first.run.model, tmp_path / "model", first.run.data.tokenizer)
    second = Stepper(recipes["experts"], tmp_path / "b", tmp_path / "model", Parallel(), torch.device("cpu"))
    held, loaded = first.run.model.state_dict(), second.run.model.state_dict()
    assert held.keys() == loaded.keys() and all(bool((held[name] == loaded[name]).all()) for name in held)
    assert second() > 0
