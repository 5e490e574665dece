"""`cadre train` as users run it: from a recipe to a run directory, stopped, killed, resumed, and refused."""

import contextlib
import errno
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers import processors

import cadre
from cadre.cli import choose
from cadre.cli import main as module
from cadre.cli.train import _sample
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, Terminated
from cadre.hub.template import ChatTemplate
from cadre.infer import generate as generating
from cadre.kernels.native import library
from cadre.plan import budget as budget_module
from cadre.plan.budget import Machine, Rung, read_budget
from cadre.plan.hardware import hardware
from cadre.plan.here import Forecast
from cadre.train import checkpoint, checks, trainer
from cadre.train import run as run_module
from cadre.train.bench import calibrate
from cadre.train.metrics import read_metrics
from cadre.train.parallel import launch as launching
from cadre.train.recipe import read_recipe
from cadre.units import si
from tests.runs import write_recipe

TIMING = {"seconds", "wall_seconds", "cpu_seconds", "seconds_per_step", "tokens_per_second", "mfu", "eval_seconds"}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer, "gemm_flops_per_second", lambda *_: 1e11)
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["cadre", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code or 0


def process(*arguments: object) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "cadre.cli.main", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_step(run: Path) -> int:
    with contextlib.suppress(OSError):
        found = re.findall(r'^{"step": (\d+)', (run / "metrics.jsonl").read_text(), re.MULTILINE)
        return int(found[-1]) if found else 0
    return 0


def wait_for_step(running: subprocess.Popen, run: Path, step: int) -> None:
    while running.poll() is None and last_step(run) < step:
        time.sleep(0.01)


def content(run: Path) -> list:
    """All that a run is, but its timing and events."""
    newest = max((run / "checkpoints").iterdir())
    files = [load_file(newest / name) for name in ("weights.safetensors", "optimizer.safetensors")]
    tensors = [(name, tensor.numpy().tobytes()) for file in files for name, tensor in sorted(file.items())]
    state = {k: v for k, v in checkpoint.read_state(newest).items() if k not in TIMING}
    records = [{k: v for k, v in record.items() if k not in TIMING} for record in read_metrics(run) if "event" not in record]
    return [tensors, state, records, (run / "model" / "model.safetensors").read_bytes()]


# ------------------------------------------------------------------------------------------------- to the end


def test_a_recipe_becomes_a_run_directory(recipe, monkeypatch, capsys):
    assert train(monkeypatch, recipe, "--out", "my run") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for part in ("step 12/12", "tokens/s", "MFU", "left 0:00", "> The", "report.html", "my run/model",
                 "cadre generate 'my run'", "from transformers import AutoModelForCausalLM"):  # fmt: skip
        assert part in shown.out, part
    score = float(re.search(r"held-out score +(\d+\.\d+) bits per byte", shown.out)[1])
    run = Path("my run")
    assert read_metrics(run)[-2]["bits_per_byte"] == pytest.approx(score, abs=1e-4)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model", "recipe.toml", "report.html", "tensorboard"]  # fmt: skip
    model, tokenizer = cadre.load(run)
    assert tokenizer is not None and model.config.n_routed_experts == 4
    page = (run / "report.html").read_text()
    assert "cadre train" in page and "&#39;my run&#39;" in page
    assert train(monkeypatch, "--resume", run) == 2
    assert capsys.readouterr().err == (
        "cadre: --resume my run: has already finished its 12 steps: give more with --steps\n"
    )  # fmt: skip
    assert train(monkeypatch, "--resume", run, "--steps", 14) == 0
    assert [r["step"] for r in read_metrics(run) if r.get("event") == "finished"] == [12, 14]


def test_what_takes_long_is_said_first(recipe, monkeypatch, capsys):
    monkeypatch.setattr(library, "must_compile", lambda: True)
    monkeypatch.setattr(library, "why_missing", lambda: None)
    monkeypatch.setattr(checks, "_DEEP", 2)
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 1) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "building the model: 2 blocks, 0M parameters" in shown.out
    assert shown.out.index("compiling the C++ kernels for this machine, once") < shown.out.index("step 1/1")


