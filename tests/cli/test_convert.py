import json
import shutil

import pytest
import torch
import typer
from typer.testing import CliRunner

import cadre
from cadre.cli.convert import convert
from cadre.errors import UsageError
from cadre.hub.directory import set_aside

gguf = pytest.importorskip("gguf")
APP = typer.Typer()
APP.command()(convert)


def run(*arguments: object):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def test_gguf_by_the_ending(model_dir, tmp_path):
    result = run(model_dir, tmp_path / "there" / "m.gguf", "--dtype", "q8_0")
    assert result.exit_code == 0, result.output
    assert "m.gguf: 0." in result.stdout
    fields = gguf.GGUFReader(tmp_path / "there" / "m.gguf").fields
    assert fields["general.architecture"].contents() == "deepseek2" and fields["general.name"].contents() == "m"


def test_gguf_by_name(model_dir, tmp_path):
    result = run(model_dir, tmp_path / "m", "--to", "gguf")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m").read_bytes()[:4] == b"GGUF"


def test_another_dtype(model_dir, tmp_path):
    result = run(model_dir, tmp_path / "half", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    whole, (half, tokenizer) = cadre.load(model_dir)[0], cadre.load(tmp_path / "half")
    assert half.embed_tokens.weight.dtype == torch.bfloat16 and tokenizer is not None
    assert torch.equal(half.embed_tokens.weight, whole.embed_tokens.weight.bfloat16())


def test_there_and_back(model_dir, tmp_path):
    """A GGUF file becomes a directory that transformers reads, with its tokenizer and chat template."""
    run(model_dir, tmp_path / "m.gguf")
    result = run(tmp_path / "m.gguf", tmp_path / "back")
    assert result.exit_code == 0, result.output
    model, tokenizer = cadre.load(model_dir)
    back, same = cadre.load(tmp_path / "back")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    assert same.encode("The people 123").ids == tokenizer.encode("The people 123").ids
    configs = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (model_dir, tmp_path / "back")]
    assert configs[0] == configs[1] and back.config.eos_token_id == 1
    assert cadre.generate(back, same, "The", max_new_tokens=5, temperature=0) == cadre.generate(
        model, tokenizer, "The", max_new_tokens=5, temperature=0
    )


@pytest.mark.parametrize("in_place, crashed", [(False, False), (True, False), (True, True)])
def test_only_weights_change(model_dir, tmp_path, in_place, crashed):
    """Templates and settings are the model's own, and nowhere else once it is converted in place."""
    source = tmp_path / "source"
    shutil.copytree(model_dir, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 2]}')
    kept = {file.name: file.read_bytes() for file in source.iterdir() if file.suffix != ".safetensors"}
    target = source if in_place else tmp_path / "target"
    options = ["--dtype", "bf16"]
    if crashed:  # between the two renames of an earlier attempt
        source.rename(set_aside(source))
    if in_place:
        refused = run(source, target, *options)
        assert refused.exit_code == 1 and "is there already: choose another name, or give --force" in str(refused.exception)
        assert {file.name: file.read_bytes() for file in source.iterdir() if file.suffix != ".safetensors"} == kept
        options.append("--force")
    result = run(source, target, *options)
    assert result.exit_code == 0, result.output
    found = {file.name: file.read_bytes() for file in target.iterdir() if file.suffix != ".safetensors"}
    configs = [json.loads(files.pop("config.json")) for files in (kept, found)]
    assert found == kept and "chat_template.jinja" in found
    assert configs[1] == configs[0] | {"dtype": "bfloat16", "eos_token_id": [1, 2]}
    assert cadre.load(target)[0].norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "target, options, message",
    [
        (".", ["--to", "gguf"], "is a folder"),
        ("half", ["--dtype", "q8_0"], "q8_0 is for GGUF"),
    ],
)
def test_bad_usage(model_dir, tmp_path, target, options, message):
    result = run(model_dir, tmp_path / target, *options)
    assert isinstance(result.exception, UsageError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_file(model_dir, tmp_path):
    run(model_dir, tmp_path / "m.gguf")
    result = run(tmp_path / "m.gguf", tmp_path / "other.gguf")
    assert isinstance(result.exception, UsageError) and "GGUF is written of a model directory" in str(result.exception)


def test_no_model(tmp_path):
    result = run(tmp_path / "absent", tmp_path / "m.gguf")
    assert isinstance(result.exception, UsageError) and "no such folder" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_too_large_for_16_bits(model_dir, tmp_path):
    model, _ = cadre.load(model_dir)
    with torch.no_grad():
        model.norm.weight[0] = 1e5
    cadre.save(model, tmp_path / "large")
    assert run(tmp_path / "large", tmp_path / "large.gguf", "--to", "gguf", "--dtype", "f32").exit_code == 0
    for source in ("large", "large.gguf"):
        result = run(tmp_path / source, tmp_path / "half", "--dtype", "f16")
        assert isinstance(result.exception, UsageError)
        assert "norm.weight holds numbers too large for float16" in str(result.exception)
        assert not (tmp_path / "half").exists()
