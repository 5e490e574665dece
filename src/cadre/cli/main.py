"""The `cadre` command: one verb per file, and one place where errors become exit statuses."""

from __future__ import annotations

import sys

import typer

from cadre.errors import RunError, UsageError


def _app() -> typer.Typer:
    from cadre.cli.bench import bench_app
    from cadre.cli.chat import chat
    from cadre.cli.data import data
    from cadre.cli.evaluate import evaluate
    from cadre.cli.generate import generate
    from cadre.cli.train import train

    app = typer.Typer(
        name="cadre",
        help="Train and serve DeepSeek-style language models, cheaply, from 2 CPU cores up.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.command("train")(train)
    app.command("generate")(generate)
    app.command("chat")(chat)
    app.command("eval")(evaluate)
    app.command("data")(data)
    app.add_typer(bench_app, name="bench")
    return app


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 bad usage or bad input, 130 interrupted."""
    if any("\ud800" <= letter <= "\udfff" for letter in "".join(sys.argv)):
        _end("arguments must be UTF-8: none of them can be written down otherwise", 2)
    try:
        _app()(standalone_mode=True)
    except (UsageError, RunError) as error:
        _end(str(error), error.status)
    except KeyboardInterrupt:
        _end("interrupted", 130)


def _end(message: str, status: int) -> None:
    print("cadre: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