def test_length_by_tokens_and_by_clock(recipe, monkeypatch, capsys):
    assert train(monkeypatch, recipe, "--out", "tokens", "--tokens", "0.32k") == 0
    assert read_metrics(Path("tokens"))[-1]["step"] == 5
    assert train(monkeypatch, "--resume", "tokens", "--tokens", "448") == 0
    assert read_metrics(Path("tokens"))[-1]["step"] == 7
    start = time.monotonic()
    assert train(monkeypatch, recipe, "--out", "clock", "--budget", "1s") == 0
    assert 0.5 < time.monotonic() - start < 6
    assert read_recipe("clock/recipe.toml").train.minutes == pytest.approx(1 / 60)
    assert train(monkeypatch, recipe, "--out", "steps", "--steps", 3, "--set", "train.minutes=5") == 0
    kept = read_recipe("steps/recipe.toml").train
    assert (kept.steps, kept.minutes) == (3, None)
    capsys.readouterr()


def test_length_by_flops_and_by_money(recipe, monkeypatch, capsys):
    """A budget is never exceeded, and what is left of it is less than a step; money is time where it rents this machine."""
    assert train(monkeypatch, recipe, "--out", "flops", "--budget", "4e8flops") == 0
    run = read_recipe("flops/recipe.toml")
    counted = cadre.count(run.config(run.model["vocab_size"]), context=16)
    step = counted.training_flops_per_token * 4 * 16
    assert run.train.steps == int(4e8 / step) > 5 and run.train.minutes is None
    assert read_metrics(Path("flops"))[-1]["step"] == run.train.steps
    money = ["--budget", "0.0000222usd", "--hardware", "cpu-2core"]
    assert train(monkeypatch, recipe, "--out", "money", *money) == 0
    assert read_recipe("money/recipe.toml").train.minutes == pytest.approx(0.0000222 / 0.08 * 60)
    assert train(monkeypatch, recipe, "--out", "gpu", "--budget", "1e-9usd", "--hardware", "h100") == 0
    assert 1 <= read_recipe("gpu/recipe.toml").train.steps < 1e-9 / 2 * 3600 * 989.4e12 * 0.56 / step
    capsys.readouterr()


def test_a_budget_without_a_recipe_chooses_the_model(recipe, monkeypatch, capsys):
    """Within the FLOPs to a twentieth, over the text that is asked for; the choice is announced before it is trained."""
    machine = Machine((Rung(64, 1e11, 1e-8),), 24e9)
    monkeypatch.setattr(choose, "measure_machine", lambda *_: (machine, 1e11))
    monkeypatch.setattr(calibrate, "predict_run", lambda run: Forecast(0.5, 100.0, 2**20, None, {}))
    monkeypatch.setattr(budget_module, "FEWEST_STEPS", 5)
    source = ["--set", "data.source=corpus", "--set", "data.vocab_size=300"]
    assert train(monkeypatch, "--budget", "2e10flops", "--out", "run", *source) == 0
    shown = capsys.readouterr().out
    assert re.search(r"chosen for 2e10flops: width 64, 3 blocks, \d+ experts of \d+, top \d", shown)
    assert re.search(r"expected: \d\.\d\d bits per byte", shown)
    run = read_recipe("run/recipe.toml")
    flops = cadre.count(run.config(300), context=256).training_flops_per_token * run.train.steps * run.train.batch * 256
    assert 0.8 * 2e10 < flops <= 2e10  # so few steps that one is more than a twentieth
    assert read_metrics(Path("run"))[-1]["step"] == run.train.steps


