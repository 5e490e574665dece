"""Quantized models: what is rounded, what is kept, what it costs."""

from __future__ import annotations

import copy

import pytest
import torch

from cadre.errors import UsageError
from cadre.hub.save import save
from cadre.infer.quantize import load_quantized, quantize_model
from cadre.model.transformer import Transformer
from tests.shapes import FAMILIES, small


def model_of(family: str) -> Transformer:
    config = small(family, hidden_size=64, vocab_size=128)
    return Transformer(config).initialize(1).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "near"), [("int8", 0.03), ("int4", 0.3)])
def test_logits_stay_near(family: str, kind: str, near: float) -> None:
    model = model_of(family)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        exact = model(ids)
        rounded = quantize_model(copy.deepcopy(model), kind)(ids)
    difference = (rounded - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0 < difference < near


def test_router_norms_and_embedding_keep_their_precision() -> None:
    model = model_of("deepseek_v3")
    kept = {name: value.clone() for name, value in model.state_dict().items()
            if "norm" in name or "mlp.gate." in name or "embed_tokens" in name}  # fmt: skip
    rounded = quantize_model(model, "int4").state_dict()
    assert kept and all(torch.equal(rounded[name], value) for name, value in kept.items())
    assert not any(name.endswith(("q_b_proj.weight", "gate_up_proj", "lm_head.weight")) for name in rounded)


def test_memory_falls_as_counted() -> None:
    config = small("deepseek_v3", hidden_size=512, moe_intermediate_size=512, intermediate_size=512, vocab_size=512)
    model = Transformer(config).initialize(1)

    def held() -> int:
        tensors = [*model.parameters(), *model.buffers()]
        return sum(tensor.nbytes for tensor in tensors) - model.embed_tokens.weight.nbytes

    before = held()
    quantize_model(model, "int4")
    assert held() < before * 4.6 / 32 + 100_000


def test_a_tied_head_is_rounded_and_its_embedding_is_not() -> None:
    model = Transformer(small("llama", tie_word_embeddings=True)).initialize(1)
    embedding = model.embed_tokens.weight.clone()
    quantize_model(model, "int8")
    assert torch.equal(model.embed_tokens.weight, embedding)
    assert torch.isfinite(model(torch.arange(5)[None])).all()


def test_refusals(tmp_path) -> None:
    model = model_of("llama")
    save(model, tmp_path)
    with pytest.raises(UsageError, match="quantization is 'int3'; it must be one of int8, int4"):
        load_quantized(tmp_path, "int3")
    with pytest.raises(UsageError, match="int8, int4"):
        quantize_model(model, "int3")
    quantize_model(model, "int8")
    with pytest.raises(UsageError, match="already"):
        quantize_model(model, "int4")
