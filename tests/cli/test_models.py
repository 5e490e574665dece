from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Quantization
from cadre.hub.load import load
from cadre.hub.save import save
from cadre.infer.quantize import quantize_model
from cadre.model.config import ModelConfig
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
    monkeypatch.setattr("cadre.infer.quantize.load_quantized", lambda path, kind, dtype, device: ("model", "words"))
    load_with_tokenizer(tmp_path / "model", Quantization.int8)
    assert "saves memory but not time" in capsys.readouterr().err


@pytest.mark.parametrize("kind", Quantization)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"num_nextn_predict_layers": 1}),
        ("deepseek_v2", {"q_lora_rank": None}),
        ("glm4_moe", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_rounded_while_it_is_read_a_model_is_the_one_rounded_afterwards(kind, family, changes, tmp_path, monkeypatch):
    save(Transformer(small(family, **changes)).initialize(3).bfloat16(), tmp_path)
    monkeypatch.setattr("cadre.hub.load.load_tokenizer_of", lambda *_: "words")
    model, _ = load_with_tokenizer(tmp_path, kind)
    wanted = quantize_model(load(tmp_path)[0], kind.value)
    assert str(model) == str(wanted) and model.compute_dtype == wanted.compute_dtype == torch.bfloat16
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


_PEAK = """
import sys
from pathlib import Path
import cadre.hub.load, cadre.infer.quantize
from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Quantization
cadre.hub.load.load_tokenizer_of = lambda *_: "words"
def memory(line):
    return next(int(each.split()[1]) for each in open("/proc/self/status") if each.startswith(line)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = memory("VmRSS")
load_with_tokenizer(Path(sys.argv[1]), Quantization(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak since a moment")
def test_a_model_is_never_in_memory_as_it_is_stored(tmp_path):
    """In four bits, one layer's experts, and what the first use of libraries takes beside them (40 to 70 MB): less than the
    153 MB that are stored. Rounded afterwards it took 230."""
    config = ModelConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=12, num_attention_heads=2, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=32, num_experts_per_tok=2, moe_intermediate_size=128,
    )  # fmt: skip
    save(Transformer(config).initialize(0), tmp_path)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    ran = subprocess.run([sys.executable, "-c", _PEAK, str(tmp_path), "int4"], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < stored
