"""Decode rates of arms of different attention, and a point that does not fit."""

import itertools
from typing import ClassVar

import pytest
import torch

from cadre.infer.bench import decode
from cadre.study import decoding
from cadre.study.decoding import decode_rates
from cadre.study.spec import Decode
from tests.shapes import small


def test_every_arm_is_timed_at_every_point_beyond_its_own_context():
    configs = {"latent": small("deepseek_v3"), "grouped": small("llama")}
    notes = []
    rows = decode_rates(configs, Decode(contexts=[8, 100], batches=[1, 3]), torch.bfloat16, notes.append)
    assert {(row["arm"], row["context"], row["batch"]) for row in rows} == {
        (arm, context, batch) for arm in configs for context in (8, 100) for batch in (1, 3)
    }  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in rows) and len(notes) == 4
    # 10 + 4 elements of latent and rotary key against 2 x 2 heads of 8, in 2 layers (module of none).
    cache = {row["arm"]: row["cache_bytes_per_token"] for row in rows}
    assert cache == {"latent": 2 * 14 * 2, "grouped": 2 * 32 * 2}
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_a_point_that_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 1000)
    point = Decode(contexts=[8], batches=[1])
    (row,) = decode_rates({"latent": small("deepseek_v3")}, point, torch.float32, lambda text: None)
    assert "tokens_per_second" not in row and "GiB are free" in row["reason"]


class Clockwork:
    """Stands in for `Decoding`: a step takes what is next on the list of its model."""

    asked: ClassVar[list[str]] = []

    def __init__(self, model, context, batch, steps):
        self.name, self.seconds = model[0], itertools.cycle(model[1])
        self.engine = type("Engine", (), {"pool": type("Pool", (), {"bytes_per_token": 1})})

    def step(self):
        self.asked.append(self.name)
        return next(self.seconds)


def test_rounds_are_paired_go_back_and_forth_and_twins_are_measured_once(monkeypatch):
    shapes = {"dense": small("deepseek_v3"), "half": small("deepseek_v3"), "other": small("llama"), "again": small("llama")}
    taken = {"deepseek_v3": [0.5, 1.0, 2.0], "llama": [1.0, 2.0, 4.0]}
    monkeypatch.setattr(decoding, "random_model", lambda config, *_: (config.model_type, taken[config.model_type]))
    monkeypatch.setattr(decoding, "Decoding", Clockwork)
    monkeypatch.setattr(Clockwork, "asked", [])
    found = decode_rates(shapes, Decode(contexts=[8], batches=[2]), torch.float32, lambda text: None)
    rows = {row["arm"]: row for row in found}
    assert Clockwork.asked[:6] == ["llama", "deepseek_v3", "deepseek_v3", "llama", "llama", "deepseek_v3"]
    assert Clockwork.asked.count("llama") == decoding.WARM_UP + 48
    assert "same_as" not in rows["dense"] and rows["half"]["same_as"] == "dense" and rows["again"]["same_as"] == "other"
    assert rows["half"]["tokens_per_second"] == rows["dense"]["tokens_per_second"] == 2.0
    assert "over_first" not in rows["half"] and "over_first" not in rows["dense"]
    # A machine that becomes four times slower and faster again changes no pair.
    assert rows["other"]["over_first"] == rows["again"]["over_first"] == {"low": 0.5, "median": 0.5, "high": 0.5}
    assert rows["other"]["rounds"] == 48


def test_dear_steps_are_made_no_more_often_than_needed(monkeypatch):
    monkeypatch.setattr(decoding, "random_model", lambda *_: ("dear", [1.0]))
    monkeypatch.setattr(decoding, "Decoding", Clockwork)
    monkeypatch.setattr(decoding, "_CHEAP", -1.0)
    (row,) = decode_rates({"a": small("llama")}, Decode(contexts=[8], batches=[1]), torch.float32, lambda text: None)
    assert row["rounds"] == 12 and row["tokens_per_second"] == pytest.approx(1.0)
