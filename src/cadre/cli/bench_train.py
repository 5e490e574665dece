"""`cadre bench train`: time real optimizer steps, alone or against what they should be held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cadre.cli.options import DType, Json, Peer, counts, torch_dtype
from cadre.errors import UsageError

_STEPS = 8
_STEPS_OF_A_POINT = 3


def bench_train(
    config: Annotated[Path, typer.Option(metavar="FILE", help="A Hugging Face config.json.")],
    batch: Annotated[int, typer.Option(metavar="B", help="Sequences a step.", parser=counts())] = 16,
    seq_len: Annotated[
        int | None,
        typer.Option("--seq", metavar="N", help="Tokens a sequence. [default: 512, or the model's context]", parser=counts(2)),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Timed steps ({_STEPS}; {_STEPS_OF_A_POINT} a point of --sweep).", parser=counts()),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Compute type.")] = DType.auto,
    peer: Annotated[Peer | None, typer.Option(help="Against another library's fastest mode of the same shape.")] = None,
    tax: Annotated[bool, typer.Option("--tax", help="16 to 128 experts, top 2 to 8, against their dense twins.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="How time and memory grow with experts, width, length and batch.")
    ] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Experts that multiply in FP8, against those of the compute type.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Where the time goes, and how near the limits.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points of --tax or --sweep.")] = False,
    json_output: Json = False,
) -> None:
    """Time full optimizer steps of a model on random tokens, against the machine's GEMM rate."""
    mode = _mode({"peer": peer is not None, "tax": tax, "sweep": sweep, "fp8": fp8, "profile": profile}, quick)
    from cadre.cli import bench_tables
    from cadre.cli.progress import notes
    from cadre.model.config import ModelConfig

    shape = ModelConfig.from_file(config)
    bench = _bench(mode, quick)
    steps = steps or (_STEPS_OF_A_POINT if mode == "sweep" else _STEPS)
    with notes(json_output) as note:
        seq_len = seq_len or min(512, shape.max_position_embeddings)
        values = bench(shape, batch=batch, seq_len=seq_len, steps=steps, dtype=torch_dtype(dtype), note=note)
    result = {"mode": mode, **values}
    print(json.dumps(result) if json_output else "\n".join(bench_tables.lines(result)))


def _mode(chosen: dict[str, bool], quick: bool) -> str:
    modes = [name for name, is_chosen in chosen.items() if is_chosen]
    if len(modes) > 1:
        raise UsageError(f"--{modes[0]} and --{modes[1]} exclude each other: choose one")
    if quick and modes not in (["tax"], ["sweep"]):
        raise UsageError("--quick makes --tax or --sweep shorter: give it with one of them, or else fewer --steps")
    return modes[0] if modes else "train"


def _bench(mode: str, quick: bool) -> Callable[..., dict[str, Any]]:
    """What measures, all called alike."""
    if mode == "peer":
        from cadre.train.bench.peer import bench_peer

        return bench_peer
    if mode == "tax":
        from cadre.train.bench.tax import bench_tax

        return partial(bench_tax, quick=quick)
    if mode == "sweep":
        from cadre.train.bench.sweep import bench_sweep

        return partial(bench_sweep, quick=quick)
    if mode == "fp8":
        from cadre.train.bench.fp8 import bench_fp8

        return bench_fp8
    # These measure in this process.
    from cadre.kernels.allocator import keep_freed_memory

    keep_freed_memory()
    if mode == "profile":
        from cadre.train.bench.profile import bench_profile

        return bench_profile
    from cadre.train.bench.step import bench_train

    return lambda config, note, **shape: bench_train(config, **shape)
