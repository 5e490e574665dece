from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest

from cadre.cli import main as module
from cadre.hub.save import save
from cadre.model.transformer import Transformer
from cadre.plan import catalogue
from cadre.plan.count import count
from cadre.plan.hardware import hardware_names
from cadre.train.recipe import read_recipe
from tests import published
from tests.runs import write_corpus, write_recipe
from tests.shapes import small


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cadre", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code or 0


@pytest.fixture
def planned(monkeypatch, capsys):
    """The JSON of a plan."""

    def run(*arguments: object) -> dict:
        assert plan(monkeypatch, *arguments, "--json") == 0
        shown = capsys.readouterr()
        assert shown.err == "" and shown.out.count("\n") == 1
        return json.loads(shown.out)

    return run


@pytest.fixture
def config_file(tmp_path) -> Path:
    file = tmp_path / "m" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(published.DEEPSEEK_V3))
    return file


KEYS = {
    "total_parameters", "active_parameters", "active_parameters_without_input_embedding",
    "active_parameters_without_embeddings", "training_flops_per_token", "kv_cache_bytes_per_token", "device_hours",
    "cost_usd", "days", "energy_kwh",
    "memory_per_device_bytes", "layout", "decode", "assumptions", "ignored",
}  # fmt: skip


def test_json_has_the_promised_keys(planned):
    made = planned("deepseek-v3", "--tokens", "14.8T", "--hardware", "h800", "--devices", 2048, "--mfu", 0.3907)
    assert made.keys() >= KEYS
    assert made["total_parameters"] == 671_026_419_200
    assert made["active_parameters_without_input_embedding"] == 36_625_618_432
    assert made["device_hours"] == pytest.approx(2_664_000, rel=0.005)
    assert made["cost_usd"] == pytest.approx(2 * made["device_hours"])