def test_time_goes_on_while_a_model_is_chosen(recipe, monkeypatch, capsys):
    machine = Machine((Rung(64, 1e11, 1e-8),), 24e9)
    monkeypatch.setattr(choose, "measure_machine", lambda *_: (time.sleep(1.5), (machine, 1e11))[1])
    monkeypatch.setattr(budget_module, "CALIBRATION_SECONDS", 1)
    monkeypatch.setattr(budget_module, "FEWEST_STEPS", 1)
    source = ["--set", "data.source=corpus", "--set", "data.vocab_size=300", "--set", "data.held_out=0"]
    start = time.monotonic()
    assert train(monkeypatch, "--budget", "5s", "--out", "run", *source) == 0
    assert read_metrics(Path("run"))[0]["seconds"] > 1.5
    assert time.monotonic() - start < 15
    assert read_recipe("run/recipe.toml").train.minutes == pytest.approx(5 / 60)
    capsys.readouterr()


def test_several_processes_train_the_model_that_one_has_chosen(recipe, monkeypatch, capsys):
    """They are given it as a recipe beside the run, with a batch that they can share and the time that is left."""
    machine, launched = Machine((Rung(64, 1e11, 1e-8),), 24e9), []
    monkeypatch.setattr(choose, "measure_machine", lambda *_: (time.sleep(1.0), (machine, 1e11))[1])
    monkeypatch.setattr(launching, "launch", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(budget_module, "CALIBRATION_SECONDS", 1)
    monkeypatch.setattr(budget_module, "FEWEST_STEPS", 1)
    source = ["--set", "data.source=corpus", "--set", "data.vocab_size=300"]
    assert train(monkeypatch, "--budget", "6s", "--nproc", "3", "--out", "run", *source) == 0
    assert launched == [(3, ["train", "run.toml", "--out", "run"], 0, None)]
    kept = read_recipe("run.toml")
    assert kept.name == "budget" and 0 < kept.train.minutes < 5 / 60 and kept.data.vocab_size == 300
    assert kept.train.batch % 3 == 0 and (kept.train.batch // 3) % kept.train.micro_batch == 0
    assert_refused(capsys, train(monkeypatch, "--budget", "6s", "--nproc", "3", "--out", "run", *source), "run.toml.* is there")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(capsys, train(monkeypatch, "--budget", "6s", "--out", "other", *source), "use --nproc, or name a recipe")


def test_several_processes_that_are_stopped_before_they_train_say_so(recipe, monkeypatch, capsys):
    monkeypatch.setattr(launching, "launch", lambda *_: signal.SIGTERM)
    assert_refused(capsys, train(monkeypatch, recipe, "--nproc", "2", "--out", "run"), "^cadre: interrupted$", code=143)
    monkeypatch.setenv("CADRE_LAUNCHED", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # as one of them, which leave it to the one that started them
    with pytest.raises(SystemExit) as ended:
        module._end_interrupted(Terminated(signal.SIGTERM))
    assert (ended.value.code, capsys.readouterr().err) == (143, "")


@pytest.mark.parametrize("arguments, wanted", [
    (["--budget", "20s"], "--budget 20s: choosing a shape takes a calibration of up to 30 s; give at least 60 s"),
    (["--budget", "ten minutes"], "--budget ten minutes: must be a time"),
    (["--budget", "5usd"], "money needs --hardware"),
    (["--budget", "1e6flops"], "--budget 1e6flops: not enough for 50 steps of the smallest model"),
    (["--budget", "1e22flops"], r"would take [\d,]+ days on this machine"),
    (["--budget", "5000usd", "--hardware", "h100"], r"would take [\d,]+ days on this machine"),
    (["--budget", "1e12flops", "--set", "data.source=absent.txt"], "absent.txt: no such file"),
])  # fmt: skip
def test_a_budget_that_chooses_nothing_is_one_line(recipe, monkeypatch, capsys, arguments, wanted):
    machine = Machine((Rung(64, 1e11, 1e-8),), 24e9)
    monkeypatch.setattr(choose, "measure_machine", lambda *_: (machine, 1e11))
    source = [] if "--set" in arguments else ["--set", "data.source=corpus", "--set", "data.vocab_size=300"]
    assert_refused(capsys, train(monkeypatch, "--out", "run", *arguments, *source), wanted)
    assert not Path("run").exists()


@pytest.mark.parametrize(("name", "share"), [("h100", "56%"), ("cpu-2core-bf16", "35%")])
def test_what_money_is_assumed_to_buy_is_said(name, share):
    """Of the precision that the FLOPs are of, and without options that the command has not."""
    budget, machine, device = read_budget("0.01usd"), Machine((Rung(64, 1e11, 1e-8),), 24e9), hardware(name)
    made = budget_module.choose(budget, machine, vocab_size=300, unique_tokens=10**7, seq_len=256, device=device)
    *_, rented, reached = choose.describe(made, budget, device)
    assert reached == f"assumed: it reaches {share} of its peak, less in narrow experts"
    assert f"an hour of {name}" in rented and "--" not in rented


def test_a_time_of_weeks_is_what_was_asked_for(recipe, monkeypatch):
    machine = Machine((Rung(64, 1e11, 1e-8),), 24e9)
    monkeypatch.setattr(choose, "measure_machine", lambda *_: (machine, 1e11))
    source = ["data.source=corpus", "data.vocab_size=300"]
    weeks = choose.choose_recipe(read_budget("500h"), None, source, time.monotonic(), lambda _: None)
    assert weeks.train.minutes == 500 * 60 and weeks.train.steps is None


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("optimizer.nmae=adamw", "unknown key optimizer.nmae"),
        ("train.sede=1", "unknown key train.sede"),
        ("bogus.lr=1", "unknown key bogus"),
        ("train.wandb=a/b/c", "train.wandb is 'a/b/c'"),
    ],
)
def test_a_slip_beside_a_budget_is_found_before_anything_is_measured(recipe, monkeypatch, capsys, wrong, said):
    monkeypatch.setattr(choose, "measure_machine", lambda *_: pytest.fail("measured before it was refused"))
    assert_refused(capsys, train(monkeypatch, "--budget", "90s", "--set", wrong), said)


def test_where_no_run_may_begin_nothing_is_measured(recipe, monkeypatch, capsys):
    monkeypatch.setattr(choose, "measure_machine", lambda *_: pytest.fail("measured before it was refused"))
    Path("file").write_text("somebody's")
    Path("folder").mkdir()
    Path("folder/file").write_text("somebody's")
    for out in ("file", "folder"):
        assert_refused(capsys, train(monkeypatch, "--budget", "90s", "--out", out), f"--out {out}: holds other files: choose")


def test_a_run_says_what_it_will_take_and_the_report_what_it_took(recipe, monkeypatch, capsys):
    said = {"seconds_per_step": 0.5, "peak_memory_bytes": 2**20}
    monkeypatch.setattr(
        calibrate, "predict_run",
        lambda run: (run.path.joinpath("prediction.json").write_text(json.dumps(said)), Forecast(0.5, 128, 2**20, None, {}))[1],
    )  # fmt: skip
    options = ["--set", "eval.prompts=[]", "--set", "checkpoint.every=500", "--set", "eval.every=500"]
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 100, *options) == 0
    assert "predicted: 0.5 s a step, 128 tokens/s, peak memory 1 MiB" in capsys.readouterr().out
    assert "0.5 s predicted" in Path("run/report.html").read_text()
    assert train(monkeypatch, recipe, "--out", "short", "--steps", 99, *options) == 0
    assert "predicted:" not in capsys.readouterr().out


