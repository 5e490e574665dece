import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cadre.errors import RunError, UsageError
from cadre.model.transformer import Transformer
from cadre.train import checkpoint as module
from cadre.train.checkpoint import Tensors, checkpoints, load_checkpoint, model_tensors, read_state
from cadre.train.optimizer import Optimizer
from cadre.train.recipe import OptimizerSection
from tests.shapes import small


def build(seed: int, name: str = "muon", kind: str = "deepseek_v3", **changes) -> tuple[Transformer, Optimizer]:
    model = Transformer(small(kind, **changes)).initialize(seed)
    with torch.no_grad():
        for _, layer in model.sparse_layers():
            if layer.gate.e_score_correction_bias is not None:
                layer.gate.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(seed))
    optimizer = Optimizer(model, OptimizerSection(name=name, lr=0.01))
    step(model, optimizer, seed)
    return model, optimizer


def step(model: Transformer, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(1.0)


def save_checkpoint(folder: Path, model: Transformer, optimizer: Optimizer, state: dict, keep: int) -> Path:
    return module.save_checkpoint(folder, Tensors(model_tensors(model), optimizer.tensors()), state, keep)


def state(step: int) -> dict:
    identity = {"model": {}, "tokenizer": "abc", "corpus": "def"}
    return {"step": step, "total_steps": 99, "length": [99, None], "identity": identity, "window": [[0.1 + 0.2, 1e-300]]}


def everything(model: Transformer, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in {**model_tensors(model), **optimizer.tensors()}.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16", "muon"])
@pytest.mark.parametrize("kind, changes", [
    ("deepseek_v3", {"num_nextn_predict_layers": 1}), ("llama", {"tie_word_embeddings": True}),
])  # fmt: skip
def test_comes_back_bit_for_bit(tmp_path, name, kind, changes):
    model, optimizer = build(1, name, kind, **changes)
    path = save_checkpoint(tmp_path, model, optimizer, state(7), keep=2)
    assert path.name == "step-00000007" and checkpoints(tmp_path) == [path]
    assert sorted(file.name for file in path.iterdir()) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    other, other_optimizer = build(2, name, kind, **changes)
    load_checkpoint(path, other, other_optimizer)
    assert_same(everything(other, other_optimizer), everything(model, optimizer))
    assert (other.lm_head.weight is other.embed_tokens.weight) == (kind == "llama")
    read = read_state(path)
    assert read.pop("checksums").keys() == {"optimizer.safetensors", "weights.safetensors"} and read == state(7)


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path):
    model = Transformer(small("llama")).initialize(0)
    optimizer = Optimizer(model, OptimizerSection(lr=0.01))
    path = save_checkpoint(tmp_path, model, optimizer, state(0), keep=1)
    load_checkpoint(path, model, optimizer)
    assert optimizer.tensors() == {}


def test_only_the_newest_are_kept_in_order_of_steps(tmp_path):
    model, optimizer = build(1)
    for number in (9, 10, 100, 1000):
        save_checkpoint(tmp_path, model, optimizer, state(number), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000100", "step-00001000"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000100", "step-00001000"]


def test_what_a_crash_leaves_of_one_that_is_dropped_is_no_checkpoint(tmp_path, monkeypatch):
    model, optimizer = build(1)
    save_checkpoint(tmp_path, model, optimizer, state(1), keep=1)

    def crash(path, **options):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, model, optimizer, state(2), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    save_checkpoint(tmp_path, model, optimizer, state(3), keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_step_saved_twice_stays_as_it_was(tmp_path):
    """Replacing a folder is no atomic step, so a crash then could leave none."""
    model, optimizer = build(1)
    path = save_checkpoint(tmp_path, model, optimizer, state(1), keep=1)
    inodes = {file.name: file.stat().st_ino for file in path.iterdir()}
    assert save_checkpoint(tmp_path, model, optimizer, state(1), keep=1) == path
    assert {file.name: file.stat().st_ino for file in path.iterdir()} == inodes


FULL = [OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]  # fmt: skip


@pytest.mark.parametrize("error", [*FULL, OSError(errno.EIO, "Input/output error")], ids=["os", "safetensors", "other"])
@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
def test_a_write_that_fails_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, error, file):
    model, optimizer = build(1)
    previous = save_checkpoint(tmp_path, model, optimizer, state(1), keep=1)
    before = everything(model, optimizer)
    step(model, optimizer, 5)
    real = module.save_file

    def failing(tensors, path, **options):
        if path.name == file:
            path.write_bytes(b"half")
            raise error
        real(tensors, path, **options)

    monkeypatch.setattr(module, "save_file", failing)
    with pytest.raises(RunError, match="checkpoint not written") as caught:
        save_checkpoint(tmp_path, model, optimizer, state(2), keep=1)
    assert ("the disk is full" in str(caught.value)) == (error in FULL)
    assert "step-00000002" in str(caught.value) and "earlier checkpoints are intact" in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == [previous]
    other, other_optimizer = build(3)
    load_checkpoint(previous, other, other_optimizer)
    assert_same(everything(other, other_optimizer), before)


class Killed(BaseException):
    """What no handler may turn into something else: the process ends here."""


def dies_after(calls: int, patch: pytest.MonkeyPatch) -> None:
    """Whatever a save asks of the disk works `calls` times, then the process is dead."""
    left = [calls]

    def mortal(real):
        def call(*arguments, **options):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return real(*arguments, **options)

        return call

    places = [(module, name) for name in ("save_file", "sync")] + [(module.shutil, "rmtree")]
    places += [(module.Path, name) for name in ("mkdir", "replace", "rename", "open")]
    for place, name in places:
        patch.setattr(place, name, mortal(getattr(place, name)))


def test_a_crash_at_any_moment_leaves_a_sound_newest_checkpoint(tmp_path):
    model, optimizer = build(1)
    states = {1: everything(model, optimizer)}
    save_checkpoint(tmp_path, model, optimizer, state(1), keep=1)
    other, other_optimizer = build(3)
    number, crashes = 2, 0
    while True:
        step(model, optimizer, number)
        states[number] = everything(model, optimizer)
        try:
            with pytest.MonkeyPatch.context() as patch:
                dies_after(crashes, patch)
                save_checkpoint(tmp_path, model, optimizer, state(number), keep=1)
        except Killed:
            crashes += 1
        else:
            break
        newest = checkpoints(tmp_path)[-1]
        load_checkpoint(newest, other, other_optimizer)
        assert_same(everything(other, other_optimizer), states[read_state(newest)["step"]])
        number += 1
    assert crashes > 8
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{number:08d}"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["truncated", "missing", "rubbish"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, file, harm):
    model, optimizer = build(1)
    path = save_checkpoint(tmp_path, model, optimizer, state(4), keep=1)
    damaged = path / file
    if harm == "missing":
        damaged.unlink()
    else:
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[: len(whole) // 2] if harm == "truncated" else b"\xff\x00rubbish")
    before = everything(model, optimizer)
    with pytest.raises(UsageError, match=r"step-00000004: damaged checkpoint .*delete this folder"):
        read_state(path)
        load_checkpoint(path, model, optimizer)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": 3}'])
def test_a_state_without_its_parts_is_refused(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UsageError, match="damaged checkpoint"):
        read_state(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, *build(1), state(1), keep=1)
    for changes in ({"num_hidden_layers": 3}, {"moe_intermediate_size": 9}):
        with pytest.raises(UsageError, match=r"not those of the model in recipe\.toml"):
            load_checkpoint(path, *build(1, **changes))


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model, optimizer = build(1)
    path = save_checkpoint(tmp_path, model, optimizer, state(1), keep=1)
    (tmp_path / "other").mkdir()
    longer = save_checkpoint(tmp_path / "other", *build(1, num_hidden_layers=3), state(1), keep=1)
    shutil.copy(longer / "optimizer.safetensors", path)
    with pytest.raises(UsageError, match=r"optimizer state is not that of this model and optimizer \(no 'layers\.2\."):
        load_checkpoint(path, model, optimizer)


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    assert checkpoints(tmp_path) == []
    for name in ("step-1", "step-00000001.old", ".partial-3", "step-00000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_state_is_plain_json(tmp_path):
    path = save_checkpoint(tmp_path, *build(1), state(1), keep=1)
    read = json.loads((path / "state.json").read_text())
    assert read == {**state(1), "checksums": read_state(path)["checksums"], "checksum": read["checksum"]}


def test_a_state_that_was_changed_is_refused(tmp_path):
    file = save_checkpoint(tmp_path, *build(1), state(1), keep=1) / "state.json"
    read = json.loads(file.read_text())
    file.write_text(json.dumps(read))  # laid out otherwise it says the same
    assert read_state(file.parent)["total_steps"] == 99
    file.write_text(json.dumps({**read, "total_steps": 98}))
    with pytest.raises(UsageError, match=r"damaged checkpoint \(state\.json is not as it was written\)"):
        read_state(file.parent)


def test_a_state_without_a_checksum_is_set_aside(tmp_path):
    """As a hand may have written it, or an early version."""
    older, newest = [save_checkpoint(tmp_path, *build(1), state(number), keep=2) for number in (1, 2)]
    read = {name: part for name, part in json.loads((newest / "state.json").read_text()).items() if name != "checksum"}
    (newest / "state.json").write_text(json.dumps(read))
    notes: list[str] = []
    module.set_aside_damaged(tmp_path, notes.append)
    assert checkpoints(tmp_path) == [older] and "damaged checkpoint (state.json has no checksum)" in notes[0]


def three(folder: Path) -> list[Path]:
    model, optimizer = build(1)
    for number in (1, 2, 3):
        save_checkpoint(folder, model, optimizer, state(number), keep=3)
    return checkpoints(folder)


@pytest.mark.parametrize("harm", [
    lambda path: (path / "state.json").write_text("{"),
    lambda path: (path / "optimizer.safetensors").unlink(),
    lambda path: (path / "weights.safetensors").write_bytes((path / "weights.safetensors").read_bytes()[:-1]),
    lambda path: (path / "weights.safetensors").write_bytes(b"x" + (path / "weights.safetensors").read_bytes()[1:]),
])  # fmt: skip
def test_damaged_ones_are_set_aside_and_the_newest_whole_one_counts(tmp_path, harm):
    found, notes = three(tmp_path), []
    module.set_aside_damaged(tmp_path, notes.append)
    assert checkpoints(tmp_path) == found and not notes
    for path in found[1:]:
        harm(path)
    for _ in range(2):
        module.set_aside_damaged(tmp_path, notes.append)
    assert checkpoints(tmp_path) == found[:1] and len(notes) == 2
    assert "step-00000003: damaged checkpoint (" in notes[0]
    assert notes[0].endswith("): set aside as damaged-step-00000003, going on from step-00000001")
    harm(found[0])
    with pytest.raises(UsageError, match=r"step-00000001: damaged checkpoint .*; delete this folder to go on without it"):
        module.set_aside_damaged(tmp_path, notes.append)
    assert checkpoints(tmp_path) == found[:1]


def test_no_checkpoint_is_no_damage(tmp_path):
    module.set_aside_damaged(tmp_path, lambda note: pytest.fail(note))
