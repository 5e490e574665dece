import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadre.errors import UsageError
from cadre.hub.directory import INDEX, WEIGHTS, display_name, load_config, model_directory, set_aside, stored_tensors
from cadre.hub.save import save


@pytest.fixture
def model_path(build, tmp_path):
    save(build(num_nextn_predict_layers=1), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded_path(build, tmp_path):
    save(build(), tmp_path / "model", max_shard_bytes=100_000)
    return tmp_path / "model"


def test_a_model_is_called_by_its_folder_and_a_runs_by_the_run(tmp_path):
    run = tmp_path / "pocket"
    (run / "model").mkdir(parents=True)
    assert display_name(run / "model") == "model"
    (run / "recipe.toml").touch()
    assert display_name(run) == display_name(run / "model") == "pocket"
    assert display_name("/model") == "model"


def refused(path, pattern):
    with pytest.raises(UsageError, match=pattern) as caught:
        stored_tensors(path)
    assert "\n" not in str(caught.value)


def test_model_directory_and_run_directory(model_path):
    assert model_directory(model_path) == model_path
    assert model_directory(str(model_path.parent)) == model_path


def test_model_found_between_the_renames_of_a_crashed_save(model_path):
    model_path.rename(set_aside(model_path))
    assert model_directory(model_path) == set_aside(model_path)
    assert model_directory(model_path.parent) == set_aside(model_path)
    assert not model_path.exists()  # who only reads may have no right to write


def test_no_model_directory(tmp_path):
    with pytest.raises(UsageError, match=r"is no model directory: no config\.json$"):
        model_directory(tmp_path)
    with pytest.raises(UsageError, match=r"is no model directory: no such folder$"):
        model_directory(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"no such folder; to fetch it: hf download an-owner/a-model --local-dir DIR$"):
        model_directory("an-owner/a-model")
    (tmp_path / "file").write_text("text")
    with pytest.raises(UsageError, match=r"is no model directory: not a folder$"):
        model_directory(tmp_path / "file")


def test_a_model_in_a_closed_folder(nobodys_folder):
    (nobodys_folder / "model").mkdir(mode=0)
    with pytest.raises(UsageError) as caught:
        model_directory(nobodys_folder)
    assert str(caught.value) == f"{nobodys_folder / 'model' / 'config.json'}: cannot be read (Permission denied)"


@pytest.mark.parametrize("read", [model_directory, load_config])
def test_a_name_that_is_too_long(read):
    with pytest.raises(UsageError, match=r"^x+.*: cannot be read \(File name too long\)$"):
        read("x" * 300)


def test_weights_that_may_not_be_read(nobodys_folder):
    file = nobodys_folder / WEIGHTS
    save_file({"a": torch.zeros(1)}, file)
    file.chmod(0)
    with pytest.raises(UsageError) as caught:
        stored_tensors(nobodys_folder)
    assert str(caught.value) == f"{file}: cannot be read (Permission denied)"


@pytest.mark.parametrize("name", [WEIGHTS, "other.safetensors", INDEX, "generation_config.json"])
def test_nobody_waits_for_a_pipe(model_path, name):
    (model_path / WEIGHTS).unlink()
    (model_path / name).unlink(missing_ok=True)
    os.mkfifo(model_path / name)
    with pytest.raises(UsageError) as caught:
        load_config(model_path)
        stored_tensors(model_path)
    assert str(caught.value) == f"{model_path / name}: is a pipe or a device; wanted a file"


def test_an_index_of_a_name_that_is_too_long(sharded_path):
    (sharded_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}))
    refused(sharded_path, "cannot be read .File name too long")


