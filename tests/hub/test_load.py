import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.shapes import small
from tokenizers import Tokenizer, models

import cadre
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.hub.directory import WEIGHTS, load_config
from cadre.hub.load import load
from cadre.hub.save import save
from cadre.model.transformer import Transformer


@pytest.fixture
def path(build, tmp_path):
    """A model with one multi-token prediction module."""
    save(build(num_nextn_predict_layers=1), tmp_path / "model")
    return tmp_path / "model"


def edit(path, change):
    tensors = load_file(path / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)


def set_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(path, pattern):
    with pytest.raises(UsageError, match=pattern) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def same(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_model_and_run_directory(path, build):
    for where in (path, str(path), path.parent):
        model, tokenizer = cadre.load(where)
        assert tokenizer is None
        assert not model.training
        assert same(model, build(num_nextn_predict_layers=1))
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_are_one_tensor(build, tmp_path):
    save(build(tie_word_embeddings=True), tmp_path)
    model, _ = load(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert same(model, build(tie_word_embeddings=True))


def test_dtype(path):
    model, _ = load(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    biases = [layer.gate.e_score_correction_bias for _, layer in model.sparse_layers()]
    assert len(biases) == 2
    assert all(bias.dtype == torch.float32 and bias.abs().min() > 0 for bias in biases)
    wide, _ = load(path)
    assert torch.equal(biases[0], wide.sparse_layers()[0][1].gate.e_score_correction_bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtype_is_kept(build, tmp_path, dtype):
    save(build(), tmp_path, dtype=dtype)
    set_config(tmp_path, dtype="float32")
    model, _ = load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
        ({"dtype": "uint8"}, torch.bfloat16),
        ({"dtype": None}, torch.bfloat16),
    ],
)
def test_mixed_dtypes_become_the_named_or_the_commonest(path, field, wanted):
    edit(path, lambda tensors: {n: t if "norm" in n or "bias" in n else t.bfloat16() for n, t in tensors.items()})
    set_config(path, **field)
    model, _ = load(path)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


def test_fused_experts_are_read_as_transformers_keeps_them(path, build):
    def fuse(tensors):
        for layer in (1, 2):
            prefix = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([tensors.pop(f"{prefix}.{expert}.{part}_proj.weight") for expert in range(6)])
                for part in ("gate", "up", "down")
            )
            tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"] = torch.cat((gate, up), dim=1), down

    edit(path, fuse)
    assert same(load(path)[0], build(num_nextn_predict_layers=1))


def test_tensors_without_meaning_are_tolerated(path, build):
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same(load(path)[0], build(num_nextn_predict_layers=1))


def test_no_shared_experts_with_or_without_their_empty_tensors(build, tmp_path):
    save(build(n_shared_experts=0), tmp_path)
    empty = [name for name, tensor in load_file(tmp_path / WEIGHTS).items() if tensor.numel() == 0]
    assert len(empty) == 3
    assert same(load(tmp_path)[0], build(n_shared_experts=0))
    edit(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n not in empty})
    assert same(load(tmp_path)[0], build(n_shared_experts=0))


def test_missing_tensors_are_counted(path):
    edit(path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.experts.3" not in n})
    refused(path, r"model: 3 tensors missing: model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight and others$")
    edit(path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n})
    refused(path, "18 tensors missing")


def test_one_missing_tensor(path):
    edit(path, lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    refused(path, r"1 tensor missing: model\.norm\.weight$")


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.weight", "lm_head.bias", "model.layers.", "model.layers.-1.norm", "vision.weight",
     "model.layers.1.mlp.experts.6.up_proj.weight", "model.norm.weight_scale_inv"],
)  # fmt: skip
def test_unexpected_tensor(path, name):
    edit(path, lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(path, f"unexpected tensor {name}: ")


def test_wrong_shape(path):
    edit(path, lambda tensors: tensors.update({"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(48, 24)}))
    refused(path, r"experts\.2\.up_proj\.weight has shape \[48, 24\]; config\.json wants \[24, 48\]")


def test_integers_are_refused(path):
    edit(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}))
    refused(path, r"model\.norm\.weight is stored as I32; Cadre reads F64")


def test_config_of_another_size(path):
    set_config(path, vocab_size=132)
    refused(path, r"model\.safetensors: .* has shape \[131, 48\]; config\.json wants \[132, 48\]")


def test_config_that_is_refused(path):
    set_config(path, n_group=4)
    refused(path, r"config\.json: n_group is 4")


def test_modules_absent_altogether(path, build):
    edit(path, lambda tensors: {n: t for n, t in tensors.items() if "layers.2." not in n})
    model, _ = load(path)
    assert model.config.num_nextn_predict_layers == 0
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids), build(num_nextn_predict_layers=1)(ids))


