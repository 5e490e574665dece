"""What a run may go on with."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cadre.data.prepare import prepare
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.files import checksum
from cadre.hub.directory import set_aside
from cadre.hub.tokenizer import save_tokenizer
from cadre.train.checkpoint import _state_file, checkpoints, read_state, set_aside_damaged
from cadre.train.recipe import read_recipe
from cadre.train.resume import held_recipe, resume
from cadre.train.run import only_writer
from tests.runs import write_corpus
from tests.train.conftest import given_tokenizer, without_vocab_size


def test_what_is_no_run_cannot_be_resumed(lab):
    for path in ("corpus", "absent", "tiny.toml"):
        with pytest.raises(UsageError, match=r"is no run directory \(it has no recipe.toml\)"):
            held_recipe(lab.folder / path)
    (lab.folder / "copied").mkdir()
    shutil.copy(lab.folder / "tiny.toml", lab.folder / "copied" / "recipe.toml")
    with pytest.raises(UsageError, match=r"is no run directory \(model.vocab_size is missing in its recipe.toml\)"):
        lab.resume("copied")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(lab):
    first = lab.start("run")
    again = lab.resume("run")
    assert again.checkpoint is None
    assert all(torch.equal(x, y) for x, y in zip(first.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("override, wanted", [
    ("model.hidden_size=48", "model.hidden_size is 48, but the run began with 32"),
    ("model.n_routed_experts=8", "model.n_routed_experts is 8, but the run began with 4"),
    ("model.rope_parameters={rope_theta=5000.0}", "model.rope_parameters is .*5000"),
    ("data.seq_len=8", "data.seq_len is 8, but the run began with 16"),
    ("data.source=sotu", "data.source is 'sotu', but the run began with"),
    ("data.vocab_size=310", "data.vocab_size is 310"),
    ("data.separate_documents=true", "data.separate_documents is True"),
    ("train.batch=2", "train.batch is 2, but the run began with 4"),
    ("train.seed=3", "train.seed is 3"),
    ("optimizer.name=muon", "optimizer.name is 'muon'"),
    (f"eval.prompts=['{'the people ' * 99}']", "eval.prompts: .* the model's context"),  # as when a run begins
])  # fmt: skip
def test_what_cannot_go_on_is_refused_by_name(lab, override, wanted):
    lab.start("run")
    before = (lab.folder / "run" / "recipe.toml").read_text()
    with pytest.raises(UsageError, match=wanted):
        lab.resume("run", override)
    assert (lab.folder / "run" / "recipe.toml").read_text() == before


def test_how_training_goes_on_may_change_and_is_kept(lab):
    lab.start("run")
    run = lab.resume("run", "optimizer.lr=0.5", "train.steps=77", "checkpoint.keep=5", "train.dtype=bfloat16")
    assert (run.recipe.optimizer.lr, run.total_steps, run.dtype) == (0.5, 77, torch.bfloat16)
    assert held_recipe(run.path) == run.recipe
    assert lab.resume("run").recipe == run.recipe


@pytest.mark.parametrize("options, said", [
    (["schedule.kind=constant"], None),
    (["schedule.kind=cosine"], "what remains of its cosine schedule"),
    (["schedule.kind=constant", "train.mtp_weight_final=0.1"], "where train.mtp_weight_final begins"),
    (["train.mtp_weight_final=0.1"], "what remains of its decay schedule and where train.mtp_weight_final begins"),
])  # fmt: skip
def test_another_length_says_what_it_changes(lab, options, said):
    lab.train(lab.start("run", "train.steps=2", *options))
    notes = []
    path = lab.folder / "run"
    resume(path, read_recipe(str(path / "recipe.toml"), ["train.steps=4"]), torch.device("cpu"), notes.append)
    changed = [note for note in notes if "length has changed" in note]
    assert changed == ([] if said is None else [f"the run's length has changed, and with it {said}"])


@pytest.fixture
def stopped(lab):
    """A run of 4 steps that has made them all; its report is the command line's part and not there."""
    lab.train(lab.start("run", "train.steps=4", "train.minutes=1"))
    return lab.folder / "run"


def test_an_edited_recipe_is_held_against_the_checkpoint(lab, stopped):
    recipe = stopped / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("routed_scaling_factor = 1.0", "routed_scaling_factor = 2.0"))
    with pytest.raises(UsageError, match=r"model\.routed_scaling_factor is 2\.0, but the checkpoint was trained with 1\.0"):
        lab.resume("run", "train.steps=9")


def test_a_changed_corpus_is_refused(lab, stopped):
    shutil.rmtree(lab.folder / "corpus")
    write_corpus(lab.folder / "corpus", seed=1)
    with pytest.raises(UsageError, match=r"the corpus has changed .*restore the text"):
        lab.resume("run", "train.steps=9")


def test_a_changed_tokenizer_is_refused(lab):
    without_vocab_size(lab)
    given_tokenizer(lab.folder / "tok", 270)
    lab.train(lab.start("run", f"data.tokenizer={lab.folder / 'tok'}", "train.steps=4"))
    save_tokenizer(train_tokenizer(["other words make other pairs"] * 9, 270), lab.folder / "tok")
    with pytest.raises(UsageError, match=r"the tokenizer has changed .*restore the tokenizer file"):
        lab.resume("run", "train.steps=9")


def test_a_finished_run_says_so(lab, stopped):
    (stopped / "report.html").write_text("the command line's part")
    with pytest.raises(UsageError, match="has already finished its 4 steps: give more with --steps"):
        lab.resume("run")
    assert lab.resume("run", "train.steps=9").total_steps == 9


