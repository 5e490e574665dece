"""What a run may begin with, and what it may go on with."""

import json
import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from cadre.data.shards import prepare
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError
from cadre.files import checksum
from cadre.hub.load import load
from cadre.hub.save import save
from cadre.hub.tokenizer import save_tokenizer, template_source, tokenizer_hash
from cadre.model.transformer import Transformer
from cadre.plan.memory import state_bytes
from cadre.plan.shape import Shape
from cadre.train import checks
from cadre.train.checkpoint import checkpoints, read_state, set_aside_damaged
from cadre.train.checks import check_fp8, check_memory
from cadre.train.metrics import read_metrics
from cadre.train.recipe import read_recipe
from cadre.train.resume import held_recipe, resume
from cadre.train.run import only_writer, start
from tests.runs import RECIPE, write_corpus
from tests.shapes import small


def test_a_new_run_is_resolved_to_the_last_choice(lab):
    run = lab.start("run", "train.dtype=auto")
    kept = read_recipe(str(run.path / "recipe.toml"))
    assert kept == run.recipe == held_recipe(run.path)
    assert kept.train.dtype in ("float32", "bfloat16") and getattr(torch, kept.train.dtype) == run.dtype
    assert kept.config(run.config.vocab_size) == run.config
    assert (run.config.bos_token_id, run.config.eos_token_id, run.config.vocab_size) == (0, 1, 300)
    assert (run.checkpoint, run.total_steps, run.batches.state()["extra"]) == (None, 12, 2)
    assert [path.name for path in run.path.iterdir()] == ["recipe.toml"]


