"""`cadre train`: a recipe in, a run directory out."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadre.errors import UsageError

if TYPE_CHECKING:
    from cadre.train.recipe import Recipe
    from cadre.train.run import Run
    from cadre.train.trainer import Result


def train(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe's name or a TOML file; `pocket` if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/RECIPE-TIME if left out.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", min=1)] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, such as 5M, instead of --steps.")] = None,
    budget: Annotated[str | None, typer.Option(help="Wall clock to train for, such as 90s, 10m or 2h.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, over the recipe's.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
) -> None:
    """Train a model by a recipe, on a named corpus or your own text."""
    from cadre.cli.progress import TrainingLine
    from cadre.kernels.allocator import keep_freed_memory
    from cadre.kernels.limits import default_device
    from cadre.train.recipe import read_recipe
    from cadre.train.run import held_recipe, start
    from cadre.train.run import resume as resume_run
    from cadre.train.trainer import Trainer

    if sum(x is not None for x in (steps, tokens, budget)) > 1:
        raise UsageError("--steps, --tokens and --budget exclude each other: give one")
    if resume is not None and out is not None:
        raise UsageError("--out and --resume exclude each other: a resumed run stays in its directory")
    keep_freed_memory()
    if resume is not None:
        held_recipe(resume)
    named = recipe or ("pocket" if resume is None else str(resume / "recipe.toml"))
    chosen = _with_length(read_recipe(named, set_), steps, tokens, budget)
    line, device = TrainingLine(), default_device()
    if resume is not None:
        run = resume_run(resume, chosen, device, line.note)
    else:
        path = out or Path("runs") / f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = start(chosen, path, device, line.note)
    _announce(run, line.note)
    with line:
        result = Trainer(run, line).train()
    _finish(run, result)


def _with_length(recipe: Recipe, steps: int | None, tokens: str | None, budget: str | None) -> Recipe:
    """The recipe with the length that the command line asks for, if it does, instead of its own."""
    from cadre.cli.progress import STEPS_OF_A_BUDGET

    length: dict[str, float | None]
    if budget is not None:
        length = {"steps": STEPS_OF_A_BUDGET, "minutes": _seconds(budget) / 60}
    elif tokens is not None:
        per_step = recipe.train.batch * recipe.data.seq_len
        length = {"steps": max(1, round(_tokens(tokens) / per_step)), "minutes": None}
    elif steps is not None:
        length = {"steps": steps, "minutes": None}
    else:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=length)})


def _announce(run: Run, note: Any) -> None:
    from cadre.plan.count import count

    sizes = count(run.config, context=run.recipe.data.seq_len)
    note(
        f"{run.recipe.name}: {sizes.total_parameters / 1e6:.1f}M parameters, {sizes.active_parameters / 1e6:.1f}M active, "
        f"{run.config.model_type}; {len(run.data.train):,} tokens of {run.recipe.data.source}; {run.recipe.train.dtype}"
    )


def _finish(run: Run, result: Result) -> None:
    """Samples, report, and the lines that say what to do with the model."""
    from cadre.cli.summary import load_line, summarize
    from cadre.infer.generate import generate
    from cadre.train.report import write_report

    samples = []
    if result.stopped is None:
        run.model.eval()
        for number, prompt in enumerate(run.recipe.eval.prompts):
            text = generate(
                run.model, run.data.tokenizer, prompt, max_new_tokens=80, temperature=0.7, top_p=0.95, seed=number
            )
            samples.append({"prompt": prompt, "text": text})
            print(f"\n> {prompt}{text}")
    report = write_report(run.path, summarize(run, result, samples, _command()))
    print()
    here = shlex.quote(str(run.path))
    if result.stopped:
        print(f"stopped by {result.stopped} after step {result.steps}; continue with: cadre train --resume {here}")
    elif result.bits_per_byte is not None:
        print(f"held-out score   {result.bits_per_byte:.4f} bits per byte")
    print(
        f"trained          {result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s "
        f"({result.tokens_per_second:,.0f} tokens/s, {result.mfu:.0%} of this machine's GEMM rate)"
    )
    print(f"report           {report}")
    print(f"model            {run.path / 'model'}")
    print(f'in transformers  python -c "{load_line(run.path / "model")}"')
    print(f'try it           cadre generate {here} "Fellow citizens"')


def _command() -> str:
    return shlex.join(["cadre", *sys.argv[1:]])


def _seconds(budget: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--budget {budget}: must be a time such as 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _tokens(tokens: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMBT]?)", tokens.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--tokens {tokens}: must be a number such as 5000000, 5M or 1.5B")
    return float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]]
