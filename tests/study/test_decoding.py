"""Decode rates of arms of different attention, and a point that does not fit."""

import torch

from cadre.infer.bench import decode
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
