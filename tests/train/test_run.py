"""What a run may begin with, and who may write to it."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError
from cadre.hub.load import load
from cadre.hub.save import save
from cadre.hub.template import CHAT_TEMPLATE, CONVERSED_TEMPLATE, chat_template, template_source
from cadre.hub.tokenizer import save_tokenizer, tokenizer_hash
from cadre.model.transformer import Transformer
from cadre.train import run as module
from cadre.train.metrics import read_metrics
from cadre.train.recipe import read_recipe
from cadre.train.resume import held_recipe, resume
from cadre.train.run import only_writer, start
from cadre.train.trainer import Trainer
from tests.runs import RECIPE, write_chats
from tests.shapes import small
from tests.train.conftest import Watcher, given_tokenizer, without_vocab_size


def test_a_new_run_is_resolved_to_the_last_choice(lab):
    run = lab.start("run", "train.dtype=auto")
    kept = read_recipe(str(run.path / "recipe.toml"))
    assert kept == run.recipe == held_recipe(run.path)
    assert kept.train.dtype in ("float32", "bfloat16") and getattr(torch, kept.train.dtype) == run.dtype
    assert kept.config(run.config.vocab_size) == run.config
    assert (run.config.bos_token_id, run.config.eos_token_id, run.config.vocab_size) == (0, 1, 300)
    assert (run.checkpoint, run.total_steps, run.batches.state()["extra"]) == (None, 12, 2)
    assert [path.name for path in run.path.iterdir()] == ["recipe.toml"]


def test_a_run_that_began_meanwhile_in_the_same_folder_keeps_its_recipe(lab, monkeypatch):
    """Both found it empty; preparing the text takes minutes."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "say_slow", lambda *_: patch.undo() or lab.start("run", "train.seed=1"))
        with pytest.raises(UsageError, match="holds another run"):
            lab.start("run")
    assert held_recipe(lab.folder / "run").train.seed == 1


def test_one_seed_makes_one_model(lab):
    first, again, other = lab.start("a"), lab.start("b"), lab.start("c", "train.seed=1")
    assert all(torch.equal(x, y) for x, y in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def test_the_vocabulary_is_the_tokenizers_unless_the_model_is_given_more(lab):
    assert lab.start("a", "data.vocab_size=5000").config.vocab_size < 1000  # so few pairs are there to merge
    assert lab.start("b", "model.vocab_size=320").config.vocab_size == 320


def test_a_given_tokenizer_is_taken(lab):
    without_vocab_size(lab)
    tokenizer = given_tokenizer(lab.folder / "tok", 270)
    run = lab.start("run", f"data.tokenizer={lab.folder / 'tok'}")
    assert run.config.vocab_size == 270 and run.identity()["tokenizer"] == tokenizer_hash(tokenizer)


def unprompted(run):
    """What the samples of a run begin with whose recipe says nothing about it."""
    run.recipe = run.recipe.model_copy(update={"eval": run.recipe.eval.model_copy(update={"prompts": None})})
    return run.prompts()


def test_samples_begin_as_the_text_that_was_held_out_does(lab):
    run = lab.start("run")
    assert run.prompts() == ["The"]
    held = [document.text for document in run.data.read_held_out()]
    prompts = unprompted(run)
    assert len(prompts) == min(3, len(held))
    for prompt, text in zip(prompts, held, strict=False):
        assert text.startswith(prompt) and text[len(prompt)].isspace() and 20 < len(prompt) <= 32
    run.config = run.config.model_copy(update={"max_position_embeddings": 4})
    assert run.prompts() == ["The"]
    assert unprompted(lab.start("none", "data.held_out=0.0")) == ["The"]
    write_chats(lab.folder / "chats.jsonl")
    assert unprompted(lab.start("chat", f"data.source={lab.folder / 'chats.jsonl'}"))[0] == "Hello"
    run = lab.start("sotu")
    run.recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"source": "sotu"})})
    assert unprompted(run) == ["The", "Fellow citizens", "Our"]


