"""Studies as files: what is accepted, and what is refused in one line that says where."""

from pathlib import Path

import pytest

from cadre.errors import UsageError
from cadre.study.match import match
from cadre.study.spec import parse_study, read_study, shipped
from tests.study.studies import study_text


def arms_of(name):
    study, _ = read_study(name)
    return {arm.name: arm for arm in match(study, study.base_recipe(), 4096)}


def test_a_study_reads_as_it_is_written():
    study = parse_study(study_text(), "tiny.toml", "tiny")
    assert (study.name, study.first, list(study.arms)) == ("tiny", "dense", ["dense", "experts"])
    assert (study.budget.unit, study.budget.amount) == ("tokens", 2560)
    assert study.held_by("experts") == ["active_flops"]
    assert study.base_recipe().model["intermediate_size"] == 48


@pytest.mark.parametrize("name", ["balance", "granularity", "latent-vs-mha", "moe-vs-dense", "mtp", "optimizer"])
def test_shipped_studies_match_their_arms_in_full_and_in_short(name):
    assert name in shipped()
    study, _ = read_study(name)
    for chosen in (study, study.shortened()):
        arms = match(chosen, chosen.base_recipe(), 4096)
        first = arms[0]
        for arm in arms[1:]:
            other = next(a for a in arms if a.name == (chosen.arms[arm.name].to or first.name))
            for quantity in chosen.held_by(arm.name):
                assert arm.quantity(quantity) == pytest.approx(other.quantity(quantity), rel=chosen.tolerance)


def test_the_two_full_studies_have_the_arms_that_are_promised():
    arms = arms_of("latent-vs-mha")
    cache = {name: arm.count.kv_cache_bytes_per_token for name, arm in arms.items()}
    assert cache["mha"] >= 7 * cache["latent-16"]
    assert cache["gqa-equal-cache"] == cache["latent-16"]
    assert len([name for name in arms if name.startswith("latent")]) == 3
    arms = arms_of("moe-vs-dense")
    assert arms["dense-total"].count.total_parameters == pytest.approx(arms["experts"].count.total_parameters, rel=0.01)
    assert arms["experts"].count.total_parameters > 2 * arms["dense"].count.total_parameters


def test_quick_keeps_its_arms_seeds_and_factors():
    study = parse_study(study_text().replace("[quick]\n", '[quick]\nseeds = [5]\narms = ["dense", "experts"]\n'), "x")
    short = study.shortened()
    assert (short.seeds, short.sweep.factors, list(short.arms)) == ([5], [1.0], ["dense", "experts"])


@pytest.mark.parametrize(
    ("what", "by", "said"),
    [
        ("held = ", "hold = ", "unknown key hold; did you mean held?"),
        ('held = "active_flops"', 'held = "speed"', "held is 'speed'"),
        ("tokens = 2560", "tokens = 2560\nflops = 1e9", "budget: needs exactly one of flops, seconds, tokens, usd"),
        ("tokens = 2560", "tokens = -1", "budget.tokens is -1"),
        ("tokens = 2560", "token = 1", "unknown key budget.token; did you mean tokens?"),
        ('held = "active_flops"', 'held = "price"', "held is 'price'; then the budget must be in usd, not tokens"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds must differ"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds.0 is -1"),
        ("contexts = [8]", "contexts = [0]", "decode.contexts.0 is 0"),
        ("batches = [1, 2]", "batches = [-1]", "decode.batches.0 is -1"),
        ("factors = [1.0, 3.0]", "factors = [1.0, 1.0]", "sweep: factors are"),
        ("[arms.dense]", "[arms.Dense]", "arms.Dense: an arm's name may have a-z"),
        ("[arms.dense]", '[arms.dense]\nto = "experts"', "arms.dense: is the first"),
        ("[arms.experts]", '[arms.experts]\nto = "nobody"', "arms.experts.to is 'nobody'"),
        ("[arms.experts]", "[arms.experts]\nheld = []", "arms.experts.solve.active_flops: is not held equal"),
        ("[arms.experts]", "[arms.experts]\nshares = 0.5", "unknown key arms.experts.shares; did you mean share?"),
        ("mtp_share = 0.25", "batch = 8", "train.batch is the same in every arm"),
        ("minutes = 1000", 'minutes = 1000\narms = ["dense", "exports"]', "quick.arms: 'exports' is not an arm"),
        ("minutes = 1000", 'minutes = 1000\narms = ["dense"]', "quick.arms: needs at least two arms"),
        ("minutes = 1000", 'minutes = 1000\narms = ["dense", "dense"]', "quick.arms are ['dense', 'dense']; they must differ"),
        ("factors = [1.0]", "factors = [2.0, 2.0]", "quick.factors are [2.0, 2.0]; they must differ"),
        ("[arms.dense]", '[arms.".."]', "arms...: an arm's name"),
        ("[arms.dense]", "", "at least 2"),
        ("title = ", 'base = "pocket"\ntitle = ', "give base or [recipe], not both"),
        ("title = ", "title = = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(what, by, said):
    text = study_text()
    assert what in text
    text = text.replace(what, by)
    with pytest.raises(UsageError) as error:
        parse_study(text, "tiny.toml")
    message = str(error.value)
    assert message.startswith("tiny.toml: ") and "\n" not in message
    assert said in message


def test_a_typo_in_a_shipped_name_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean moe-vs-dense"):
        read_study("moe-vs-dence")


def test_a_recipe_that_is_no_recipe_is_refused_as_one():
    study = parse_study(study_text().replace("lr = 0.003", "lr = 0.003\nrate = 0.003"), "tiny.toml", "tiny")
    with pytest.raises(UsageError, match=r"study tiny, \[recipe\]: .*optimizer.rate"):
        study.base_recipe()


def test_a_base_is_looked_for_beside_the_study(tmp_path, monkeypatch):
    folder = tmp_path / "studies"
    folder.mkdir()
    text = study_text()
    start, stop = text.index("[recipe.model]"), text.index("[arms.")
    (folder / "mine.toml").write_text(text[start:stop].replace("[recipe.", "["))
    (folder / "study.toml").write_text('base = "mine.toml"\n' + text[:start] + text[stop:])
    monkeypatch.chdir(tmp_path)
    study, _ = read_study("studies/study.toml")
    assert study.base_recipe().model["intermediate_size"] == 48
    (folder / "mine.toml").rename(folder / "pocket")  # as a recipe that ships, but for the ./
    (folder / "study.toml").write_text('base = "./pocket"\n' + text[:start] + text[stop:])
    for here, name in ((tmp_path, "studies/study.toml"), (folder, "study.toml")):
        monkeypatch.chdir(here)
        assert read_study(name)[0].base_recipe().model["intermediate_size"] == 48


def test_a_recipe_is_told_from_a_study():
    with pytest.raises(UsageError, match=r"^mine: is a recipe: cadre train runs it; a study has \[arms\] to compare$"):
        parse_study("[model]\nhidden_size = 3\n", "mine")


def test_the_example_in_the_docs_is_a_study():
    lines = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("## A study of your own") + 1
    stop = next(i for i in range(start, len(lines)) if lines[i].startswith("An arm's"))
    study = parse_study("\n".join(line.removeprefix("    ") for line in lines[start:stop]), "docs/compare.md", "wider")
    two = match(study, study.base_recipe(), 4096)[1]
    assert two.config.num_hidden_layers == 2 and two.solved