def test_flops_in_the_report_are_those_of_the_run(tmp_path, monkeypatch, capsys):
    """A module of multi-token prediction that is trained on a part of the sequences counts by that part."""
    recipe = write_recipe(tmp_path, train={"mtp_share": 0.25})
    assert train(monkeypatch, recipe, "--out", tmp_path / "run", "--steps", 2) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    counted = cadre.count(tmp_path / "run" / "model", context=16)
    each, whole = si(counted.training_flops(0.25), "FLOP"), si(counted.training_flops_per_token, "FLOP")
    assert each != whole and f"<td>{each}</td>" in page and whole not in page
    assert f"<td>{si(2 * 4 * 16 * counted.training_flops(0.25), 'FLOP')}</td>" in page
    capsys.readouterr()


def test_runs_without_a_name_get_one(recipe, monkeypatch, capsys):
    assert train(monkeypatch, recipe, "--steps", 1) == 0
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", run.name)
    capsys.readouterr()


def test_brackets_in_a_path_are_no_markup(recipe, monkeypatch, capsys, tmp_path):
    (tmp_path / "[b] [").mkdir()
    (tmp_path / "corpus").rename(tmp_path / "[b] [/x]")
    source = f"data.source={tmp_path / '[b] [/x]'}"
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 1, "--set", source) == 0
    assert "[b] [/x]" in capsys.readouterr().out


