"""A model in parts is the model: initialised, read from a directory and written to one, whatever the layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cadre.hub.load import load
from cadre.hub.save import save
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.train.parallel import shard
from cadre.train.parallel.layout import Layout
from cadre.train.parallel.ranks import Ranks
from cadre.train.saving import local
from tests.shapes import small
from tests.train.parallel.world import world

MODELS = {
    "deepseek_v3": small("deepseek_v3", num_nextn_predict_layers=1, n_routed_experts=8, q_lora_rank=9),
    "deepseek_v2": small("deepseek_v2", n_routed_experts=4, first_k_dense_replace=0),
    "glm4_moe": small("glm4_moe", n_routed_experts=4, attention_bias=True),
    "olmoe": small("olmoe", n_routed_experts=4),
    "llama": small("llama", tie_word_embeddings=True),
}


def write(ranks: Ranks, config: ModelConfig, layout: Layout, folder: Path) -> dict:
    device = torch.device("cpu")
    ranks.layout = layout
    model = ranks.build(config, device, seed=3)
    ranks.save_model(model, local(ranks._weights(model)), folder / "drawn", None, torch.bfloat16)
    held = {name: (part.rows(ranks.rank), part.local.shape) for name, part in ranks.parts.items()}
    model = ranks.build(config, device, None, folder / "whole")
    ranks.save_model(model, local(ranks._weights(model)), folder / "read", None, torch.float32)
    return held


@pytest.mark.parametrize("layout, name", [
    (Layout(2), "llama"), (Layout(2, 2), "deepseek_v3"), (Layout(4, 2), "deepseek_v3"), (Layout(4, 4), "deepseek_v2"),
    (Layout(3), "glm4_moe"), (Layout(2, 2), "olmoe"), (Layout(4, 2, 2), "deepseek_v3"), (Layout(2, 1, 2), "llama"),
])  # fmt: skip
def test_the_parts_are_the_whole(tmp_path, monkeypatch, layout, name):
    if layout.data > 2:  # as a large model is cut
        monkeypatch.setattr(shard, "GATHERED_AT_ONCE", 0)
    config = MODELS[name]
    whole = Transformer(config).initialize(3)
    save(whole, tmp_path / "whole")
    save(whole, tmp_path / "rounded", dtype=torch.bfloat16)
    held = world(layout.data, write, config, layout, tmp_path)
    for made, wanted in (("drawn", "rounded"), ("read", "whole")):
        tensors, others = (load_file(tmp_path / folder / "model.safetensors") for folder in (made, wanted))
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == others[key].dtype and torch.equal(tensor, others[key]), key
        assert (tmp_path / made / "config.json").read_bytes() == (tmp_path / wanted / "config.json").read_bytes()
    load(tmp_path / "read")
    for key, parameter in whole.named_parameters():
        runs = [rows[key] for rows in held]
        rows = [row for rows, _ in runs for row in range(rows.start, rows.stop)]
        assert sorted(rows) == sorted([*range(len(parameter))] * layout.replicas)
        assert all(shape == (rows.stop - rows.start, *parameter.shape[1:]) for rows, shape in runs)