def test_one_seed_makes_one_model(lab):
    first, again, other = lab.start("a"), lab.start("b"), lab.start("c", "train.seed=1")
    assert all(torch.equal(x, y) for x, y in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def test_the_vocabulary_is_the_tokenizers_unless_the_model_is_given_more(lab):
    assert lab.start("a", "data.vocab_size=5000").config.vocab_size < 1000  # so few pairs are there to merge
    assert lab.start("b", "model.vocab_size=320").config.vocab_size == 320


def given_tokenizer(folder, size: int) -> Tokenizer:
    tokenizer = train_tokenizer(["the people of the nation and their house"] * 9, size)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def without_vocab_size(lab) -> None:
    text = lab.recipe.read_text(encoding="utf-8")
    lab.recipe.write_text(text.replace("vocab_size = 300\n", ""), encoding="utf-8")


def test_a_given_tokenizer_is_taken(lab):
    without_vocab_size(lab)
    tokenizer = given_tokenizer(lab.folder / "tok", 270)
    run = lab.start("run", f"data.tokenizer={lab.folder / 'tok'}")
    assert run.config.vocab_size == 270 and run.identity()["tokenizer"] == tokenizer_hash(tokenizer)


@pytest.mark.parametrize("overrides, wanted", [
    (["model.vocab_size=299"], "ids up to 299, beyond the vocabulary of 299"),
    (["train.batch=4000"], r"the corpus has .* tokens; one batch needs 4000 x 16"),
    (["data.source=/nowhere/at/all"], "no such file or folder"),
    (["eval.prompts=['all the people of the nation and their house were here to see what the law had made for them ']",
      "model.max_position_embeddings=16"], "eval.prompts: .* the model's context"),
    (["train.fp8_experts=true", "model.first_k_dense_replace=2", "model.num_nextn_predict_layers=0"],
     "train.fp8_experts: the model has no experts"),
    (["model.model_type='deepseek_v2'"], "num_nextn_predict_layers is 1; a deepseek_v2 model"),
])  # fmt: skip
def test_what_cannot_be_run_leaves_no_folder(lab, overrides, wanted):
    with pytest.raises(UsageError, match=wanted):
        lab.start("run", *overrides)
    assert not (lab.folder / "run").exists()


@pytest.mark.parametrize("content, wanted", [
    (b"", "the corpus is empty"), (b" \n\n", "the corpus is empty"), (b"text\0more", "a binary file"),
    ("caf\u00e9".encode("latin-1"), "not UTF-8"), (b"Too short to train.", "one batch needs|held out"),
])  # fmt: skip
def test_a_corpus_that_cannot_be_used_leaves_no_folder(lab, content, wanted):
    (lab.folder / "bad.txt").write_bytes(content)
    with pytest.raises(UsageError, match=wanted):
        lab.start("run", f"data.source={lab.folder / 'bad.txt'}")
    assert not (lab.folder / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(lab):
    without_vocab_size(lab)
    given_tokenizer(lab.folder / "tok", 270)
    with pytest.raises(UsageError, match="ids up to 269, beyond the vocabulary of 265"):
        lab.start("run", f"data.tokenizer={lab.folder / 'tok'}", "model.vocab_size=265")
    assert not (lab.folder / "run").exists()


def test_an_output_that_holds_anything_is_refused(lab):
    (lab.folder / "empty").mkdir()
    lab.start("empty")
    with pytest.raises(UsageError, match="holds another run: continue it with --resume"):
        lab.start("empty")
    (lab.folder / "file").write_text("mine")
    with pytest.raises(UsageError, match="holds other files: choose an empty folder"):
        lab.start("file")
    assert (lab.folder / "file").read_text() == "mine"
    with pytest.raises(UsageError, match="holds other files"):
        lab.start("corpus")
    with pytest.raises(UsageError, match=r"cannot be used .*too long"):
        lab.start("x" * 300)
    with pytest.raises(UsageError, match=r"--out .*/file/run: cannot be used"):
        lab.start("file/run")


def test_a_full_disk_is_a_failure_and_no_fault_of_the_user(lab, monkeypatch):
    import errno

    from cadre.train import run

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "replace_file", full)
    with pytest.raises(RunError, match=r"run: cannot be written: the disk is full"):
        lab.start("run")
    assert not any((lab.folder / "run").iterdir())


# ----------------------------------------------------------------------------------------------------- from a model


def save_model(lab, tokenizer_size: int | None, **changes) -> Transformer:
    tokenizer = given_tokenizer(lab.folder / "tok", tokenizer_size) if tokenizer_size else None
    sizes = dict(vocab_size=290, num_attention_heads=2, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=1)
    model = Transformer(small("deepseek_v3", **{**sizes, **changes})).initialize(5)
    save(model, lab.folder / "base", tokenizer)
    return model


def from_recipe(lab, *, tokenizer: bool) -> None:
    lines = lab.recipe.read_text(encoding="utf-8").splitlines()
    start = lines.index("[data]")
    kept = [line for line in lines[start:] if not (tokenizer and line.startswith("vocab_size"))]
    lab.recipe.write_text("\n".join(["[model]", f"from = '{lab.folder / 'base'}'", *kept]), encoding="utf-8")


def test_training_goes_on_from_a_model_with_its_tokenizer(lab):
    model = save_model(lab, 270)
    from_recipe(lab, tokenizer=True)
    run = lab.start("run")
    assert run.config == model.config and run.config.vocab_size == 290
    _, tokenizer = load(lab.folder / "base")
    assert run.identity()["tokenizer"] == tokenizer_hash(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), model.parameters(), strict=True))
    _, watcher = lab.train(run)
    scores = [record["step"] for record in watcher.records if "bits_per_byte" in record]
    assert scores[0] == 0 and len(scores) > 1  # what it was before
    (again, _), base = load(lab.folder / "run"), model.lm_head.weight
    assert not torch.equal(again.lm_head.weight, base) and (again.lm_head.weight - base).abs().max() < 0.1
    more = lab.resume("run", "train.steps=13")
    assert more.config == model.config
    assert lab.train(more)[0].steps == 13


