"""`cadre bench`: measure this machine with real work."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(help="Measure this machine with real work.", no_args_is_help=True)


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@bench_app.callback()
def _bench() -> None:
    """Measure this machine with real work."""


@bench_app.command("train")
def bench_train(
    config: Annotated[Path, typer.Option(help="A Hugging Face config.json.")],
    batch: Annotated[int, typer.Option(help="Sequences a step.", min=1)] = 16,
    seq_len: Annotated[int, typer.Option("--seq", help="Tokens a sequence.", min=2)] = 512,
    steps: Annotated[int, typer.Option(help="Timed steps.", min=1)] = 8,
    dtype: Annotated[DType, typer.Option(help="Compute type.")] = DType.auto,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time full optimizer steps of a model on random tokens, against the machine's GEMM rate."""
    import torch

    from cadre.kernels.allocator import keep_freed_memory
    from cadre.model.config import ModelConfig
    from cadre.train import bench

    keep_freed_memory()
    chosen = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    result = bench.bench_train(ModelConfig.from_file(config), batch=batch, seq_len=seq_len, steps=steps, dtype=chosen)
    if json_:
        print(json.dumps(result))
        return
    print(f"{result['tokens_per_second']:,.0f} tokens/s, {result['step_seconds_median']:.3f} s a step ({result['dtype']})")
    print(f"{result['model_flops_per_second'] / 1e9:,.1f} GFLOP/s of {result['gemm_flops_per_second'] / 1e9:,.1f} in a large "
          f"GEMM: MFU {result['mfu']:.1%}")  # fmt: skip
    print(f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB")
