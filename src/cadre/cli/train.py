"""`cadre train`: a recipe in, a run directory out."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadre.cli.options import Set, counts, token_count
from cadre.errors import DivergedError, RunError, Terminated, UsageError, printable, writing
from cadre.files import replace_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.cli.progress import TrainingLine
    from cadre.hub.template import ChatTemplate
    from cadre.model.transformer import Transformer
    from cadre.plan.budget import Budget
    from cadre.plan.hardware import Device
    from cadre.train.recipe import Recipe
    from cadre.train.run import Run
    from cadre.train.trainer import Result, Silent


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a TOML file; `pocket` if left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory; runs/RECIPE-TIME if left out.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps.", parser=counts())] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens to train on, such as 5M, instead of --steps.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT", help="90s, 10m, 2h of wall clock, 2e15flops, or 5usd. Without RECIPE it chooses the model."
        ),
    ] = None,
    hardware: Annotated[str | None, typer.Option(metavar="NAME", help="What a --budget in usd rents, such as h100.")] = None,
    set_: Set = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Continue the run in this directory.")] = None,
    nproc: Annotated[
        int | None, typer.Option(metavar="N", help="Processes on this machine; [parallel] says how they share.", min=1)
    ] = None,
    restarts: Annotated[
        int, typer.Option(metavar="N", help="With --nproc: how often to start again when a process fails.", min=0)
    ] = 0,
    logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --nproc: a folder for what all but the first print.")
    ] = None,
) -> None:
    """Train a model by a recipe, on a named corpus or your own text."""
    from cadre.cli.progress import lasting_output

    with lasting_output():
        if recipe is not None and not recipe.strip():
            raise UsageError("RECIPE is empty: name a shipped recipe or a TOML file, or leave it out to train pocket")
        if sum(x is not None for x in (steps, tokens, budget)) > 1:
            raise UsageError("--steps, --tokens and --budget exclude each other: give one")
        if resume is not None and out is not None:
            raise UsageError("--out and --resume exclude each other: a resumed run stays in its directory")
        if hardware is not None and budget is None:
            raise UsageError("--hardware says what money is spent on: give it with a --budget such as 5usd")
        stopped = _train(recipe, out, steps, tokens, budget, hardware, set_, resume, nproc, restarts, logs)
    if stopped is not None:
        raise typer.Exit(128 + stopped)  # whoever waits for the model must not take this for done


def _train(
    recipe: str | None, out: Path | None, steps: int | None, tokens: str | None, budget: str | None, hardware: str | None,
    set_: list[str] | None, resume: Path | None, nproc: int | None, restarts: int, logs: Path | None,
) -> signal.Signals | None:  # fmt: skip
    """Returns the signal that stopped the run, for the process that was asked to train it."""
    from cadre.cli.choose import choose_recipe
    from cadre.cli.models import tell_kernels
    from cadre.cli.progress import TrainingLine
    from cadre.kernels.allocator import keep_freed_memory
    from cadre.train.parallel.launch import is_main, started
    from cadre.train.recipe import read_recipe
    from cadre.train.resume import held_recipe
    from cadre.train.trainer import Silent

    if (restarts or logs is not None) and (nproc or 1) == 1 and not started():
        raise UsageError("--restarts and --logs are for several processes: give them with --nproc 2 or more")
    began = time.monotonic()
    keep_freed_memory()
    if resume is not None:
        held_recipe(resume)
    line: TrainingLine | Silent = TrainingLine() if is_main() else Silent()
    choosing = budget is not None and recipe is None and resume is None
    if choosing and started():
        raise UsageError("--budget without RECIPE chooses a model before processes start: use --nproc, or name a recipe")
    if budget is not None and choosing:
        spent, rented = _budget(budget, hardware)
        if out is not None:  # before minutes go into choosing: what would be refused after them
            _refuse_used(out, with_recipe=(nproc or 1) > 1)
        tell_kernels(line.note)
        chosen = choose_recipe(spent, rented, set_, began, line.note, nproc or 1)
    else:
        named = recipe
        if named is None:
            named = "pocket" if resume is None else str(resume / "recipe.toml")
        chosen = _with_length(read_recipe(named, set_), steps, tokens, budget, hardware)
    if nproc is not None and nproc > 1 and not started():
        path = resume or out or _new_folder(chosen.name)
        arguments = sys.argv[1:] if resume or out else [*sys.argv[1:], "--out", str(path)]
        if choosing:
            arguments = ["train", str(_write_chosen(chosen, path, time.monotonic() - began)), "--out", str(path)]
        stopped = _launch(nproc, arguments, restarts, logs, path)
    else:
        # What choosing took is part of the time given.
        stopped = _train_here(chosen, resume, out, line, began if choosing and chosen.train.minutes is not None else None)
    return None if started() else stopped


def _launch(processes: int, arguments: list[str], restarts: int, logs: Path | None, path: Path) -> signal.Signals | None:
    from cadre.train.checkpoint import checkpoints
    from cadre.train.metrics import last_record
    from cadre.train.parallel.launch import launch

    try:
        before = last_record(path)
        stopped = launch(processes, arguments, restarts, logs)
        last = last_record(path)
        said = last is not None and last != before and last.get("event") == "stopped"  # by the main process
        if stopped is None and said:  # one of them had a signal
            raise typer.Exit(1)
        if stopped is not None and not said:  # before anything was trained
            raise Terminated(stopped)
        return stopped
    except RunError as error:
        again = f"; continue with: cadre train --resume {shlex.quote(str(path))} --nproc {processes}"
        raise RunError(f"{error}{again if checkpoints(path) else ''}") from None


def _train_here(
    chosen: Recipe, resume: Path | None, out: Path | None, line: TrainingLine | Silent, began: float | None
) -> signal.Signals | None:  # fmt: skip
    """Train in this process, one of several or the only one. `began`: since when (monotonic) the run's time counts, if not
    from the first step on. Returns the signal that stopped it."""
    from cadre.cli.models import tell_kernels
    from cadre.train.parallel.launch import by_torchrun, joined, may_resume_existing, started_again, without_restarts
    from cadre.train.resume import FinishedError
    from cadre.train.resume import resume as resume_run
    from cadre.train.run import start
    from cadre.train.trainer import OTHERS, Trainer

    with joined(chosen.parallel.timeout) as (parallel, device):
        for why in (without_restarts(), started_again()):
            if why is not None:
                line.note(why)
        if out is not None and may_resume_existing() and parallel.agree((out / "recipe.toml").is_file()):
            line.note(f"--out {out}: holds a run, which goes on")
            resume = out
        if resume is not None:
            try:
                run = resume_run(resume, chosen, device, line.note, parallel)
            except FinishedError as error:
                if out is None:
                    raise
                line.note(str(error))  # a launch that is repeated finds its work done
                return None
        else:
            run = start(chosen, out or _new_folder(chosen.name, parallel.agree(time.time())), device, line.note, parallel)
        _announce(run, line.note)
        if parallel.main:
            tell_kernels(line.note)
        _predict(run, line.note)
        trainer = Trainer(run, line)
        if began is not None:
            trainer.progress.seconds = time.monotonic() - began
        with line:
            result = trainer.train()
        if parallel.main:
            _finish(run, result, trainer.remedy(ended=True))
        if result.stopped is not None and by_torchrun():
            parallel.anyone(False)  # the main process has said what there is to say
            if result.stopped == OTHERS:  # which torchrun would take for done
                raise RunError(f"stopped after step {result.steps} by the end of another process")
    return None if result.stopped in (None, OTHERS) else signal.Signals[result.stopped]


def _new_folder(name: str, now: float | None = None) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"


def _budget(text: str, hardware: str | None) -> tuple[Budget, Device | None]:
    """The budget, as time where the rented hardware is this machine's kind, and the hardware where it is not."""
    from cadre.cli.choose import as_time_here, check_hardware
    from cadre.plan.budget import read_budget

    budget = read_budget(text)
    device = check_hardware(budget, hardware)
    return as_time_here(budget, device), device