def test_modules_in_part(path):
    edit(path, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.2.eh_proj.weight"})
    refused(path, r"num_nextn_predict_layers is 1, .* in part only: 1 tensor missing, model\.layers\.2\.eh_proj\.weight first")


def test_fewer_modules_than_announced(path):
    set_config(path, num_nextn_predict_layers=2)
    refused(path, r"num_nextn_predict_layers is 2, .* in part only: .*, model\.layers\.3\.")


def test_more_modules_than_announced(path):
    set_config(path, num_nextn_predict_layers=0)
    refused(path, "tensors of layer 2, but config.json has 2 layers and num_nextn_predict_layers 0")


def test_modules_may_lack_their_copies(path, build):
    edit(path, lambda tensors: {n: t for n, t in tensors.items() if "layers.2.embed" not in n and "head.head" not in n})
    assert same(load(path)[0], build(num_nextn_predict_layers=1))


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("model.layers.2.embed_tokens.weight", "embed_tokens.weight"),
        ("model.layers.2.shared_head.head.weight", "lm_head.weight"),
    ],
)
def test_copies_that_differ(path, name, original):
    edit(path, lambda tensors: tensors.update({name: tensors[name] + torch.eye(131, 48)}))
    refused(path, f"{name} differs from (model.)?{original}, with which the model shares it")


_MEASURE = """
import resource, sys
from cadre.hub.load import load
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model, _ = load(sys.argv[1])
print((peak() - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


def test_weights_are_never_held_twice(build, tmp_path):
    save(build(hidden_size=512, n_routed_experts=32, moe_intermediate_size=1024, vocab_size=500), tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size > 200e6
    output = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, check=True).stdout
    assert float(output) < 1.3


def test_tokenizer_comes_along(build, tmp_path):
    tokenizer = train_tokenizer(["We the people of the United States"] * 3, 280)
    save(build(vocab_size=300), tmp_path, tokenizer)
    _, read = load(tmp_path)
    assert read is not None
    assert read.to_str() == tokenizer.to_str()


def test_tokenizer_beyond_the_vocabulary(path):
    tokenizer = Tokenizer(models.BPE({f"t{number}": number for number in range(140)}, []))
    tokenizer.save(str(path / "tokenizer.json"))
    refused(path, "model: the tokenizer has ids up to 139, beyond the vocabulary of 131")


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    model = Transformer(small("llama")).initialize(0)
    model.norm.weight.data[3] = float("nan")
    save(model, tmp_path / "model")
    with pytest.raises(UsageError, match=r"model\.safetensors: model\.norm\.weight holds values that are not finite"):
        load(tmp_path / "model")


def test_numbers_that_float16_cannot_hold_are_refused_not_made_infinite(tmp_path):
    model = Transformer(small("deepseek_v3")).initialize(0)
    model.layers[1].mlp.gate.e_score_correction_bias[0] = 1e5  # stays float32
    model.norm.weight.data[3] = 60000.0
    save(model, tmp_path / "model")
    assert load(tmp_path / "model", dtype=torch.float16)[0].norm.weight[3] == 60000
    model.norm.weight.data[3] = 70000.0
    save(model, tmp_path / "other")
    assert load(tmp_path / "other", dtype=torch.bfloat16)[0].norm.weight[3] > 60000
    with pytest.raises(UsageError, match=r"model\.norm\.weight holds numbers too large for float16; take bfloat16 or float32"):
        load(tmp_path / "other", dtype=torch.float16)


def set_generation(path, content):
    (path / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("named, ends", [(7, [1, 7]), ([7, 9, 1], [1, 7, 9]), (1, 1), ([1], 1), (None, 1)])
def test_texts_end_where_generation_config_says_too(path, named, ends):
    set_config(path, eos_token_id=1)
    set_generation(path, {"eos_token_id": named, "temperature": 0.6})
    assert load(path)[0].config.eos_token_id == load_config(path).eos_token_id == ends


def test_ends_that_only_generation_config_names(path):
    set_config(path, eos_token_id=None)
    set_generation(path, {"eos_token_id": 5})
    assert load(path)[0].config.eos_token_id == [5]
    (path / "generation_config.json").unlink()
    assert load(path)[0].config.eos_token_id is None


@pytest.mark.parametrize("content, said", [
    ("{", r"generation_config.json: cannot be read"),
    ("[]", r"generation_config.json: holds list, not a JSON object"),
    ({"eos_token_id": "x"}, r"generation_config.json: eos_token_id is 'x'; it must be a token id from 0 to"),
    ({"eos_token_id": [1, 10**6]}, r"eos_token_id is 1000000"),
    ({"eos_token_id": True}, r"eos_token_id is True"),
])  # fmt: skip
def test_a_damaged_generation_config_is_refused(path, content, said):
    set_generation(path, content)
    refused(path, said)