def test_a_chat_template_stays_with_the_model_that_training_goes_on_with(lab):
    """And so do its settings of generation, when it has been resumed and only the tokenizer is left of what it began with."""
    save_model(lab, 270)
    (lab.folder / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (lab.folder / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    from_recipe(lab, tokenizer=True)
    lab.train(lab.start("run", "checkpoint.best=true"))
    for file in (lab.folder / "base").iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    lab.train(lab.resume("run", "train.steps=13"))
    for folder in ("model", "best"):
        kept = lab.folder / "run" / folder
        assert template_source(kept)[0] == "{{ messages[0].content }}!"
        assert json.loads((kept / "generation_config.json").read_text()) == {"eos_token_id": [1, 5]}


def test_a_model_may_go_on_with_longer_sequences(lab):
    model = save_model(lab, 270)
    from_recipe(lab, tokenizer=True)
    text = lab.recipe.read_text()
    longer = model.config.max_position_embeddings * 2
    with pytest.raises(
        UsageError, match=r"model\.hidden_size: model\.from takes the whole model from a directory, but for max_"
    ):
        lab.start("run", "model.hidden_size=64")
    with pytest.raises(UsageError, match=rf"data\.seq_len is {longer}; it must be at most .* or of \[model\] beside from"):
        lab.start("run", f"data.seq_len={longer}")
    yarn = (
        f'{{ rope_type = "yarn", factor = 2.0, '
        f"original_max_position_embeddings = {model.config.max_position_embeddings}, mscale_all_dim = 1.0 }}"
    )
    lab.recipe.write_text(text.replace("[data]", f"max_position_embeddings = {longer}\nrope_parameters = {yarn}\n[data]"))
    run = lab.start("run", f"data.seq_len={longer}")
    assert run.config.max_position_embeddings == longer and run.config.rope_parameters.factor == 2.0
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), model.parameters(), strict=True))
    assert run.model.layers[0].self_attn.scale != model.layers[0].self_attn.scale
    assert run.config.rope_parameters.rope_theta == model.config.rope_parameters.rope_theta  # what is not said anew stays
    lab.train(run)
    assert load(lab.folder / "run")[0].config.rope_parameters == run.config.rope_parameters


def test_a_run_that_began_with_a_model_and_died_at_once_begins_with_it_again(lab):
    model = save_model(lab, 270)
    from_recipe(lab, tokenizer=True)
    lab.start("run")
    again = lab.resume("run")
    assert again.checkpoint is None
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), model.parameters(), strict=True))
    assert next(record["step"] for record in lab.train(again)[1].records if "bits_per_byte" in record) == 0
    shutil.rmtree(again.path / "checkpoints")
    lab.train(lab.resume("run"))
    assert [record["step"] for record in read_metrics(again.path) if "bits_per_byte" in record] == [0, 6, 12]
    lab.start("other")
    (lab.folder / "base" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"ended before its first checkpoint, and began with a model: .* no config\.json"):
        lab.resume("other")


def test_the_recipe_that_began_with_a_model_may_be_named_to_resume_it(lab):
    from cadre.train.resume import resume

    save_model(lab, 270)
    from_recipe(lab, tokenizer=True)
    run = lab.start("run")
    wanted = read_recipe(str(lab.recipe), ["train.steps=30"])
    again = resume(run.path, wanted, torch.device("cpu"), lambda line: None)
    assert (again.total_steps, again.config, again.recipe.data) == (30, run.config, run.recipe.data)


@pytest.mark.parametrize("changes, tokenizer_size, wanted", [
    (dict(max_position_embeddings=8), 270, "data.seq_len is 16; it must be at most max_position_embeddings of .*base"),
    (dict(), None, "tokenizer.json: no such tokenizer"),
])  # fmt: skip
def test_a_model_that_does_not_suit_is_refused(lab, changes, tokenizer_size, wanted):
    save_model(lab, tokenizer_size, **changes)
    from_recipe(lab, tokenizer=True)
    with pytest.raises(UsageError, match=wanted):
        lab.start("run")
    assert not (lab.folder / "run").exists()


def test_a_directory_that_is_no_model_is_refused(lab):
    (lab.folder / "base").mkdir()
    from_recipe(lab, tokenizer=False)
    with pytest.raises(UsageError, match="is no model directory"):
        lab.start("run")
    assert not (lab.folder / "run").exists()


# ----------------------------------------------------------------------------------------------------- going on


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
])  # fmt: skip
def test_a_changed_model_or_batch_is_refused_by_name(lab, override, wanted):
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