@pytest.mark.parametrize("name", [INDEX, "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"eos_token_id": ' + "1" * 5000 + "}", "[]"])
def test_json_that_is_deep_or_long_or_no_object(sharded_path, name, content):
    (sharded_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        load_config(sharded_path)
        stored_tensors(sharded_path)
    assert str(caught.value).startswith(str(sharded_path / name)) and "\n" not in str(caught.value)


def test_a_layer_of_a_number_that_python_does_not_read(model_path, config):
    tensors = load_file(model_path / WEIGHTS)
    save_file({**tensors, f"model.layers.{'9' * 5000}.x": torch.zeros(1)}, model_path / WEIGHTS)
    assert load_config(model_path) == config(num_nextn_predict_layers=1)


def test_load_config(model_path, config):
    expected = config(num_nextn_predict_layers=1)
    for path in (model_path, model_path.parent, model_path / "config.json", str(model_path)):
        assert load_config(path) == expected
    with pytest.raises(UsageError, match="is no model directory"):
        load_config(model_path / "absent")


def test_load_config_without_weights_believes_the_file(model_path, config):
    (model_path / WEIGHTS).unlink()
    assert load_config(model_path) == config(num_nextn_predict_layers=1)


def test_load_config_drops_modules_that_are_not_stored(model_path, config):
    tensors = load_file(model_path / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "layers.2." not in k}, model_path / WEIGHTS)
    assert load_config(model_path) == config(num_nextn_predict_layers=0)


def test_dense_layers_are_recounted_with_the_modules_dropped(build, tmp_path, monkeypatch):
    monkeypatch.setattr("cadre.hub.save.check_expressible", lambda config: None)
    save(build(num_nextn_predict_layers=1, first_k_dense_replace=3), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "layers.2." not in k}, tmp_path / WEIGHTS)
    assert load_config(tmp_path).first_k_dense_replace == 2


def test_stored_tensors_tells_headers(model_path):
    stored = stored_tensors(model_path)
    tensors = load_file(model_path / WEIGHTS)
    assert stored.keys() == tensors.keys()
    assert all(part.shape == tuple(tensors[name].shape) and part.dtype == "F32" for name, part in stored.items())


def test_single_file_of_any_name(model_path):
    (model_path / WEIGHTS).rename(model_path / "weights.safetensors")
    assert stored_tensors(model_path)["lm_head.weight"].file.name == "weights.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_unopened(model_path, name):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was opened",)

    (model_path / WEIGHTS).unlink()
    (model_path / name).write_bytes(pickle.dumps(Trap()))
    refused(model_path, rf"{name}: pickle files can run code; Cadre loads safetensors only")


def test_no_weights(model_path):
    (model_path / WEIGHTS).unlink()
    refused(model_path, "holds a config.json but no weights")


def test_shards_without_index(sharded_path):
    (sharded_path / INDEX).unlink()
    refused(sharded_path, rf"safetensors files, but no {INDEX}")


def test_missing_shard(sharded_path):
    shard = sorted(sharded_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded_path, f"{shard.name} is missing")


def test_tensor_not_where_the_index_says(sharded_path):
    index = json.loads((sharded_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    (sharded_path / INDEX).write_text(json.dumps(index))
    refused(sharded_path, r"model\.norm\.weight should be in .*, but is not")


def test_tensor_in_two_files(sharded_path):
    first, last = sorted(sharded_path.glob("model-*.safetensors"))[:: len(list(sharded_path.glob("model-*"))) - 1]
    save_file({**load_file(last), **dict([next(iter(load_file(first).items()))])}, last)
    refused(sharded_path, f"is in both {first.name} and {last.name}")


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": {"b": 1}}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "config.json"}}',
    ],
)
def test_damaged_index(sharded_path, content):
    (sharded_path / INDEX).write_text(content)
    refused(sharded_path, INDEX)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 5000, -1000, -1])
def test_truncated_file(model_path, kept):
    file = model_path / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: kept if kept >= 0 else len(content) + kept])
    refused(model_path, rf"{WEIGHTS}: truncated, damaged or no safetensors file \(")


def tampered(content, change):
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["lm_head.weight"].update(shape=[131, 49]),
        lambda header: header["lm_head.weight"].update(dtype="BF16"),
        lambda header: header["lm_head.weight"].update(dtype="X9"),
        lambda header: header["model.norm.weight"].update(data_offsets=[0, 48 * 4]),
        lambda header: header["lm_head.weight"].update(data_offsets=[10**12, 10**12 + 131 * 48 * 4]),
        lambda header: header["lm_head.weight"].pop("shape"),
        lambda header: header.pop("lm_head.weight"),
    ],
)
def test_tampered_header(model_path, change):
    file = model_path / WEIGHTS
    file.write_bytes(tampered(file.read_bytes(), change))
    refused(model_path, rf"{WEIGHTS}: truncated, damaged or no safetensors file \(")


def test_bytes_after_the_end(model_path):
    with (model_path / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(model_path, "truncated, damaged or no safetensors file")


def test_wild_names_do_no_harm(model_path):
    """Names are compared, never trusted: odd ones must reach the check that refuses unexpected tensors."""
    tensors = {**load_file(model_path / WEIGHTS), "model.layers.": torch.ones(1), "model.layers.x.y": torch.ones(1)}
    save_file(tensors, model_path / WEIGHTS)
    assert load_config(model_path).num_nextn_predict_layers == 1
