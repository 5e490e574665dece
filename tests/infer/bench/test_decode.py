"""`cadre bench decode`: its numbers are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from typer.testing import CliRunner

from cadre.cli.bench import bench_app
from cadre.errors import RunError, UsageError
from cadre.infer.bench import peer
from cadre.infer.bench.decode import Decoding, bench_decode, random_model, sweep, twins, weight_bytes
from cadre.model.config import ModelConfig
from cadre.plan.count import count
from tests.shapes import FAMILIES, configs, small

CONFIG = small("deepseek_v3", max_position_embeddings=128)


def test_bytes_are_counted() -> None:
    result = bench_decode(CONFIG, context=30, batch=2, dtype=torch.float32, steps=4)
    assert result["cache_bytes_per_token"] == count(CONFIG, cache_bytes=4).kv_cache_bytes_per_token
    assert result["bytes_read_per_step"] == 2 * result["weight_bytes_per_token"] + 2 * 30 * result["cache_bytes_per_token"]
    assert result["decode_tokens_per_second"] == pytest.approx(2 / result["decode_step_seconds_median"])
    assert 0 < result["bandwidth_fraction"] < 1
    assert "peer" not in result


def test_weights_of_a_step_are_the_active_ones() -> None:
    """One token of one sequence reads top-k experts a layer, and all that is not the embedding or a module of prediction."""
    config = small("deepseek_v3", num_nextn_predict_layers=1)
    model = random_model(config, torch.float32, None)
    counted = count(config)
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    active = weight_bytes(model, sparse * (config.num_experts_per_tok or 0))
    assert active == 4 * counted.active_parameters_without_input_embedding


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_tied_head_is_counted_once(kind: str) -> None:
    """Quantized, the head is a matrix of its own, and of the embedding beside it one row is read."""
    tied, own = (
        weight_bytes(random_model(small("llama", tie_word_embeddings=tied), torch.float32, kind), 0) for tied in (True, False)
    )
    assert tied == own


def test_the_peer_runs_in_turn() -> None:
    result = bench_decode(CONFIG, context=20, batch=1, dtype=torch.float32, steps=4, peer=True)
    assert result["peer"]["name"] == "transformers"
    assert [way["dtype"] for way in result["peer"]["ways"]] == ["float32"]
    assert result["speed_ratio"] == pytest.approx(
        result["decode_tokens_per_second"] / result["peer"]["decode_tokens_per_second"]
    )


def test_the_peers_times_end_when_its_work_does(monkeypatch) -> None:
    """On a card work goes on after the call."""
    waits: list[torch.device] = []
    monkeypatch.setattr(peer, "synchronize", waits.append)
    decoder = peer.PeerDecoder(CONFIG, torch.float32, 10, 1, lambda line: None)
    waits.clear()
    decoder.step()
    decoder._read(1, 4)
    assert waits == [decoder.device] * 4  # before and after each


def test_a_peer_that_takes_the_shape_in_no_way_says_why(monkeypatch) -> None:
    def refuse(*_: object) -> float:
        raise RuntimeError("widths must be\nmultiples of 16")

    monkeypatch.setattr(peer.PeerDecoder, "_read", refuse)
    with pytest.raises(RunError, match="transformers runs this shape in none of its ways: widths must be multiples of 16"):
        peer.PeerDecoder(CONFIG, torch.float32, 10, 1, lambda line: None)


def test_the_peer_runs_in_float32_too() -> None:
    """Where bfloat16 is emulated that is its faster way: the ratios are against the fastest."""
    result = bench_decode(CONFIG, context=20, batch=1, dtype=torch.bfloat16, steps=4, peer=True)
    ways = result["peer"]["ways"]
    assert [way["dtype"] for way in ways] == ["bfloat16", "float32"]
    for rate, ratio in (("decode_tokens_per_second", "speed_ratio"), ("prefill_tokens_per_second", "prefill_ratio")):
        assert result["peer"][rate] == max(way[rate] for way in ways)
        assert result[ratio] == pytest.approx(result[rate] / result["peer"][rate])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_twins(family: str) -> None:
    shapes = twins(small(family))
    assert set(shapes) == ({"latent", "MHA", "GQA"} if family.startswith("deepseek") else {"grouped"})


@given(configs(("deepseek_v2", "deepseek_v3")))
def test_every_shape_has_its_twins(config: ModelConfig) -> None:
    for shape in twins(config.model_copy(update={"v_head_dim": 8})).values():
        assert shape.n_routed_experts == config.n_routed_experts


def test_twins_keep_everything_but_attention() -> None:
    shapes = twins(CONFIG)
    assert set(shapes) == {"latent", "MHA", "GQA"}
    parts = [count(shape).parts for shape in shapes.values()]
    assert len({(part["routed_experts"], part["embedding"], part["dense_feed_forward"]) for part in parts}) == 1
    assert shapes["MHA"].num_key_value_heads == CONFIG.num_attention_heads
    assert shapes["GQA"].num_key_value_heads == 1


def test_the_sweep_has_every_point() -> None:
    rows = sweep(CONFIG, dtype=torch.float32, note=lambda line: None, contexts=(8, 40), batches=(1, 3))
    assert len(rows) == 3 * 2 * 2
    assert all(row["decode_tokens_per_second"] > 0 for row in rows)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(UsageError, match="exceeds the model's context"):
        Decoding(random_model(CONFIG, torch.float32, None), 126, 1, 10)


def test_the_command_prints_one_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG.to_hf()))
    arguments = ["decode", "--config", str(path), "--context", "16", "--batch", "2", "--steps", "4", "--quantize", "int8"]
    result = CliRunner().invoke(bench_app, [*arguments, "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["quantization"] == "int8"
    shown = CliRunner().invoke(bench_app, arguments)
    assert "tokens/s at context 16, batch 2 (int8)" in shown.stdout


def test_sweep_keeps_to_a_given_context_and_batch(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG.to_hf()))
    arguments = ["decode", "--config", str(path), "--sweep", "--context", "9", "--batch", "2", "--steps", "4", "--json"]
    result = CliRunner().invoke(bench_app, arguments)
    rows = json.loads(result.stdout)["rows"]
    assert [(row["context"], row["batch"]) for row in rows] == [(9, 2)] * 3


def test_sweep_takes_no_peer(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG.to_hf()))
    result = CliRunner().invoke(bench_app, ["decode", "--config", str(path), "--sweep", "--peer", "transformers"])
    assert isinstance(result.exception, UsageError)
