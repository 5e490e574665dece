"""The `cadre` command: one verb per file, and one place where errors become exit statuses."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cadre.errors import RunError, Terminated, UsageError, one_line, printable, shorten, write_error


class _Verbs(TyperGroup):
    """Typer ends an interrupted command without a word, and with one status for every signal. The processes of a run that has
    several leave it so: the one that started them tells what happened."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as ended:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                raise
            _end_interrupted(ended)


def _app() -> typer.Typer:
    from cadre.cli.bench import bench_app
    from cadre.cli.chat import chat
    from cadre.cli.compare import compare
    from cadre.cli.convert import convert
    from cadre.cli.data import data
    from cadre.cli.evaluate import evaluate
    from cadre.cli.generate import generate
    from cadre.cli.plan import plan
    from cadre.cli.routes import routes
    from cadre.cli.serve import serve
    from cadre.cli.train import train

    app = typer.Typer(
        name="cadre",
        cls=_Verbs,
        help="Train and run DeepSeek-style language models, cheaply, from 2 CPU cores up.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback(invoke_without_command=True)
    def options(version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False) -> None:
        if version:
            import cadre

            typer.echo(f"cadre {cadre.__version__}")
            raise typer.Exit

    app.command("train", short_help="Train a model by a recipe, on your own text.")(train)
    app.command("generate", short_help="Continue a prompt.")(generate)
    app.command("chat", short_help="Talk to a model.")(chat)
    app.command("serve")(serve)
    app.command("eval", short_help="Score a model on text: bits per byte.")(evaluate)
    app.command("data", short_help="Tokenise text once, into shards on disk.")(data)
    app.command("convert", short_help="Write a model as GGUF, or of another dtype.")(convert)
    app.command("plan", short_help="Memory, time and price before anything runs.")(plan)
    app.command("compare", short_help="Race architectures at equal cost.")(compare)
    app.command("routes", short_help="What each expert learned, as a page.")(routes)
    app.add_typer(bench_app, name="bench")
    return app


# How long an OpenMP thread of a CPU build of torch waits in a loop before it sleeps. Its default, for ever in effect, makes
# a step many times longer as soon as other work wants a core; this bound costs nothing when the machine is idle
# (docs/log.md). The library reads it once, when torch is imported.
_SPIN = "30000"
# Of a message that repeats what it was given so many characters are shown: what is wrong begins it, what is right ends it.
_LONGEST = 1000


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 bad usage or bad input, 130 interrupted by Ctrl-C, 143 by
    SIGTERM, 129 by a closed terminal."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN)
    if any("\ud800" <= letter <= "\udfff" for letter in "".join(sys.argv)):
        _end("arguments must be UTF-8: none of them can be written down otherwise", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error is: a file that a folder holds may have a name that cannot be written otherwise.
        sys.stdout.reconfigure(errors="backslashreplace")
    # What has been half written is cleared away on the way out, as after Ctrl-C. Training saves instead.
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        signal.signal(signal.SIGHUP, _terminate)
    try:
        sys.exit(_app()(standalone_mode=False) or 0)
    except UsageError as error:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(error.status)  # the first process of the machine has found the same fault, and says it
        _end(str(error), error.status)
    except RunError as error:
        _end(str(error), error.status)
    except KeyboardInterrupt as ended:
        _end_interrupted(ended)
    except Exception as error:
        _end_of_usage(error)
        _end_of_memory(error)
        _end_of_file(error)
        raise


def _terminate(number: int, frame: object) -> None:
    raise Terminated(number)


def _end_interrupted(ended: KeyboardInterrupt) -> NoReturn:
    status = 128 + (ended.number if isinstance(ended, Terminated) else signal.SIGINT)
    if "CADRE_LAUNCHED" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit(status)  # `cadre train --nproc` started it, and says so once; or starts it again
    _end("interrupted", status)


def _end_of_usage(error: Exception) -> None:
    """Typer's own complaints (an unknown option, a number out of range) as one line; no arguments at all ask for help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    if hasattr(error, "format_message"):
        said = error.format_message().replace("Value error, ", "", 1)  # pydantic's, through which typer reads values
        _end(f"{said} (see cadre --help)", 2)


def _end_of_memory(error: Exception) -> None:
    """Python's own, and what torch calls it: on a CPU, on a card."""
    said = str(error)
    if isinstance(error, MemoryError) or any(f"{what} memory" in said for what in ("can't allocate", "not enough", "out of")):
        _end("this machine has not enough memory for that: use a smaller model, batch or sequence", 1)


def _end_of_file(error: Exception) -> None:
    """What the system refused and nobody put into words."""
    if isinstance(error, OSError) and error.filename is not None:
        _end(f"{error.filename}: {error.strerror}", write_error("", error).status)


def _end(message: str, status: int) -> NoReturn:
    print("cadre: " + shorten(printable(one_line(message)), _LONGEST), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
