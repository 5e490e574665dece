"""`cadre bench`: measure this machine with real work. One file a verb; each is one line here."""

from __future__ import annotations

import typer

from cadre.cli.bench_decode import bench_decode
from cadre.cli.bench_train import bench_train

bench_app = typer.Typer(help="Measure this machine with real work.", no_args_is_help=True)

bench_app.command("train")(bench_train)
bench_app.command("decode")(bench_decode)
