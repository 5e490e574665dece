"""transformers as the peer: the same directory is the same model on either side."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from cadre.errors import UsageError
from cadre.hub.load import load
from cadre.hub.save import save
from cadre.infer.generate import generate_ids
from cadre.model.config import ModelConfig
from cadre.model.families import FAMILIES as FAMILY
from cadre.model.transformer import Transformer

logging.set_verbosity_error()
logging.disable_progress_bar()

YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)

BASE = dict(vocab_size=150, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56,
            max_position_embeddings=128, initializer_range=0.08, rms_norm_eps=1e-5, tie_word_embeddings=False,
            attention_bias=False, bos_token_id=None, eos_token_id=None, rope_parameters=dict(rope_theta=10000.0))  # fmt: skip
MOE = dict(moe_intermediate_size=24, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=1,
           topk_group=1, first_k_dense_replace=1, routed_scaling_factor=1.0)  # fmt: skip
SPARSE = dict(moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3)
MLA = dict(num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
FAMILIES = {
    "deepseek_v3": {**BASE, **MOE, **MLA, "norm_topk_prob": True},
    "deepseek_v2": {**BASE, **MOE, **MLA, "topk_method": "greedy"},
    "glm4_moe": {**BASE, **MOE, "num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True, "use_qk_norm": False,
                 "rope_parameters": dict(rope_theta=10000.0, rope_type="default", partial_rotary_factor=0.5)},
    "qwen3_moe": {**BASE, **SPARSE, "num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True},
    "mixtral": {**{k: v for k, v in BASE.items() if k not in ("intermediate_size", "attention_bias")}, **SPARSE,
                "num_key_value_heads": 2},
    "olmoe": {**{k: v for k, v in BASE.items() if k != "intermediate_size"}, **SPARSE, "num_key_value_heads": 2,
              "pad_token_id": None},
    "llama": {**BASE, "num_key_value_heads": 2},
    "qwen2": {**{k: v for k, v in BASE.items() if k != "attention_bias"}, "num_key_value_heads": 2},
    "qwen3": {**BASE, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip

SHAPES = {
    "deepseek_v3": [
        dict(),
        dict(q_lora_rank=28),
        dict(q_lora_rank=28, rope_parameters=dict(**YARN, mscale=1.0, mscale_all_dim=1.0)),
        dict(rope_parameters=dict(**YARN, mscale=1.0, mscale_all_dim=0.6, beta_fast=16.0, beta_slow=2.0)),
        dict(rope_parameters=dict(**YARN, attention_factor=1.3, truncate=False)),
        dict(rope_parameters=dict(**LINEAR, mscale_all_dim=0.8)),
        dict(n_group=4, topk_group=2, num_experts_per_tok=4, q_lora_rank=20),
        dict(n_group=2, topk_group=1, num_experts_per_tok=4, routed_scaling_factor=2.5, norm_topk_prob=False),
        dict(n_group=4, topk_group=4, first_k_dense_replace=0, n_shared_experts=2),
        dict(first_k_dense_replace=3),
        dict(n_shared_experts=0, num_experts_per_tok=1),
        dict(hidden_size=52, num_attention_heads=5, num_key_value_heads=5, qk_nope_head_dim=11, qk_rope_head_dim=6,
             v_head_dim=13, kv_lora_rank=21, q_lora_rank=19, moe_intermediate_size=23, intermediate_size=37),
        dict(v_head_dim=40, qk_nope_head_dim=8, qk_rope_head_dim=2),
        dict(tie_word_embeddings=True, rope_interleave=False),
        dict(attention_bias=True, q_lora_rank=28, rms_norm_eps=1e-3),
        dict(num_attention_heads=1, num_key_value_heads=1, n_routed_experts=2, num_experts_per_tok=2),
    ],
    "deepseek_v2": [
        dict(),
        dict(q_lora_rank=28),
        dict(q_lora_rank=28, rope_parameters=dict(**YARN, mscale=0.707, mscale_all_dim=0.707)),
        dict(rope_parameters=dict(**YARN, mscale=1.0, mscale_all_dim=0.5)),
        dict(rope_parameters=YARN),
        dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=4),
        dict(topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0),
        dict(topk_method="group_limited_greedy", n_group=1, topk_group=1, first_k_dense_replace=0),
        dict(first_k_dense_replace=3),
        dict(n_shared_experts=2, num_experts_per_tok=6),
        dict(n_shared_experts=0, n_routed_experts=1, num_experts_per_tok=1),
        dict(hidden_size=55, num_attention_heads=5, num_key_value_heads=5, qk_nope_head_dim=14, qk_rope_head_dim=10,
             v_head_dim=7, kv_lora_rank=18, q_lora_rank=31, moe_intermediate_size=21),
        dict(tie_word_embeddings=True, attention_bias=True, q_lora_rank=20),
        dict(rope_parameters=LINEAR, rms_norm_eps=1e-3),
    ],
    "glm4_moe": [
        dict(),
        dict(use_qk_norm=True),
        dict(num_key_value_heads=1, attention_bias=True),
        dict(num_key_value_heads=4, first_k_dense_replace=0, n_shared_experts=2),
        dict(first_k_dense_replace=3),
        dict(n_shared_experts=0),
        dict(n_group=4, topk_group=2, num_experts_per_tok=4, routed_scaling_factor=2.5),
        dict(n_group=2, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False),
        dict(head_dim=20, rope_parameters=dict(rope_theta=1000.0, rope_type="default", partial_rotary_factor=0.3)),
        dict(head_dim=14, rope_parameters=dict(rope_theta=1000.0, rope_type="default", partial_rotary_factor=1.0)),
        dict(rope_parameters=dict(**YARN, partial_rotary_factor=0.5), use_qk_norm=True, rms_norm_eps=1e-3),
        dict(rope_parameters=dict(**LLAMA3, partial_rotary_factor=0.5)),
        dict(hidden_size=50, num_attention_heads=6, num_key_value_heads=3, head_dim=12, moe_intermediate_size=19),
        dict(tie_word_embeddings=True, attention_bias=True),
    ],
    "qwen3_moe": [
        dict(),
        dict(norm_topk_prob=False, num_experts_per_tok=1, n_routed_experts=1),
        dict(attention_bias=True, num_key_value_heads=1, num_experts_per_tok=8),
        dict(first_k_dense_replace=1, tie_word_embeddings=True),
        dict(first_k_dense_replace=3),
        dict(hidden_size=50, num_attention_heads=6, num_key_value_heads=3, head_dim=12, moe_intermediate_size=19),
        dict(rope_parameters=YARN, rms_norm_eps=1e-3),
        dict(rope_parameters=LLAMA3),
    ],
    "mixtral": [
        dict(),
        dict(num_key_value_heads=4, num_experts_per_tok=1),
        dict(head_dim=22, num_key_value_heads=1, tie_word_embeddings=True),
        dict(rope_parameters=LINEAR, rms_norm_eps=1e-3),
        dict(hidden_size=50, num_attention_heads=6, num_key_value_heads=3, head_dim=12, moe_intermediate_size=19),
    ],
    "olmoe": [
        dict(),
        dict(norm_topk_prob=True, num_key_value_heads=4),
        dict(attention_bias=True, num_key_value_heads=1, tie_word_embeddings=True),
        dict(hidden_size=42, num_attention_heads=3, num_key_value_heads=3, moe_intermediate_size=19),
        dict(rope_parameters=YARN, rms_norm_eps=1e-3),
    ],
    "llama": [
        dict(),
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1, attention_bias=True),
        dict(head_dim=22, tie_word_embeddings=True),
        dict(rope_parameters=LLAMA3),
        dict(rope_parameters=YARN),
        dict(rope_parameters=LINEAR, rms_norm_eps=1e-3),
    ],
    "qwen2": [
        dict(),
        dict(num_key_value_heads=4, tie_word_embeddings=True),
        dict(head_dim=22, num_key_value_heads=1, rope_parameters=YARN, rms_norm_eps=1e-3),
    ],
    "qwen3": [
        dict(),
        dict(head_dim=22, num_key_value_heads=4, attention_bias=True),
        dict(num_key_value_heads=1, rope_parameters=LINEAR, tie_word_embeddings=True, rms_norm_eps=1e-3),
    ],
}  # fmt: skip
CASES = [(kind, number) for kind, shapes in SHAPES.items() for number in range(len(shapes))]


def shape_of(kind, number):
    return {**FAMILIES[kind], **SHAPES[kind][number]}


def their_config(kind, shape):
    """In the family's own words."""
    shape = dict(shape)
    if kind == "qwen3_moe":
        shape["mlp_only_layers"] = list(range(shape.pop("first_k_dense_replace", 0)))
    for ours, theirs in FAMILY[kind].spelling.items():
        shape[theirs] = shape.pop(ours)
    return AutoConfig.for_model(kind, **shape)


