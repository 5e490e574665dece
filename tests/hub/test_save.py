import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.shapes import FAMILIES

import cadre
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError
from cadre.hub.directory import INDEX, WEIGHTS, in_making, set_aside
from cadre.hub.load import load
from cadre.hub.save import check_expressible, save


def files(path):
    return sorted(entry.name for entry in path.iterdir())


def same(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_files_of_a_model(build, tmp_path):
    cadre.save(build(bos_token_id=3, eos_token_id=[4, 5]), tmp_path / "a" / "model")
    assert files(tmp_path / "a") == ["model"]
    assert files(tmp_path / "a" / "model") == ["config.json", "generation_config.json", WEIGHTS]
    generation = json.loads((tmp_path / "a" / "model" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 3, "eos_token_id": [4, 5]}
    values = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    assert values["dtype"] == "float32"
    assert values["num_nextn_predict_layers"] == 0
    assert values["scoring_func"] == "sigmoid"
    assert (values["num_key_value_heads"], values["n_group"], values["topk_group"]) == (4, 1, 1)
    assert "transformers_version" not in values


def test_weights_are_as_readable_as_the_config(build, tmp_path):
    save(build(), tmp_path, max_shard_bytes=200_000)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_config_comes_back(config, build, tmp_path, kind):
    changes = dict(rms_norm_eps=1e-5, attention_bias=kind != "mixtral", pad_token_id=1)
    save(build(kind, **changes), tmp_path)
    assert load(tmp_path)[0].config == config(kind, **changes)


def test_scale_of_linear_rope_with_mscale_comes_back(build, tmp_path):
    rope = dict(rope_type="linear", factor=2.0, mscale_all_dim=0.8)
    model = build(rope_parameters=rope)
    save(model, tmp_path)
    assert load(tmp_path)[0].config == model.config


def test_parameters_keep_their_dtype(build, tmp_path):
    save(build().bfloat16(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    float32 = [name for name, tensor in tensors.items() if tensor.dtype == torch.float32]
    assert float32 == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert {tensor.dtype for name, tensor in tensors.items() if name not in float32} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_casts_all_but_the_correction_bias(build, tmp_path):
    model = build(num_nextn_predict_layers=1)
    save(model, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / WEIGHTS)
    bias = tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(bias, model.layers[1].mlp.gate.e_score_correction_bias)
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype, large, wanted", [
    (torch.int8, 0.1, "dtype is torch.int8; weights are saved in float64, float32, bfloat16, float16"),
    (torch.float8_e4m3fn, 0.1, "dtype is torch.float8_e4m3fn"),
    (torch.float16, 1e6, "norm.weight holds numbers too large for float16; take bfloat16 or float32"),
])  # fmt: skip
def test_a_dtype_that_would_lose_the_weights_leaves_the_model_that_is_there(build, tmp_path, dtype, large, wanted):
    model = build()
    save(model, tmp_path / "model")
    before = model.norm.weight[0].item()
    with torch.no_grad():
        model.norm.weight[0] = large
    with pytest.raises(UsageError, match=wanted):
        save(model, tmp_path / "model", dtype=dtype)
    assert files(tmp_path) == ["model"]
    assert load(tmp_path / "model")[0].norm.weight[0].item() == before


@pytest.mark.parametrize("tied", [False, True])
def test_modules_carry_copies_of_embedding_and_head(build, tmp_path, tied):
    model = build(num_nextn_predict_layers=1, tie_word_embeddings=tied)
    save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], model.embed_tokens.weight)
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], model.lm_head.weight)
    assert ("lm_head.weight" in tensors) is not tied


@settings(max_examples=15, deadline=None)
@given(limit=st.integers(1, 400_000))
def test_shards(build, tmp_path_factory, limit):
    path = tmp_path_factory.mktemp("shards") / "model"
    model = build(num_nextn_predict_layers=1)
    save(model, path, max_shard_bytes=limit)
    assert same(load(path)[0], model)
    if (path / WEIGHTS).exists():
        assert not (path / INDEX).exists()
        return
    index = json.loads((path / INDEX).read_text())
    placed, total = {}, 0
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
        placed.update(dict.fromkeys(tensors, file.name))
    assert index == {"metadata": {"total_size": total}, "weight_map": placed}