def test_no_torch_and_an_answer_in_a_second():
    code = (
        "import sys; sys.argv = ['cadre', 'plan', 'deepseek-v3', '--devices', '10000', '--explain']\n"
        "from cadre.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 5  # under 1 s on a quiet machine


def test_tables_for_people(monkeypatch, capsys):
    assert plan(monkeypatch, "glm-4.5-air", "--tokens", "300B", "--devices", 256, "--explain") == 0
    shown = capsys.readouterr()
    assert "Where a step's time goes" in shown.out and "106,852,251,264" in shown.out
    assert "multi-token prediction is left out, as in the published totals; --mtp counts it" in " ".join(shown.out.split())


def test_multi_token_prediction_on_demand(planned, config_file):
    """A catalogue name leaves it out, a file has what it says, and either can be told."""
    main_model, whole = 671_026_419_200, 682_636_487_424
    assert planned("DeepSeek-V3")["total_parameters"] == planned(config_file, "--no-mtp")["total_parameters"] == main_model
    assert planned("deepseek-v3", "--mtp")["total_parameters"] == whole
    assert any("--mtp changes nothing" in note for note in planned("deepseek-v2-lite", "--mtp")["notes"])
    made = planned(config_file)
    assert made["total_parameters"] == whole == count(published.DEEPSEEK_V3).total_parameters
    assert made["total_parameters_without_multi_token_prediction"] == main_model
    assert made["ignored"] == ["quantization_config"]


def announce(folder: Path) -> dict:
    """What a config.json says, with a module of multi-token prediction, as transformers writes it and saves none."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}
    file.write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_modules_that_a_directory_announces_and_does_not_hold_are_left_out(planned, tmp_path, shard_bytes):
    model = Transformer(small("deepseek_v3", vocab_size=50)).initialize(0)
    save(model, tmp_path, max_shard_bytes=shard_bytes)
    announce(tmp_path)
    made, announced, alone = planned(tmp_path), planned(tmp_path, "--mtp"), planned(tmp_path / "config.json")
    assert made["total_parameters"] == count(model.config).total_parameters < announced["total_parameters"]
    assert any("none of its weights are stored" in note for note in made["notes"])
    assert announced["total_parameters"] == alone["total_parameters"]  # a file is taken at its word


def test_a_directory_that_holds_its_modules_or_not_yet_all_of_its_files_is_taken_at_its_word(planned, tmp_path):
    whole, partial = tmp_path / "whole", tmp_path / "partial"
    save(Transformer(small("deepseek_v3", vocab_size=50, num_nextn_predict_layers=1)).initialize(0), whole)
    save(Transformer(small("deepseek_v3", vocab_size=50)).initialize(0), partial)
    announce(partial)
    (partial / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for folder in (whole, partial):
        assert planned(folder)["total_parameters"] == planned(folder / "config.json")["total_parameters"]


def test_a_model_directory_and_its_file_are_one(planned, config_file):
    by_file, by_directory = planned(config_file), planned(config_file.parent)
    assert {**by_file, "model": ""} == {**by_directory, "model": ""}
    assert by_file["hardware"] == "h100"


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b", "qwen3-8b", "qwen2.5-72b", "kimi-k2"])
def test_families_that_cadre_does_not_run(planned, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(catalogue._PUBLISHED[name][1]))
    by_name, by_file = planned(name), planned(tmp_path)
    differing = {key for key in by_name if by_name[key] != by_file[key]}
    assert differing == {"model", "source"}


def test_a_recipe_too_large_for_two_cores_is_planned_for_cards(planned, tmp_path):
    made = planned("node")
    assert (made["hardware"], made["devices"]) == ("h100", 1) and any("planned for h100" in note for note in made["notes"])
    assert planned("node", "--hardware", "cpu-2core")["hardware"] == "cpu-2core"
    assert planned("pocket", "--precision", "fp8")["hardware"] == "h100"
    # Two cores that multiply bfloat16 come before a card, which would wait for the launches of its kernels.
    narrow = planned("pocket", "--precision", "bf16")
    assert (narrow["hardware"], narrow["devices"], narrow["precision"]) == ("cpu-2core-bf16", 1, "bf16")
    assert "1 x cpu-2core has no bf16: planned for cpu-2core-bf16 instead" in narrow["notes"]
    assert planned("node", "--precision", "bf16")["hardware"] == "h100"
    spread = tmp_path / "spread.toml"
    spread.write_text((resources.files("cadre.recipes") / "pocket.toml").read_text() + "\n[parallel]\nexpert = 2\n")
    assert planned(spread)["hardware"] == "cpu-2core"  # not for one process, but not too large either


def test_a_recipe_is_planned_in_its_own_precision_where_the_device_has_it(planned):
    narrow = planned("pocket", "--set", "train.dtype=bfloat16")
    assert (narrow["hardware"], narrow["precision"]) == ("cpu-2core-bf16", "bf16")
    wide = ("pocket", "--set", "train.dtype=float32", "--hardware")
    assert planned(*wide, "cpu-2core-bf16")["precision"] == "fp32"
    assert planned(*wide, "cpu-2core-bf16", "--precision", "bf16")["precision"] == "bf16"
    card = planned(*wide, "h100")
    assert card["precision"] == "bf16"
    assert "train.dtype is float32, for which h100 has no rate: planned in bf16" in card["notes"]


def test_experts_in_fp8_are_said_not_to_be_counted(planned):
    (said,) = set(planned("gpu", "--set", "train.fp8_experts=true")["notes"]) - set(planned("gpu")["notes"])
    assert said == "train.fp8_experts is not counted: experts are planned in the precision of all else"


def test_a_shipped_recipe_brings_its_own_numbers(planned):
    made, recipe = planned("pocket"), read_recipe("pocket")
    assert recipe.train.steps is not None
    assert (made["hardware"], made["devices"], made["precision"]) == ("cpu-2core", 1, "fp32")
    assert (made["context"], made["batch"], made["tokens"]) == (256, 16, recipe.train.steps * 16 * 256)
    assert made["parameters"]["embedding"] == 4096 * recipe.model["hidden_size"]
    assert made["layout"]["micro_batch"] == 16
    assert {one["name"]: one["value"] for one in made["assumptions"]}["optimizer"] == "muon"
    assert any("is trained on 25% of the sequences" in note for note in made["notes"])
    other = planned("pocket", "--hardware", "h100", "--devices", 8, "--context", 128, "--batch", 32, "--tokens", "1M")
    assert (other["hardware"], other["devices"], other["context"], other["batch"]) == ("h100", 8, 128, 32)
    assert other["tokens"] == 1e6


def test_a_recipe_file_and_a_run_directory(planned, tmp_path):
    write_corpus(tmp_path / "corpus")
    file = write_recipe(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(file.read_text())
    by_file, by_run = planned(file), planned(run)
    assert by_file["total_parameters"] == by_run["total_parameters"]
    assert by_file["batch"] == by_run["batch"] == 4
    assert by_file["parameters"]["embedding"] == 300 * 32


def test_set_changes_the_recipe_that_is_planned(planned, tmp_path):
    write_corpus(tmp_path / "corpus")
    file = write_recipe(tmp_path)
    set_here = planned(file, "--set", "train.batch=8", "--set", "model.hidden_size=64")
    assert set_here["batch"] == 8 and set_here["parameters"]["embedding"] == 300 * 64
    written = write_recipe(tmp_path, train={"batch": 8}, model={"hidden_size": 64})
    assert planned(written) == set_here


def test_a_recipe_that_continues_a_model(planned, tmp_path):
    config = small("glm4_moe", num_nextn_predict_layers=1)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config.to_hf()))
    recipe = tmp_path / "more.toml"
    text = f'[model]\nfrom = "{tmp_path / "m"}"\n[data]\nseq_len = 16\n[train]\nsteps = 2\nbatch = 2\n[optimizer]\nlr = 0.1\n'
    recipe.write_text(text)
    assert planned(recipe)["total_parameters"] == count(config).total_parameters
    without = planned(recipe, "--no-mtp")["total_parameters"]
    assert without == count(config.model_copy(update={"num_nextn_predict_layers": 0})).total_parameters


@pytest.mark.parametrize(
    ("written", "tokens"), [("14.8T", 14.8e12), ("300B", 3e11), ("5e9", 5e9), ("1,500,000", 1.5e6), ("2k", 2000), ("3t", 3e12)]
)
def test_ways_to_write_tokens(planned, written, tokens):
    assert planned("olmoe-1b-7b", "--tokens", written)["tokens"] == tokens


def test_counts_have_units(planned):
    assert planned("olmoe-1b-7b", "--context", "2k") == planned("olmoe-1b-7b", "--context", "2000")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["kimi-2k"], "kimi-2k: not in the catalogue, no recipe, file or directory; did you mean kimi-k2?"),
        (["deepsek-v3"], "did you mean deepseek-v3"),
        (["pokcet"], "did you mean pocket"),
        (["zzz"], "names: deepseek-v3, deepseek-v2, "),
        (["no/such/place"], "no/such/place: no such file"),
        (["deepseek-ai/DeepSeek-V3"], "deepseek-ai/DeepSeek-V3: no such file; did you mean deepseek-v3?"),
        (["nothing.json"], "nothing.json: no such file"),
        (["nothing.toml"], "recipe 'nothing.toml' is neither a file nor a shipped recipe"),
        (["."], "config.json: no such file"),
        (["olmoe-1b-7b", "--tokens", "many"], "--tokens many: must be a number such as 14.8T, 300B, 5e9"),
        (["olmoe-1b-7b", "--tokens", "0"], "--tokens 0: must be a number"),
        (["olmoe-1b-7b", "--tokens", ""], "--tokens : must be a number"),
        (["pocket", "--hardware", ""], "--hardware : not in the catalogue; known: h100"),
        (["olmoe-1b-7b", "--tokens", "1e30"], "--tokens is 1e+30; at most"),
        (["olmoe-1b-7b", "--tokens", "1e999"], "--tokens 1e999: must be a number"),
        (["olmoe-1b-7b", "--hardware", "h1000"], "--hardware h1000: not in the catalogue; did you mean h100"),
        (["olmoe-1b-7b", "--precision", "fp4"], "Invalid value for '--precision'"),
        (["olmoe-1b-7b", "--hardware", "a100", "--precision", "fp8"], "--precision fp8: a100 has a rate for bf16 only"),
        (["olmoe-1b-7b", "--devices", "-1"], "Invalid value for '--devices': -1: must be a whole number"),
        (["olmoe-1b-7b", "--context", "4q"], "'--context': 4q: must be a whole number such as 4096, 4k or 1.5M, at least 1"),
        (["olmoe-1b-7b", "--set", "train.batch=8"], "--set changes a recipe, and olmoe-1b-7b is none: give a recipe or a run"),
        (["pocket", "--set", "train.bacth=8"], "unknown key train.bacth; did you mean batch?"),
        (["olmoe-1b-7b", "--mfu", "40"], "--mfu is 40"),
    ],
)
def test_bad_input_ends_in_one_line(monkeypatch, capsys, tmp_path, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert plan(monkeypatch, *arguments, "--json") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("cadre: ") and line in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; cadre plan knows deepseek_v2, deepseek_v3, glm4_moe, glm4_moe_lite, "),
        ({"model_type": None}, "model_type is missing; cadre plan knows deepseek_v2, "),
        ({"hidden_size": None}, "hidden_size is missing; deepseek_v3 needs it"),
        ({"n_group": 7}, "n_group is 7; it must be a divisor of n_routed_experts (256)"),
        ({"hidden_size": 10**30}, f"hidden_size is {10**30}; it must be at most 1,000,000,000"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; it must be an even number"),
        ({"first_k_dense_replace": 63}, "first_k_dense_replace is 63; it must be at most 62, the number of layers"),
    ],
)
def test_a_config_that_cannot_be_planned(monkeypatch, capsys, config_file, changes, line):
    config_file.write_text(json.dumps({**published.DEEPSEEK_V3, **changes}))
    assert plan(monkeypatch, config_file) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"cadre: {config_file}: {line}") and shown.err.count("\n") == 1


DOCS = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "until"),
    [
        ("cadre plan deepseek-v3 --", "DeepSeek's report states"),
        ("cadre plan deepseek-v2-lite --", "To decide"),
        ("cadre plan pocket\n", "`make demo`"),
    ],
)
def test_the_documented_examples_are_what_is_printed(monkeypatch, capsys, command, until):
    monkeypatch.setenv("COLUMNS", "80")
    start = DOCS.index(f"    {command}")
    first, *lines = DOCS[start : DOCS.index(until, start)].splitlines()
    assert plan(monkeypatch, *first.split()[2:]) == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    wanted = [line[4:] for line in lines if line and line.strip() != "..."]
    assert len(wanted) > 8 and set(wanted) <= set(shown)


def test_what_goes_to_a_file_is_not_wrapped(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert plan(monkeypatch, "deepseek-v3") == 0
    assert "(deepseek_v3; https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json)\n" in capsys.readouterr().out


def test_the_documentation_names_every_model_and_device():
    assert all(f"`{name}`" in DOCS for name in catalogue.names())
    devices = next(line for line in DOCS.splitlines() if line.startswith("| `--hardware`"))
    assert f"`{' '.join(hardware_names())}`" in devices


def test_a_bad_number_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("cadre.cli.here.plan_here", None)
    assert plan(monkeypatch, "pocket", "--here", "--context", "-5") == 2
    assert capsys.readouterr().err.startswith("cadre: Invalid value for '--context': -5: must be a whole number")
