from __future__ import annotations

import pytest
import torch

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Quantization
from cadre.hub.save import save
from cadre.model.transformer import Transformer
from tests.shapes import small


@pytest.mark.parametrize("stored, exact, held", [
    (torch.float32, False, torch.bfloat16), (torch.float32, True, None), (torch.float16, False, None),
])  # fmt: skip
def test_a_card_holds_float32_as_bfloat16_and_says_so(stored, exact, held, tmp_path, monkeypatch, capsys):
    """`held`: what is asked for, None for what is stored."""
    save(Transformer(small("llama")).initialize(0).to(stored), tmp_path / "model")
    asked = []
    monkeypatch.setattr("cadre.kernels.limits.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(
        "cadre.hub.load.load", lambda path, dtype, device: asked.append((dtype, device.type)) or ("model", "words")
    )
    assert load_with_tokenizer(tmp_path / "model", exact=exact) == ("model", "words")
    assert asked == [(held, "cuda")]
    assert ("bfloat16" in capsys.readouterr().err) == (held is not None)


def test_quantizing_on_a_card_is_said_to_save_no_time(tmp_path, monkeypatch, capsys):
    save(Transformer(small("llama")).initialize(0).bfloat16(), tmp_path / "model")
    monkeypatch.setattr("cadre.kernels.limits.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("cadre.hub.load.load", lambda path, dtype, device: ("model", "words"))
    monkeypatch.setattr("cadre.infer.quantize.quantize_model", lambda model, kind: model)
    load_with_tokenizer(tmp_path / "model", Quantization.int8)
    assert "saves memory but not time" in capsys.readouterr().err
