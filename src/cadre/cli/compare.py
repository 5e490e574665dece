"""`cadre compare`: architectures raced over one budget, and a verdict."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadre.cli.options import Json
from cadre.data.remote import is_remote
from cadre.data.sources import SOTU
from cadre.errors import UsageError, write_error
from cadre.files import require_local
from cadre.units import clock, compact

if TYPE_CHECKING:
    from cadre.study.conduct import Watch
    from cadre.study.state import State

DEFAULT = "moe-vs-dense"


def compare(
    study: Annotated[
        str | None,
        typer.Argument(
            metavar="STUDY",
            help=f"A shipped study's name or a TOML file. [default: {DEFAULT}, or the one in --out]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where it goes, and goes on. [default: studies/STUDY-TIME]", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first answer: short runs, about 10 minutes here.")] = False,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Fit all of it into about so long, instead of the study's budget.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Text in place of the study's: files, folders or sotu; repeatable.")
    ] = None,
    rent: Annotated[float | None, typer.Option(metavar="USD", help="US dollars an hour of this machine.")] = None,
    nproc: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that train every run, instead of one.", min=1)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Match the arms, time their steps, say how long it takes.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Race architectures at equal cost: loss against FLOPs and seconds, cache, decode rate, price, and a verdict."""
    from cadre.cli.summary import cpu_name
    from cadre.study.conduct import begin, conduct, find
    from cadre.study.report import NUMBERS, write_report
    from cadre.study.spec import read_study

    for name, value in (("--minutes", minutes), ("--rent", rent)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} {value:g}: must be above 0")
    going_on = out is not None and (out / "study.json").is_file()
    if study is None and not going_on:
        study = DEFAULT
    wanted = None if study is None else read_study(study)
    path = out or Path("studies") / f"{wanted[0].name if wanted else DEFAULT}-{time.strftime('%Y%m%d-%H%M%S')}"
    require_local(path)
    there = path.exists()
    _make(path)
    with _alone(path), _left_empty(path, there), _watching(json_output) as watch:
        state = find(path, wanted[0] if wanted else None, wanted[1] if wanted else None, quick) if going_on else None
        if state is None:
            assert wanted is not None
            chosen = wanted[0].shortened() if quick else wanted[0]
            fit = minutes or (wanted[0].quick.minutes if quick else None)
            state = begin(
                chosen, wanted[1], path, quick=quick, minutes=fit, rent=rent, cpu=cpu_name(), watch=watch,
                source=[_lasting(entry) for entry in data or []], processes=nproc or 1,
            )  # fmt: skip
        elif nproc is not None and nproc != state.processes:
            raise UsageError(f"--out {path}: the study there began with --nproc {state.processes}: its times would not compare")
        elif minutes is not None or rent is not None or data:
            raise UsageError(f"--out {path}: the study there has begun; --minutes, --data and --rent are for a new one")
        _announce(state, watch)
        if dry_run:
            _end(state, json_output, {"arms": list(state.arms), "seconds": _left(state)})
            return
        try:
            conduct(state, watch)
        except KeyboardInterrupt:
            write_report(state)
            watch.note(f"interrupted; continue with: cadre compare --out {path}")
            raise
    _end(state, json_output, json.loads((path / NUMBERS).read_text(encoding="utf-8")))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep others from conducting the study meanwhile."""
    from cadre.train.run import only_writer

    with ExitStack() as held:
        try:
            held.enter_context(only_writer(path))
        except UsageError:
            raise UsageError(f"--out {path}: another process conducts this study: wait for it or stop it") from None
        yield


@contextmanager
def _left_empty(path: Path, was_there: bool) -> Iterator[None]:
    """A folder that was made for a study that is refused goes again, with whatever timing left in it."""
    try:
        yield
    except UsageError:
        if not was_there and not (path / "study.json").exists():
            shutil.rmtree(path, ignore_errors=True)
        raise


def _lasting(entry: str) -> str:
    """An entry of the text as it can be found from anywhere."""
    return entry if entry == SOTU or is_remote(entry) else str(Path(entry).absolute())


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--out {path}: is a file: choose a folder") from None
    except OSError as error:
        raise write_error(f"--out {path}: cannot be made", error) from None


def _announce(state: State, watch: Watch) -> None:
    """The arms as matched, and how long all of it takes."""
    watch.note(f"{state.study.title}: a budget of {compact(state.amount)} {state.study.budget.unit} a run")
    for name, arm in state.arms.items():
        steps = next(job.steps for job in state.jobs if job.kind == "run" and job.arm == name)
        solved = "".join(f", {field} = {value}" for field, value in arm.solved.items())
        passes = steps * arm.recipe.train.batch * arm.recipe.data.seq_len / state.train_tokens
        watch.note(
            f"  {name}: {arm.count.total_parameters / 1e6:.2f}M parameters, {arm.count.active_parameters / 1e6:.2f}M active, "
            f"{arm.flops_per_token / 1e6:.1f} MFLOPs/token, {arm.count.kv_cache_bytes_per_token:,} cache bytes/token{solved}; "
            f"{steps:,} steps of {state.step_seconds[name]:.3f} s, {passes:,.1f} times the text"
        )
    left = sum(state.result(job) is None for job in state.jobs)
    watch.note(f"{left} of {len(state.jobs)} runs to go, about {clock(_left(state))} in all")


def _left(state: State) -> float:
    from cadre.study.conduct import Clock

    left = Clock(state)
    for job in state.jobs:
        if state.result(job) is not None:
            left.done(job)
    return left.seconds()


def _end(state: State, json_output: bool, values: dict[str, Any]) -> None:
    from cadre.study.report import PAGE

    if json_output:
        typer.echo(json.dumps(values))
    elif "verdict" in values:
        said = values["verdict"]
        typer.echo("")
        for line in [said["headline"], *(f"- {line}" for line in said["arms"].values()), *(f"! {c}" for c in said["cautions"])]:
            typer.echo(line)
        typer.echo(f"report           {state.path / PAGE}")
    else:
        typer.echo(f"begin it with: cadre compare --out {state.path}")


@contextmanager
def _watching(json_output: bool) -> Iterator[Watch]:
    """On a terminal a line that moves and notes above it, elsewhere notes only; beside JSON on standard error."""
    from rich.console import Console

    from cadre.cli.progress import moving_line

    console = Console(stderr=json_output, highlight=False, markup=False, emoji=False)
    with moving_line(console) as show:

        class Lines:
            def note(self, text: str) -> None:
                console.print(f"{time.strftime('%H:%M:%S')}  {text}", soft_wrap=True)

            def moving(self, text: str) -> None:
                show(text)

        yield Lines()