def _refuse_used(out: Path, with_recipe: bool) -> None:
    from cadre.train.run import refuse_used

    refuse_used(out)
    if with_recipe and _chosen_file(out).exists():
        raise UsageError(f"--out {out}: {_chosen_file(out)}, where the recipe goes, is there already: choose another name")


def _chosen_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.toml")


def _write_chosen(chosen: Recipe, out: Path, spent: float) -> Path:
    """A chosen recipe as a file beside the run, for the processes that train it: of its time, what `spent` seconds leave."""
    train = chosen.train
    if train.minutes is not None:
        train = train.model_copy(update={"minutes": train.minutes - spent / 60})
    file = _chosen_file(out)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, chosen.model_copy(update={"train": train}).to_toml().encode("utf-8"))
    return file


# A run shorter than this says how fast it is sooner than a measurement would.
_LEAST_STEPS, _LEAST_MINUTES = 100, 1.0


def _predict(run: Run, note: Callable[[str], None]) -> None:
    """Predict what the run will take, and keep it for the report; a failure to is no failure of the run."""
    from cadre.train.bench.calibrate import predict_run

    train = run.recipe.train
    short = train.most_steps < _LEAST_STEPS or (train.minutes is not None and train.minutes < _LEAST_MINUTES)
    if short or run.parallel.size > 1:
        return
    try:
        predicted = predict_run(run)
    except (RunError, UsageError) as error:
        note(f"no prediction: {error}")
        return
    note(
        f"predicted: {predicted.seconds_per_step:.3g} s a step, {predicted.tokens_per_second:,.0f} tokens/s, peak memory "
        f"{predicted.peak_memory_bytes / 2**20:,.0f} MiB"
    )


