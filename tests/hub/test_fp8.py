import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cadre.errors import UsageError
from cadre.hub.fp8 import check_quantization, dequantize, scale_shape
from cadre.hub.load import load
from cadre.hub.save import save

QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def quantize(weight):
    """The straightforward way: every block by its own greatest value."""
    rows, columns = scale_shape(weight.shape)
    scale = torch.empty(rows, columns)
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale[i, j] = block.abs().max() / 448
            result[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = (block / scale[i, j]).to(torch.float8_e4m3fn)
    return result, scale


def dequantize_by_loop(weight, scale):
    result = torch.empty(weight.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            result[block] = weight[block].float() * scale[i, j]
    return result


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**31))
def test_dequantize_equals_a_plain_loop(rows, columns, seed):
    shape = (rows, columns)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape), generator=generator) + 0.1
    wanted = dequantize_by_loop(weight, scale)
    assert torch.equal(dequantize(weight, scale, torch.float32), wanted)
    assert torch.equal(dequantize(weight, scale, torch.bfloat16), wanted.bfloat16())


def test_blocks_of_both_dimensions():
    weight = torch.ones(260, 130).to(torch.float8_e4m3fn)
    scale = torch.arange(6.0).reshape(3, 2)
    result = dequantize(weight, scale, torch.float32)
    corners = [result[0, 0], result[127, 128], result[128, 127], result[255, 129], result[256, 0], result[259, 129]]
    assert [corner.item() for corner in corners] == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def fp8_model(build, tmp_path):
    """A directory as DeepSeek publishes: matrices of attention and feed-forward in FP8, the rest as it was."""
    model = build(hidden_size=136, kv_lora_rank=140, num_nextn_predict_layers=1)
    save(model, tmp_path, dtype=torch.bfloat16)
    tensors, wanted = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and ("_proj" in name) and "eh_proj" not in name:
            weight, scale = quantize(tensor.float())
            tensors[name], tensors[f"{name}_scale_inv"] = weight, scale
            wanted[name] = dequantize_by_loop(weight, scale)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    set_quantization(tmp_path, QUANTIZATION)
    return tmp_path, wanted


def set_quantization(path, quantization):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_load_dequantizes(fp8_model, dtype, tmp_path_factory):
    path, wanted = fp8_model
    model, _ = load(path, dtype=dtype)
    kept = dtype or torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {kept}
    again = tmp_path_factory.mktemp("again") / "model"
    save(model, again)
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    tensors = load_file(again / "model.safetensors")
    assert len(wanted) > 40
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor.to(kept)), name


def test_quantization_config_alone_changes_nothing(build, tmp_path):
    """Published FP8 models keep some layers, or after conversion all, in plain numbers."""
    save(build(), tmp_path)
    set_quantization(tmp_path, QUANTIZATION)
    model, _ = load(tmp_path)
    assert torch.equal(model.embed_tokens.weight, build().embed_tokens.weight)


def test_missing_scale_is_refused(fp8_model):
    path, wanted = fp8_model
    tensors = load_file(path / "model.safetensors")
    name = next(iter(wanted))
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UsageError, match=f"{name} is FP8 without scales"):
        load(path)


def test_scale_of_wrong_shape_is_refused(fp8_model):
    path, wanted = fp8_model
    tensors = load_file(path / "model.safetensors")
    name = f"{next(iter(wanted))}_scale_inv"
    tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UsageError, match=f"{name} has shape"):
        load(path)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        "int8",
    ],
)
def test_other_quantizations_are_refused(quantization):
    with pytest.raises(UsageError, match=r"^here: quantization_config with quant_method .* Cadre reads"):
        check_quantization({"quantization_config": quantization}, "here")


def test_no_quantization_is_fine():
    check_quantization({}, "here")
    check_quantization({"quantization_config": None}, "here")