def test_a_model_larger_than_the_machine_is_refused_with_numbers(monkeypatch):
    class Memory:
        total = 2**16

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(UsageError, match=r"the model has [\d,]+ parameters: .* GiB"):
        check_memory(small("deepseek_v3"), torch.device("cpu"))
    need = state_bytes(Shape.from_config(small("llama")), "adamw")
    monkeypatch.setattr(Memory, "total", 3 * need // 2)
    check_memory(small("llama"), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"and of the model of [\d,]+ parameters beside it"):
        check_memory(small("llama"), torch.device("cpu"), beside=small("llama"))


def test_damage_in_the_middle_of_a_large_file_is_found(lab):
    run = lab.start("run", "train.steps=4")
    lab.train(run)
    path = checkpoints(run.path)[-1]
    state = read_state(path)
    large = path / "weights.safetensors"
    with large.open("ab") as file:
        file.truncate(3 * 2**20)
    state["checksums"] = {large.name: checksum(large)}
    (path / "state.json").write_text(json.dumps(state))
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


def test_experts_in_fp8_want_a_card_that_has_it(monkeypatch):
    check_fp8(small("deepseek_v3"), torch.device("cpu"))
    for able in (True, False):
        monkeypatch.setattr(checks, "multiplies_fp8", lambda device, able=able: able)
        if able:
            check_fp8(small("deepseek_v3"), torch.device("cuda"))
        else:
            with pytest.raises(UsageError, match=r"train.fp8_experts: needs Triton and a card .* leave it out"):
                check_fp8(small("deepseek_v3"), torch.device("cuda"))


def test_a_run_has_one_writer_at_a_time(lab):
    run = lab.start("run")
    with only_writer(run.path), pytest.raises(UsageError, match="another process is training this run"):
        lab.train(run)
    assert lab.train(run)[0].steps == run.total_steps
    with pytest.raises(BlockingIOError), only_writer(run.path):  # of something else
        raise BlockingIOError


def test_a_run_that_is_being_trained_is_left_as_it_is(lab):
    """By whoever is refused: its recipe is what it will be resumed with after a crash."""
    lab.train(lab.start("run", "train.steps=8"))
    path = lab.folder / "run"
    (checkpoints(path)[-1] / "weights.safetensors").write_bytes(b"damaged")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with only_writer(path), pytest.raises(UsageError, match="another process is training this run"):
        lab.resume("run", "train.steps=20", "optimizer.lr=3.0")
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["train.steps=20", "schedule.warmup_steps=20"], "the rate warms up over 20 steps, all of this run"),
        (["balance.bias_update=none", "balance.sequence_weight=0.0"], "nothing keeps the experts evenly used: balance."),
        (["balance.bias_speed=0.0", "balance.sequence_weight=0.0"], "nothing keeps the experts evenly used: balance."),
        (["balance.sequence_weight=0.0"], None),
        (["balance.bias_update=none"], None),
        (["model.model_type=deepseek_v2", "model.num_nextn_predict_layers=0"], None),
        (
            ["model.model_type=deepseek_v2", "model.num_nextn_predict_layers=0", "balance.sequence_weight=0.0"],
            "nothing keeps the experts evenly used (routers of deepseek_v2 own no bias)",
        ),
    ],
)
def test_what_is_hardly_meant_is_said(lab, overrides, says):
    notes: list[str] = []
    start(read_recipe(str(lab.recipe), overrides), lab.folder / "run", torch.device("cpu"), notes.append)
    said = [note for note in notes if "warms up" in note or "evenly used" in note]
    assert len(said) == (says is not None) and (says is None or said[0].startswith(says))


def test_a_model_goes_on_with_its_own_tokenizer(lab):
    """With another one every embedding would mean another token."""
    lab.train(lab.start("first", "train.steps=2"))
    text = RECIPE.format(source=json.dumps(str(lab.folder / "corpus")))
    rest = text[text.index("[data]") :].replace("vocab_size = 300", "")
    recipe = lab.folder / "from.toml"
    recipe.write_text(f'[model]\nfrom = "{lab.folder / "first"}"\n{rest}')

    def go_on(name, *overrides):
        return start(read_recipe(str(recipe), list(overrides)), lab.folder / name, torch.device("cpu"), lambda line: None)

    with pytest.raises(UsageError, match=r"model\.from .*: the data has another tokenizer: leave"):
        go_on("second", "data.vocab_size=290")
    save_tokenizer(train_tokenizer(["other words"] * 3, 270), lab.folder / "other")
    with pytest.raises(UsageError, match=r"model\.from .*: the data has another tokenizer: leave"):
        go_on("second", f"data.tokenizer={lab.folder / 'other'}")
    assert not (lab.folder / "second").exists()
    own = (lab.folder / "first" / "model" / "tokenizer.json").read_bytes()
    same = [[], [f"data.tokenizer={lab.folder / 'first' / 'model'}"], ["data.vocab_size=300"]]
    for name, overrides in zip(("second", "third", "fourth"), same, strict=True):
        lab.train(go_on(name, *overrides))
        assert (lab.folder / name / "model" / "tokenizer.json").read_bytes() == own


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