def _with_length(recipe: Recipe, steps: int | None, tokens: str | None, budget: str | None, hardware: str | None) -> Recipe:
    """The recipe with the length that the command line asks for, if it does, instead of its own."""
    from cadre.cli.choose import money_flops, steps_within
    from cadre.cli.models import vocabulary

    length: dict[str, float | None]
    if budget is not None:
        spent, device = _budget(budget, hardware)
        if spent.seconds is not None:
            length = {"steps": None, "minutes": spent.seconds / 60}
        else:
            words = recipe.model.get("vocab_size") or vocabulary(recipe)
            flops = spent.flops
            if flops is None:
                assert device is not None
                flops = money_flops(recipe, spent, device, words)
            length = {"steps": steps_within(recipe, flops, words, budget), "minutes": None}
    elif tokens is not None:
        per_step = recipe.train.batch * recipe.data.seq_len
        length = {"steps": max(1, round(token_count(tokens) / per_step)), "minutes": None}
    elif steps is not None:
        length = {"steps": steps, "minutes": None}
    else:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=length)})


def _announce(run: Run, note: Callable[[str], None]) -> None:
    from cadre.data.batches import MANY_PASSES
    from cadre.hub.tokenizer import lossy
    from cadre.plan.count import count

    sizes = count(run.config, context=run.recipe.data.seq_len)
    note(
        f"{run.recipe.name}: {sizes.total_parameters / 1e6:.1f}M parameters, {sizes.active_parameters / 1e6:.1f}M active, "
        f"{run.config.model_type}; {len(run.data.train):,} tokens of {' '.join(run.recipe.data.sources)}; "
        f"{run.recipe.train.dtype}"
    )
    if run.data.chat_template is not None:
        learned = run.data.manifest["train"]["learned"]
        note(f"conversations: {learned:,} of these tokens are learned, what the assistant says")
    if (why := lossy(run.data.tokenizer, (document.text for document in run.data.read_held_out()))) is not None:
        note(why)
    train = run.recipe.train
    passes = run.total_steps * train.batch * run.recipe.data.seq_len / len(run.data.train)
    if passes > MANY_PASSES and train.steps is not None:
        note(f"the text will be read {passes:,.1f} times: beyond {MANY_PASSES} times it teaches less and less")