def test_a_prompt_near_the_end_of_the_context_still_gives_a_sample(recipe, monkeypatch, capsys):
    options = ["--set", "model.max_position_embeddings=16", "--set", "eval.prompts=['The people', '']"]
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 1, *options) == 0
    assert "> The people" in capsys.readouterr().out


def test_a_prompt_reaches_the_terminal_without_control_characters(recipe, monkeypatch, capsys):
    """It may be the first words of a held-out document."""
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 1, "--set", r'eval.prompts=["\u001b[31mThe"]') == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"cadre generate run '\x1b[31mThe'" in said


# ------------------------------------------------------------------------------------------------- stopped and killed

LONG = {"train": {"steps": 60, "log_every": 1}, "checkpoint": {"every": 3}, "eval": {"every": 25, "tokens": 200, "prompts": []}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, list]:
    """A recipe of a second or two, and what it comes to without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(folder, **LONG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CADRE_CACHE", str(folder / "cache"))
        assert train(patch, recipe, "--out", folder / "whole") == 0
    return recipe, content(folder / "whole")


@pytest.fixture
def long(uninterrupted, tmp_path, monkeypatch) -> tuple[Path, list]:
    monkeypatch.setenv("CADRE_CACHE", str(uninterrupted[0].parent / "cache"))
    monkeypatch.chdir(tmp_path)
    return uninterrupted


def test_a_run_whose_output_is_closed_from_the_beginning_is_trained(recipe):
    command = [sys.executable, "-m", "cadre.cli.main", "train", str(recipe), "--out", "run"]
    ended = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and Path("run/report.html").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(long, monkeypatch, number):
    recipe, whole = long
    running = process(recipe, "--out", "run")
    wait_for_step(running, Path("run"), 11)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (128 + number, "")
    stopped = last_step(Path("run"))
    assert 11 <= stopped < 60
    assert f"stopped by {number.name} after step {stopped}; continue with: cadre train --resume run\n" in out
    assert max(path.name for path in Path("run/checkpoints").iterdir()) == f"step-{stopped:08d}"
    assert Path("run/report.html").exists()
    assert train(monkeypatch, "--resume", "run") == 0
    assert content(Path("run")) == whole


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_outlives_whoever_reads_what_it_prints(long, terminal):
    """`cadre train | head -1`, or a terminal that is closed on a run under nohup."""
    recipe, whole = long
    reader, writer = os.openpty() if terminal else os.pipe()
    command = [sys.executable, "-m", "cadre.cli.main", "train", str(recipe), "--out", "run"]
    ignoring = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    running = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True, preexec_fn=ignoring)
    os.close(writer)
    wait_for_step(running, Path("run"), 5)
    os.close(reader)
    running.send_signal(signal.SIGHUP)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert content(Path("run")) == whole and Path("run/report.html").exists()


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(long, monkeypatch):
    recipe, whole = long
    rng = random.Random(7)
    arguments: list[object] = [recipe, "--out", "run"]
    reached = []
    for upper in (20, 50):
        running = process(*arguments)
        wait_for_step(running, Path("run"), rng.randrange(upper - 12, upper))
        time.sleep(rng.uniform(0, 0.03))
        running.kill()
        _, err = running.communicate()
        assert running.returncode == -signal.SIGKILL, err
        reached.append(last_step(Path("run")))
        arguments = ["--resume", "run"]
    assert reached == sorted(reached) and reached[0] > 4
    assert train(monkeypatch, "--resume", "run") == 0
    assert content(Path("run")) == whole
    assert not list(Path("run/checkpoints").glob(".partial*"))


# ------------------------------------------------------------------------------------------------- refused


def assert_refused(capsys, status: int, wanted: str, code: int = 2) -> None:
    err = capsys.readouterr().err
    assert status == code
    assert err.startswith("cadre: ") and err.count("\n") == 1 and re.search(wanted, err), err


@pytest.mark.parametrize("arguments, wanted", [
    (["--set", "nonsense.key=1"], "unknown key nonsense"),
    (["--set", "train.nonsense=1"], "unknown key train.nonsense"),
    (["--set", "train.steps='many'"], "train.steps is 'many'"),
    (["--set", "train.steps"], "must read section.key=value"),
    (["--set", "model.n_group=3"], "n_group is 3; it must be a divisor of n_routed_experts"),
    (["--set", "model.n_group=2", "--set", "model.num_experts_per_tok=3"], "num_experts_per_tok is 3; it must be 1 to 2"),
    (["--set", "model.vocab_size=280"], "ids up to 299, beyond the vocabulary of 280"),
    (["--set", "train.batch=9999"], "one batch needs 9999 x 16"),
    (["--set", "data.source=absent.txt"], "absent.txt: no such file"),
    (["--set", "data.source=empty.txt"], "empty.txt: the corpus is empty"),
    (["--set", "data.source=binary.txt"], "binary.txt: a binary file"),
    (["--set", "data.source=latin.txt"], "latin.txt: not UTF-8"),
    (["--set", "data.source=['corpus', 'latin.txt']"], "latin.txt: not UTF-8"),
    (["--steps", "5", "--tokens", "5M"], "exclude each other"),
    (["--steps", "5", "--budget", "5m"], "exclude each other"),
    (["--tokens", "lots"], "--tokens lots: must be a number"),
    (["--tokens", "0"], "--tokens 0"),
    (["--budget", "10"], "--budget 10: must be a time such as 90s, 10m or 2h"),
    (["--budget", "0s"], "--budget 0s"),
    (["--budget", "2e15"], "--budget 2e15: must be a time .*, FLOPs such as 2e15flops, or money such as 5usd"),
    (["--budget", "100flops"], "--budget 100flops: less than one step of tiny"),
    (["--budget", "5usd"], "--budget 5usd: money needs --hardware"),
    (["--budget", "5usd", "--hardware", "h1000"], "--hardware h1000: not in the catalogue; did you mean h100"),
    (["--budget", "5m", "--hardware", "h100"], "--hardware says what money is spent on"),
    (["--hardware", "h100"], "--hardware says what money is spent on"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(recipe, monkeypatch, capsys, tmp_path, arguments, wanted):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    assert_refused(capsys, train(monkeypatch, recipe, "--out", "run", *arguments), wanted)
    assert not Path("run").exists()


@pytest.mark.parametrize("name", ["nonsense", "absent.toml", "corpus", "", " "])
def test_an_unknown_recipe_is_one_line(recipe, monkeypatch, capsys, name):
    wanted = "neither a file nor a shipped recipe|cannot be read" if name.strip() else "RECIPE is empty: name a shipped recipe"
    assert_refused(capsys, train(monkeypatch, name, "--out", "run"), wanted)
    assert not Path("run").exists()


def test_a_folder_that_holds_another_run_is_left_alone(recipe, monkeypatch, capsys):
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 2) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    capsys.readouterr()
    assert_refused(capsys, train(monkeypatch, recipe, "--out", "run"), "holds another run: continue it with --resume")
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


@pytest.mark.parametrize("arguments, wanted", [
    (["--resume", "corpus"], "--resume corpus: is no run directory"),
    (["--resume", "absent"], "--resume absent: is no run directory"),
    (["--resume", "run", "--out", "other"], "--out and --resume exclude each other"),
    (["--resume", "run", "--set", "model.hidden_size=64"], "model.hidden_size is 64, but the run began with 32"),
    (["--resume", "run", "--set", "train.batch=8", "--steps", "9"], "train.batch is 8, but the run began with 4"),
    (["pocket", "--resume", "run"], "is .*, but the run began with .*: start a new run instead"),
])  # fmt: skip
def test_a_resume_that_cannot_be_is_one_line(recipe, monkeypatch, capsys, arguments, wanted):
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 2) == 0
    capsys.readouterr()
    assert_refused(capsys, train(monkeypatch, *arguments), wanted)


def test_a_recipe_may_be_named_to_resume_its_run(recipe, monkeypatch, capsys):
    assert train(monkeypatch, recipe, "--out", "run", "--steps", 2) == 0
    assert train(monkeypatch, recipe, "--resume", "run") == 0
    assert read_metrics(Path("run"))[-1]["step"] == 12
    capsys.readouterr()


def test_a_full_disk_is_one_line_and_a_failure(recipe, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        status = train(monkeypatch, recipe, "--out", "run")
    assert_refused(capsys, status, "the disk is full", code=2)
    assert not any(Path("run/checkpoints").iterdir()) and not Path("run/model").exists()
    assert train(monkeypatch, "--resume", "run") == 0


def test_a_full_disk_at_the_start_leaves_no_run(recipe, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module, "replace_file", full)
    assert_refused(capsys, train(monkeypatch, recipe, "--out", "run"), "the disk is full", code=2)
    assert not any(Path("run").iterdir())


def test_a_run_that_diverges_is_one_line_with_advice(recipe, monkeypatch, capsys):
    options = ["--set", "optimizer.weight_decay=1e22", "--set", "schedule.warmup_steps=0"]
    status = train(monkeypatch, recipe, "--out", "run", *options)
    advice = r"not finite in 5 steps in a row.*lower rate \(--set optimizer\.lr=0\.0003\), unless another"
    assert_refused(capsys, status, advice, code=1)
    events = [record["event"] for record in read_metrics(Path("run")) if "event" in record]
    assert [event for event in events if event != "unsaved"] == ["skipped"] * 5


def test_a_trained_model_that_says_nothing_finite_is_one_line_with_advice(recipe, monkeypatch, capsys):
    """Its report is there, to see where it went."""
    monkeypatch.setattr(generating, "generate", lambda *_, **__: fail("the model's logits are not finite"))
    status = train(monkeypatch, recipe, "--out", "run", "--steps", 2)
    assert_refused(capsys, status, r"run: .*logits are not finite.*; begin anew with a lower rate", code=1)
    assert Path("run/report.html").exists()


def fail(why: str) -> None:
    raise RunError(why)


def test_a_sample_of_a_model_that_converses_begins_once(monkeypatch):
    """What its template writes, and nothing of what the tokenizer puts before a text."""
    tokenizer = train_tokenizer(["why yes"] * 9, 270)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    template = ChatTemplate("<|bos|>{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>", {})
    asked = []
    monkeypatch.setattr(generating, "generate_ids", lambda model, ids, **options: asked.append(ids) or ids[2:-1])
    assert _sample(None, tokenizer, "why", template, 0) == "why"
    assert tokenizer.decode(asked[0], skip_special_tokens=False) == "<|bos|><|user|>why<|assistant|>"