def test_a_finished_run_says_so_without_its_text(lab, stopped):
    (stopped / "report.html").write_text("the command line's part")
    shutil.rmtree(lab.folder / "corpus")
    with pytest.raises(UsageError, match="has already finished its 4 steps"):
        lab.resume("run")
    with pytest.raises(UsageError, match=r"has taken .* minutes already"):
        lab.resume("run", "train.minutes=1e-6")
    with pytest.raises(UsageError, match="corpus: no such file or folder"):
        lab.resume("run", "train.steps=9")


def test_an_end_that_was_cut_off_is_made_up_for(lab, stopped):
    """Killed after the last step, before the report: resuming only ends the run."""
    metrics = stopped / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-2]))
    (stopped / "report.html").write_text("of an earlier stop")
    result, _ = lab.train(lab.resume("run"))
    assert (result.steps, result.stopped) == (4, None) and result.bits_per_byte is not None
    assert [json.loads(line).get("event") for line in metrics.read_text().splitlines()][-3:] == ["resumed", None, "finished"]


def test_the_newest_checkpoint_counts_and_a_damaged_one_is_passed_over(lab):
    lab.train(lab.start("run"))
    older, newest = checkpoints(lab.folder / "run")
    assert lab.resume("run").checkpoint == newest
    lab.train(lab.start("whole"))
    (newest / "weights.safetensors").write_bytes(b"")
    run = lab.resume("run")
    assert run.checkpoint == older
    lab.train(run)
    ends = [load_file(checkpoints(lab.folder / name)[-1] / "weights.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    for path in checkpoints(run.path):
        (path / "state.json").write_text("{")
    with pytest.raises(UsageError, match="step-00000012: damaged checkpoint"):
        lab.resume("run")


def test_damage_in_the_middle_of_a_large_file_is_found(lab):
    run = lab.start("run", "train.steps=4")
    lab.train(run)
    path = checkpoints(run.path)[-1]
    state = read_state(path)
    large = path / "weights.safetensors"
    with large.open("ab") as file:
        file.truncate(3 * 2**20)
    (path / "state.json").write_bytes(_state_file(state, {large.name: checksum(large)}))
    notes: list[str] = []
    set_aside_damaged(run.path, notes.append)
    assert not notes
    with large.open("r+b") as file:
        file.seek(3 * 2**19)
        file.write(b"x")
    with pytest.raises(UsageError, match=r"weights\.safetensors is not as it was written"):
        for other in checkpoints(run.path)[:-1]:
            shutil.rmtree(other)
        set_aside_damaged(run.path, notes.append)


def test_a_prepared_folder_is_trained_on_and_resumed_without_its_text(lab):
    shards = prepare(str(lab.folder / "corpus"), vocab_size=300, out=lab.folder / "shards")
    shutil.rmtree(lab.folder / "corpus")
    source = f"data.source={lab.folder / 'shards'}"
    lab.train(lab.start("run", source, "train.steps=6"))
    run = lab.resume("run", "train.steps=8")
    assert run.data.path == shards.path and lab.train(run)[0].steps == 8


def test_a_run_that_is_being_trained_is_left_as_it_is(lab):
    """By whoever is refused: its recipe is what it will be resumed with after a crash."""
    lab.train(lab.start("run", "train.steps=8"))
    path = lab.folder / "run"
    (checkpoints(path)[-1] / "weights.safetensors").write_bytes(b"damaged")
    (path / "model").rename(set_aside(path / "model"))  # as for a moment while it is saved
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with only_writer(path), pytest.raises(UsageError, match="another process is training this run"):
        lab.resume("run", "train.steps=20", "optimizer.lr=3.0")
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_models_that_a_crash_left_aside_are_in_their_places_again(lab):
    """Before anything is saved anew."""
    lab.train(lab.start("run", "train.steps=8", "checkpoint.best=true"))
    folders = [lab.folder / "run" / name for name in ("model", "best")]
    kept = [(folder / "model.safetensors").read_bytes() for folder in folders]
    for folder in folders:
        folder.rename(set_aside(folder))
    lab.resume("run", "train.steps=12")
    assert [(folder / "model.safetensors").read_bytes() for folder in folders] == kept
    assert not any(set_aside(folder).exists() for folder in folders)


def test_weights_of_sources_may_change_on_the_way(lab):
    write_corpus(lab.folder / "more", seed=1)
    sources = f'data.source=["{lab.folder / "corpus"}", "{lab.folder / "more"}"]'
    lab.train(lab.start("run", sources, "data.weights=[3, 1]", "train.steps=8"))
    windows = read_state(checkpoints(lab.folder / "run")[-1])["batches"]["windows"]
    assert windows == [24, 8]
    with pytest.raises(UsageError, match=r"data\.source is .*start a new run instead"):
        lab.resume("run", 'data.source=["a", "b"]')
    run = lab.resume("run", "data.weights=[0, 1]", "train.steps=10")
    lab.train(run)
    assert held_recipe(run.path).data.weights == [0.0, 1.0]
    assert read_state(checkpoints(run.path)[-1])["batches"]["windows"] == [24, 16]


def test_a_run_without_weights_gets_none_later(lab, stopped):
    recipe = read_recipe(str(stopped / "recipe.toml"))
    data = recipe.data.model_copy(update={"weights": [1.0, 2.0]})
    with pytest.raises(UsageError, match=r"data\.weights is \[1\.0, 2\.0\], but the run began with None"):
        resume(stopped, recipe.model_copy(update={"data": data}), torch.device("cpu"), lambda line: None)