def test_an_older_model_is_replaced_as_a_whole(build, tmp_path):
    tokenizer = train_tokenizer(["text"], 260)
    save(build(vocab_size=300), tmp_path / "model", tokenizer, max_shard_bytes=50_000)
    save(build(seed=1), tmp_path / "model")
    assert files(tmp_path) == ["model"]
    assert files(tmp_path / "model") == ["config.json", "generation_config.json", WEIGHTS]
    assert same(load(tmp_path / "model")[0], build(seed=1))


def test_a_loaded_model_can_be_saved_over_its_own_files(build, tmp_path):
    save(build(), tmp_path / "model")
    model, _ = load(tmp_path / "model")
    with torch.no_grad():
        model.norm.weight.add_(1)
    save(model, tmp_path / "model")
    assert same(load(tmp_path / "model")[0], model)


def test_an_empty_folder_and_a_link_are_fine(build, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(build(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(load(tmp_path / "real")[0], build())


@pytest.mark.parametrize("foreign", ["thesis.tex", "notes/today.txt", ".git/HEAD"])
def test_other_files_are_never_deleted(build, tmp_path, foreign):
    save(build(), tmp_path / "model")
    file = tmp_path / "model" / foreign
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UsageError, match=f"holds {foreign.split('/')[0]}, so it is not only a model; save to a new folder"):
        save(build(seed=1), tmp_path / "model")
    assert file.read_text() == "mine"
    assert same(load(tmp_path / "model")[0], build())


def test_a_folder_that_is_no_model_is_left_alone(build, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds tokenizer\.json"):
        save(build(), tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        save(build(), tmp_path / "file")
    assert files(tmp_path) == ["file", "tokenizer.json"]


@contextmanager
def small_disk(limit):
    """No file may grow beyond `limit` bytes: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [10, 5_000, 60_000])
def test_failing_to_write_leaves_the_old_model(build, tmp_path, limit):
    save(build(), tmp_path / "model")
    with small_disk(limit), pytest.raises(RunError, match=f"^{tmp_path / 'model'}: the model was not saved: ") as caught:
        save(build(seed=1), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == ["model"]
    assert same(load(tmp_path / "model")[0], build())
    with small_disk(limit), pytest.raises(RunError):
        save(build(seed=1), tmp_path / "other")
    assert files(tmp_path) == ["model"]


def test_full_disk_is_named(build, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cadre.hub.save.save_file", full)
    with pytest.raises(RunError, match=r"model: the model was not saved: the disk is full$"):
        save(build(), tmp_path / "model")
    assert not files(tmp_path)


def test_interruption_leaves_nothing_behind(build, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    save(build(), tmp_path / "model")
    monkeypatch.setattr("cadre.hub.save.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(build(seed=1), tmp_path / "model")
    assert files(tmp_path) == ["model"]
    assert same(load(tmp_path / "model")[0], build())


def test_crash_between_the_renames_is_mended(build, tmp_path):
    path = tmp_path / "model"
    save(build(), path)
    path.rename(set_aside(path))
    save(build(seed=1), in_making(path))
    assert same(load(path)[0], build())
    save(build(seed=2), path)
    assert files(tmp_path) == ["model"]
    assert same(load(path)[0], build(seed=2))


def test_failure_after_a_crash_keeps_the_rescued_model(build, tmp_path):
    path = tmp_path / "model"
    save(build(), path)
    path.rename(set_aside(path))
    with small_disk(5_000), pytest.raises(RunError):
        save(build(seed=1), path)
    assert files(tmp_path) == ["model"]
    assert same(load(path)[0], build())


_SAVE_FOREVER = """
import sys, torch
from cadre.hub.load import load
from cadre.hub.save import save
torch.set_num_threads(1)
model, _ = load(sys.argv[1])
while True:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(parameter.flatten()[0].item() + 1)
    save(model, sys.argv[1], max_shard_bytes=100_000)
    print(flush=True)
"""


def test_kill_at_any_moment_leaves_one_whole_model(build, tmp_path):
    path = tmp_path / "model"
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save(model, path)
    last = 0.0
    for pause in (0.0, 0.003, 0.011):
        process = subprocess.Popen([sys.executable, "-c", _SAVE_FOREVER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        values = {parameter.flatten()[0].item() for parameter in load(path)[0].parameters()}
        assert len(values) == 1
        assert values.pop() > last
        last += 1


def test_expressible(config):
    for kind in FAMILIES:
        check_expressible(config(kind))
    check_expressible(config(num_nextn_predict_layers=2, first_k_dense_replace=2, n_shared_experts=0))
    check_expressible(config(hidden_size=50))
    check_expressible(config("glm4_moe", hidden_size=50))