@pytest.mark.parametrize("text, words", [
    ("", ""), ("\n \n", ""), ("One", "One"), (" One word\nand another", "One word"), ("x" * 99, "x" * 32),
    ("ab " * 99, "ab " * 9 + "ab"), ("x" * 32 + " y", "x" * 32), ("x " + "y" * 50, "x"),
])  # fmt: skip
def test_first_words(text, words):
    assert module._first_words(text) == words


@pytest.mark.parametrize("overrides, wanted", [
    (["checkpoint.best=true", "data.held_out=0.0"], "checkpoint.best: .* no text is held out .* set data.held_out above 0"),
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


@pytest.mark.parametrize("layout, wanted", [
    (["parallel.expert=3"], r"parallel\.expert is 3, which does not divide the run's 1 process"),
    (["parallel.context=2", 'parallel.expert="auto"'], r"parallel\.context is 2, which the planner does not count"),
])  # fmt: skip
@pytest.mark.parametrize("began", [False, True], ids=["new", "from a model"])
def test_a_layout_that_no_text_makes_possible_is_refused_before_it_is_read(lab, layout, wanted, began):
    without_vocab_size(lab)
    settings = []
    if began:
        run = lab.start("first", "data.vocab_size=300")
        save(run.model, lab.folder / "model", run.data.tokenizer)
        settings = [f"model.from={lab.folder / 'model'}"]
    with pytest.raises(UsageError, match=wanted):
        lab.start("run", *settings, *layout, "data.source=/nowhere/at/all")


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
    scores = [(record["step"], record["final"]) for record in watcher.records if "bits_per_byte" in record]
    assert scores[0] == (0, False) and scores[-2:] == [(12, False), (12, True)]  # before and after, of one sample; of all text
    (again, _), base = load(lab.folder / "run"), model.lm_head.weight
    assert not torch.equal(again.lm_head.weight, base) and (again.lm_head.weight - base).abs().max() < 0.1
    more = lab.resume("run", "train.steps=13")
    assert more.config == model.config
    assert lab.train(more)[0].steps == 13


def test_a_chat_template_stays_when_a_run_is_killed_before_it_has_written_its_model(lab):
    save_model(lab, 270)
    (lab.folder / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    from_recipe(lab, tokenizer=True)
    lab.train(lab.start("run"))
    shutil.rmtree(lab.folder / "run" / "model")
    lab.train(lab.resume("run", "train.steps=13"))
    assert template_source(lab.folder / "run" / "model")[0] == "{{ messages[0].content }}!"


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
    assert [record["step"] for record in read_metrics(again.path) if "bits_per_byte" in record] == [0, 6, 12, 12]
    lab.start("other")
    (lab.folder / "base" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"ended before its first checkpoint, and began with a model: .* no config\.json"):
        lab.resume("other")


def test_the_recipe_that_began_with_a_model_may_be_named_to_resume_it(lab):

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


def test_a_run_has_one_writer_at_a_time(lab):
    run = lab.start("run")
    with only_writer(run.path), pytest.raises(UsageError, match="another process is training this run"):
        lab.train(run)
    assert lab.train(run)[0].steps == run.total_steps
    with pytest.raises(BlockingIOError), only_writer(run.path):  # of something else
        raise BlockingIOError


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


# ----------------------------------------------------------------------------------------------------- conversations


def chats_recipe(lab) -> str:
    return f"data.source={json.dumps(str(write_chats(lab.folder / 'chats.jsonl')))}"


def test_training_on_conversations_counts_what_the_assistant_says(lab):
    run = lab.start("run", chats_recipe(lab))
    batch, trainer = next(run.batches), Trainer(run, Watcher())
    weight = trainer._weights(batch)
    targets = slice(1, run.recipe.data.seq_len + 1)
    assert weight[:, targets].mean() == pytest.approx(1)
    assert torch.equal(weight > 0, torch.from_numpy(batch.learned))
    assert 0 < batch.learned[:, targets].sum() < batch.learned[:, targets].size
    result, _ = lab.train(lab.start("whole", chats_recipe(lab)))
    assert result.read_share == 1.0 and math.isfinite(result.bits_per_byte)
    assert template_source(lab.folder / "whole" / "model")[0] == CONVERSED_TEMPLATE


def test_a_run_on_conversations_resumes_bit_for_bit(lab):
    source = chats_recipe(lab)
    lab.train(lab.start("part", source, "train.steps=8", "schedule.kind=constant"))
    lab.train(lab.start("other", source, "schedule.kind=constant"))
    lab.train(lab.resume("part", "train.steps=12"))
    one, other = (load_file(lab.folder / name / "model" / "model.safetensors") for name in ("part", "other"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_base_model_becomes_one_that_converses(lab):
    save_model(lab, 270)
    from_recipe(lab, tokenizer=True)
    (lab.folder / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE)  # where transformers writes it
    lab.train(lab.start("run", chats_recipe(lab)))
    assert template_source(lab.folder / "run" / "model")[0] == CONVERSED_TEMPLATE
    more = lab.resume("run", "train.steps=13")
    assert more.data.chat_template.source == CHAT_TEMPLATE
    lab.train(more)
    assert template_source(lab.folder / "run" / "model")[0] == CONVERSED_TEMPLATE


def test_a_template_of_its_own_is_what_its_conversations_are_written_by(lab):
    save_model(lab, 270)
    from_recipe(lab, tokenizer=True)
    own = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    file = lab.folder / "base" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": own}))
    run = lab.start("run", chats_recipe(lab))
    assert run.data.chat_template.source == own
    lab.train(run)
    assert template_source(lab.folder / "run" / "model")[0] == own


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_tokenizer(folder) -> int:
    """Its texts end with one token, what the assistant says with another, which is returned."""
    tokenizer = train_tokenizer(["the people of the nation and their house"] * 9, 270)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_tokenizer(tokenizer, folder)
    file = folder / "tokenizer_config.json"
    values = {**json.loads(file.read_text()), "chat_template": CHATML, "eos_token": "<|im_end|>"}
    file.write_text(json.dumps(values))
    return tokenizer.token_to_id("<|im_end|>")


@pytest.mark.parametrize("begun", [False, True])
def test_a_model_stops_where_the_answers_that_it_learned_end(lab, begun):
    """By a token that only the template's files name; they say so to transformers and other engines too."""
    end = chatml_tokenizer(lab.folder / "own")
    without_vocab_size(lab)
    overrides = [f'data.tokenizer="{lab.folder / "own"}"']
    if begun:
        save_model(lab, 272)
        for file in (lab.folder / "own").iterdir():
            shutil.copy(file, lab.folder / "base")
        (lab.folder / "base" / "generation_config.json").write_text('{"eos_token_id": 1, "top_k": 9}')
        from_recipe(lab, tokenizer=True)
        overrides = []
    run = lab.start("run", chats_recipe(lab), *overrides)
    lab.train(run)
    model = lab.folder / "run" / "model"
    assert load(model)[0].config.eos_token_id == [1, end]
    settings = json.loads((model / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, end] and settings.get("top_k") == (9 if begun else None)
    (message,) = messages = [{"role": "assistant", "content": "yes"}]
    assert chat_template(model).render(messages, to_answer=False) == f"<|im_start|>assistant\n{message['content']}<|im_end|>\n"
    assert lab.resume("run", "train.steps=14").config.eos_token_id == [1, end]


def test_a_model_keeps_no_template_but_the_one_of_its_conversations(lab):
    chatml_tokenizer(lab.folder / "own")
    save_model(lab, 272)
    for file in (lab.folder / "own").iterdir():
        shutil.copy(file, lab.folder / "base")
    (lab.folder / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    from_recipe(lab, tokenizer=True)
    without_vocab_size(lab)
    with pytest.raises(UsageError, match="conversations are written by another chat template than the model's"):
        lab.start("run", chats_recipe(lab), f'data.tokenizer="{lab.folder / "own"}"')