def their_model(kind, shape, stir, seed):
    config = their_config(kind, shape)
    return stir(AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager"), seed)


def read_theirs(path):
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    return model.eval(), report


@torch.no_grad()
def assert_same_function(theirs, ours, vocab_size, seed):
    """Logits equal within 1e-4 of their scale, and 64 greedy tokens identical.

    Ours are generated one by one, through the cache; theirs follow by induction if every one is the argmax of what came
    before it.
    """
    ids = torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(seed))
    wanted = theirs(ids).logits
    scale = wanted.abs().max().item()
    assert wanted.std() > 0.05
    assert (ours(ids) - wanted).abs().max().item() < 1e-4 * scale
    prompt = ids[0, :8].tolist()
    said = generate_ids(ours, prompt, max_new_tokens=64, temperature=0)
    assert len(said) == 64
    assert theirs(torch.tensor([prompt + said])).logits[0, 7:-1].argmax(dim=-1).tolist() == said


def stored(path):
    """Every tensor of a directory's safetensors files by name."""
    result = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            result.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    return result


def assert_same_tensors(first, second):
    one, other = stored(first), stored(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_theirs_here(kind, number, stir, tmp_path):
    shape = shape_of(kind, number)
    theirs = their_model(kind, shape, stir, seed=number)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = load(tmp_path / "theirs")
    assert tokenizer is None
    assert not ours.training
    assert_same_function(theirs, ours, shape["vocab_size"], seed=number)
    save(ours, tmp_path / "again")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_ours_there(kind, number, stir, tmp_path):
    shape = shape_of(kind, number)
    config = ModelConfig(model_type=kind, **shape)
    ours = stir(Transformer(config).initialize(number), number + 100)
    save(ours, tmp_path)
    theirs, report = read_theirs(tmp_path)
    assert not any(report.values()), report
    assert_same_function(theirs, ours, shape["vocab_size"], seed=number)


LITE = {**BASE, **MLA, **{k: v for k, v in MOE.items() if k != "first_k_dense_replace"}}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("glm4_moe_lite", LITE),
        ("glm4_moe_lite", {**LITE, "q_lora_rank": 28, "mlp_layer_types": ["dense", "dense", "sparse"], "n_shared_experts": 2}),
        ("glm4_moe_lite", {**LITE, "mlp_layer_types": ["sparse"] * 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
        ("glm4_moe_lite", {**LITE, "attention_bias": True, "rope_parameters": dict(**YARN, mscale=1.0, mscale_all_dim=0.6)}),
        ("youtu", {**BASE, **MLA}),
        ("youtu", {**BASE, **MLA, "q_lora_rank": 28, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ],
)
def test_other_names_of_the_same_model(kind, shape, stir, tmp_path):
    """Read as the family that computes the same, written as that, and there the same again."""
    config = AutoConfig.for_model(kind, **shape)
    theirs = stir(AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager"), 3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs")
    assert ours.config.model_type == "deepseek_v3"
    assert_same_function(theirs, ours, shape["vocab_size"], seed=5)
    save(ours, tmp_path / "again")
    again, report = read_theirs(tmp_path / "again")
    assert not any(report.values()), report
    assert_same_function(again, ours, shape["vocab_size"], seed=6)


@pytest.mark.parametrize("kind", SHAPES)
def test_bfloat16_round_trip(kind, stir, tmp_path):
    their_model(kind, shape_of(kind, 1), stir, 5).save_pretrained(tmp_path / "wide")
    AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs")
    assert ours.embed_tokens.weight.dtype == torch.bfloat16
    assert all(layer.gate.e_score_correction_bias.dtype == torch.float32 for _, layer in ours.sparse_layers()
               if layer.gate.e_score_correction_bias is not None)  # fmt: skip
    save(ours, tmp_path / "again")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")
    wide, _ = load(tmp_path / "theirs", dtype=torch.float32)
    again, _ = read_theirs(tmp_path / "again")
    assert_same_function(again, wide, 150, seed=1)


@pytest.mark.parametrize("kind", SHAPES)
def test_sharded_files(kind, stir, tmp_path):
    theirs = their_model(kind, shape_of(kind, 0), stir, 3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours, _ = load(tmp_path / "theirs")
    assert_same_function(theirs, ours, 150, seed=2)
    save(ours, tmp_path / "again", max_shard_bytes=60_000)
    files = sorted((tmp_path / "again").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 80_000 for file in files)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")
    again, report = read_theirs(tmp_path / "again")
    assert not any(report.values()), report
    assert_same_function(again, ours, 150, seed=2)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("deepseek_v3", {"rope_theta": 5000.0, "rope_scaling": None}),
        ("deepseek_v3", {"rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 1.0, "mscale_all_dim": 0.6, "original_max_position_embeddings": 32}}),
        ("deepseek_v2", {"rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 32}}),
        ("deepseek_v2", {"rope_theta": 3000}),
        # As Kimi K2 has it: no ramp between slow and fast pairs.
        ("deepseek_v3", {"rope_theta": 100, "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 1.0, "beta_slow": 1.0,
                         "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32}}),
        ("deepseek_v3", {}),
        ("glm4_moe", {"rope_theta": 5000, "partial_rotary_factor": 0.25, "rope_scaling": None}),
        ("glm4_moe", {"rope_theta": 5000}),
        ("llama", {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        ("llama", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)  # fmt: skip
def test_older_rope_spelling(kind, rope, stir, tmp_path):
    their_model(kind, shape_of(kind, 0), stir, 3).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = {k: v for k, v in json.loads(file.read_text()).items() if k != "rope_parameters"}
    file.write_text(json.dumps({**values, **rope}))
    theirs, _ = read_theirs(tmp_path)
    ours, _ = load(tmp_path)
    assert_same_function(theirs, ours, 150, seed=4)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_modules_announced_but_not_stored(kind, stir, tmp_path):
    """transformers writes num_nextn_predict_layers (1 by default) and no module."""
    their_model(kind, shape_of(kind, 0), stir, 3).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    ours, _ = load(tmp_path)
    assert ours.config.num_nextn_predict_layers == 0
    assert len(ours.mtp) == 0


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deepseek_v3", dict(num_hidden_layers=2, num_nextn_predict_layers=2)),
        ("deepseek_v3", dict(num_hidden_layers=1, num_nextn_predict_layers=1, first_k_dense_replace=1, q_lora_rank=20,
                             n_shared_experts=0, rope_parameters=dict(**YARN, mscale=1.0, mscale_all_dim=0.6))),
        ("deepseek_v3", dict(num_hidden_layers=2, num_nextn_predict_layers=1, tie_word_embeddings=True)),
        ("glm4_moe", dict(num_hidden_layers=2, num_nextn_predict_layers=3, use_qk_norm=True)),
    ],
)  # fmt: skip
@torch.no_grad()
def test_multi_token_prediction(kind, changes, stir, tmp_path):
    """transformers' own loader and layers read our modules. It looks for the published models' layer numbers only, so
    the test tells it ours. It numbers positions from 1 there, which rotary embedding cannot see."""
    config = ModelConfig(model_type=kind, **{**shape_of(kind, 0), **changes})
    ours = stir(Transformer(config).initialize(0), 7)
    save(ours, tmp_path / "model")
    main, report = read_theirs(tmp_path / "model")
    modules = range(config.num_hidden_layers, config.total_layers)
    prefixes = tuple(f"model.layers.{layer}." for layer in modules)
    assert report["unexpected_keys"]
    assert all(name.startswith(prefixes) for name in report.pop("unexpected_keys"))
    assert not any(report.values()), report
    assert_same_function(main, ours, 150, seed=6)

    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}.*" for layer in modules]
    theirs = MtpModel.from_pretrained(main).eval()
    ids = torch.randint(150, (2, 40), generator=torch.Generator().manual_seed(1))
    their_hidden, our_hidden = main.model(ids).last_hidden_state, ours.hidden(ids)
    for depth in range(config.num_nextn_predict_layers):
        further = ids[:, depth + 1 :]
        positions = torch.arange(further.shape[1])[None] + 1
        their_hidden = theirs.forward_layer(depth, their_hidden[:, :-1], positions, None, input_ids=further)
        our_hidden = ours.mtp_hidden(our_hidden[:, :-1], further, depth)
        wanted, logits = theirs._project_to_logits(their_hidden), ours.lm_head(our_hidden)
        assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()

    again, _ = load(tmp_path / "model")
    assert again.config == config
    save(again, tmp_path / "again")
    assert_same_tensors(tmp_path / "model", tmp_path / "again")


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_dense_layers_where_transformers_builds_none_are_refused(kind, tmp_path):
    config = ModelConfig(model_type=kind, **{**FAMILIES[kind], "first_k_dense_replace": 1, "intermediate_size": 20})
    with pytest.raises(UsageError, match=r"^first_k_dense_replace is 1; the layers of a .* on disk are all sparse"):
        save(Transformer(config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["deepseek_v2", "llama"])
def test_hidden_size_refused_as_transformers_does(kind, tmp_path):
    shape = {**FAMILIES[kind], "hidden_size": 50, **({} if kind == "deepseek_v2" else {"head_dim": 12})}
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        AutoConfig.for_model(kind, **shape)
    config = ModelConfig(model_type=kind, **shape)
    with pytest.raises(UsageError, match=r"^hidden_size is 50; .* multiple of num_attention_heads"):
        save(Transformer(config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_modules_of_deepseek_v2_refused(tmp_path):
    with pytest.raises(ValueError, match="num_mtp_layers"):
        AutoConfig.for_model("deepseek_v2", **FAMILIES["deepseek_v2"]).get_mtp_config()
    config = ModelConfig(model_type="deepseek_v2", **FAMILIES["deepseek_v2"], num_nextn_predict_layers=1)
    with pytest.raises(UsageError, match=r"^num_nextn_predict_layers is 1; a deepseek_v2 model"):
        save(Transformer(config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_dense_modules_refused(stir, tmp_path, monkeypatch):
    shape = {**FAMILIES["deepseek_v3"], "first_k_dense_replace": 4, "num_nextn_predict_layers": 1}
    ours = stir(Transformer(ModelConfig(model_type="deepseek_v3", **shape)), 0)
    with pytest.raises(UsageError, match=r"^first_k_dense_replace is 4; on disk it is at most num_hidden_layers"):
        save(ours, tmp_path / "model")
    monkeypatch.setattr("cadre.hub.save.check_expressible", lambda config: None)
    save(ours, tmp_path / "model")
    main, _ = read_theirs(tmp_path / "model")
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]
    with pytest.raises(RuntimeError, match="missing"):
        MtpModel.from_pretrained(main)


def test_half_rotation_of_deepseek_v2_refused(stir, tmp_path, monkeypatch):
    ours = stir(Transformer(ModelConfig(model_type="deepseek_v2", **FAMILIES["deepseek_v2"], rope_interleave=False)), 0)
    with pytest.raises(UsageError, match=r"^rope_interleave is false"):
        save(ours, tmp_path / "model")
    monkeypatch.setattr("cadre.hub.save.check_expressible", lambda config: None)
    save(ours, tmp_path / "model")
    theirs, _ = read_theirs(tmp_path / "model")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() > 0.01


YARN_BESIDE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {"rope_scaling": YARN_BESIDE}) for family in ("deepseek_v3", "glm4_moe", "llama")),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
        ("deepseek_v3", {"rope_parameters": {**YARN, "factor": 5.0, "truncate": None}}),
        ("glm4_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "partial_rotary_factor": None}),
        ("deepseek_v2", {"rope_interleave": False}),
    ],
)
def test_what_somebody_has_changed_in_a_config_means_what_it_means_to_transformers(stir, tmp_path, family, changes):
    """As model cards say how: a scaling added beside the newer spelling, which is there; nulls; fields without effect."""
    rope = {} if family == "deepseek_v3" else {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    save(stir(Transformer(ModelConfig(model_type=family, **{**FAMILIES[family], **rope})), 0), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    ours, (theirs, _) = load(tmp_path / "model")[0], read_theirs(tmp_path / "model")
    ids = torch.arange(40)[None] % 31
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_tied_head_may_be_stored_too(stir, tmp_path):
    shape = {"model_type": "llama", **FAMILIES["llama"], "tie_word_embeddings": True}
    ours = stir(Transformer(ModelConfig(**shape)), 0)
    save(ours, tmp_path / "model")
    file, tensors = tmp_path / "model" / "model.safetensors", stored(tmp_path / "model")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"})
    assert torch.equal(load(tmp_path / "model")[0].embed_tokens.weight, ours.embed_tokens.weight)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path / "model")