def _finish(run: Run, result: Result, remedy: str) -> None:
    """Samples, report, and the lines that say what to do with the model. `remedy`: what to do if it turns out to be no use, for
    which `DivergedError` is raised."""
    from cadre.cli.summary import summarize
    from cadre.train.report import write_report

    samples, unsound = _samples(run) if result.stopped is None else ([], None)
    report = write_report(run.path, summarize(run, result, samples, _command()))
    if unsound is not None:
        raise DivergedError(f"{run.path}: {unsound}; {remedy}")
    _print_results(run, result, report)


def _samples(run: Run) -> tuple[list[dict[str, str]], RunError | None]:
    """The run's prompts with the text that its finished model continues them by, printed on the way; and why there are no more,
    if the model turns out to be no use."""
    from cadre.hub.load import load
    from cadre.hub.template import chat_template

    samples: list[dict[str, str]] = []
    alone = run.parallel.size == 1
    if not alone and not _has_room(run.path / "model"):
        print("no samples: this machine's memory has no room for the whole model")
        return samples, None
    # Of several processes none has the model whole, but what they have saved is.
    model = run.model.eval() if alone else load(run.path / "model")[0]
    template = None if run.data.chat_template is None else chat_template(run.path / "model")
    for number, prompt in enumerate(run.prompts()):
        try:
            text = _sample(model, run.data.tokenizer, prompt, template, number)
        except UsageError as error:  # a template that refuses a conversation of one message
            print(f"no samples: {error}")
            break
        except RunError as error:
            return samples, error
        samples.append({"prompt": prompt, "text": text if template is None else f"\n{text}"})
        print(f"\n> {printable(prompt + samples[-1]['text'])}")
    return samples, None


def _print_results(run: Run, result: Result, report: Path) -> None:
    from cadre.cli.summary import load_line

    print()
    here = shlex.quote(str(run.path))
    if result.stopped:
        print(f"stopped by {result.stopped} after step {result.steps}; continue with: cadre train --resume {here}")
    elif result.bits_per_byte is not None:
        of = "" if result.read_share == 1 else f", of {result.read_share:.1%} of the held-out text"
        print(f"held-out score   {result.bits_per_byte:.4f} bits per byte{of}")
    print(
        f"trained          {result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s "
        f"({result.tokens_per_second:,.0f} tokens/s, {result.mfu:.0%} of this machine's GEMM rate)"
    )
    print(f"report           {report}")
    if not (run.path / "model").is_dir():
        return
    print(f"model            {run.path / 'model'}")
    if result.best_step is not None:
        print(f"best model       {run.path / 'best'}, of step {result.best_step}")
    print(f"in transformers  python -c {shlex.quote(load_line(run.path / 'model'))}")
    if run.config.num_nextn_predict_layers:
        print("                 (it names the prediction module's tensors as unexpected: it has no such module)")
    if run.data.chat_template is not None:
        print(f"try it           cadre chat {here}")
        return
    prompt = printable(max(run.prompts(), key=len, default="The"))
    print(f"try it           cadre generate {here} {shlex.quote(prompt)}")


def _sample(model: Transformer, tokenizer: Tokenizer, prompt: str, template: ChatTemplate | None, seed: int) -> str:
    """How a model goes on, or what it answers."""
    from cadre.infer.generate import generate, generate_ids

    if template is None:
        return generate(model, tokenizer, prompt, max_new_tokens=80, temperature=0.7, top_p=0.95, seed=seed)
    # The template writes special tokens itself.
    ids = tokenizer.encode(template.render([{"role": "user", "content": prompt}]), add_special_tokens=False).ids
    return tokenizer.decode(generate_ids(model, ids, max_new_tokens=80, temperature=0.7, top_p=0.95, seed=seed))


def _has_room(directory: Path) -> bool:
    """Whether this process can hold a model directory's weights, and half as much again, beside what it holds."""
    import torch

    from cadre.kernels.memory import free_bytes

    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return 1.5 * size < free_bytes(torch.device("cpu"))


def _command() -> str:
    return shlex.join(["cadre", *sys.argv[1:]])
