"""`cadre bench decode`: how fast a model of some shape decodes on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cadre.cli.options import DType, Json, Peer, Quantize, counts, torch_dtype


def bench_decode(
    config: Annotated[Path, typer.Option(metavar="FILE", help="A Hugging Face config.json.", show_default=False)],
    context: Annotated[
        int | None,
        typer.Option(metavar="N", parser=counts(), help="Tokens that each sequence has; 512, --sweep tries several.",
                     show_default=False),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="B", min=1, max=1024, help="Sequences decoded at a time; 1, --sweep tries several.",
                     show_default=False),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of weights and cache; auto weighs bytes against arithmetic.")] = DType.auto,
    quantize: Quantize = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=4, max=10_000, help="Measured steps; 24, 8 a point of --sweep.", show_default=False),
    ] = None,
    peer: Annotated[Peer | None, typer.Option(help="Decode the same shape in it, in turn.", show_default=False)] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Contexts and batches, beside MHA and GQA twins.")] = False,
    json_output: Json = False,
) -> None:  # fmt: skip
    """Time decoding on random weights, against the machine's memory rate."""
    from cadre.cli.progress import notes
    from cadre.errors import UsageError
    from cadre.infer.bench import decode
    from cadre.kernels.allocator import keep_freed_memory
    from cadre.model.config import ModelConfig

    if sweep and (peer or quantize):
        raise UsageError("--sweep measures Cadre alone, unquantized: leave out --peer and --quantize")
    keep_freed_memory()
    chosen = torch_dtype(dtype)
    shape = ModelConfig.from_file(config)
    result: dict[str, Any]
    with notes(json_output) as note:
        if sweep:
            contexts = decode.CONTEXTS if context is None else (context,)
            batches = decode.BATCHES if batch is None else (batch,)
            rows = decode.sweep(shape, dtype=chosen, note=note, contexts=contexts, batches=batches, steps=steps or 8)
            result = {"mode": "sweep", "rows": rows}
        else:
            result = decode.bench_decode(
                shape, context=context or 512, batch=batch or 1, dtype=chosen, quantization=quantize and quantize.value,
                steps=steps or 24, peer=peer is not None, note=note,
            )  # fmt: skip
    if json_output:
        typer.echo(json.dumps(result))
    else:
        for line in lines(result):
            typer.echo(line)


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The result for people."""
    if "rows" in result:
        yield f"{'attention':10}{'context':>8}{'batch':>7}{'tokens/s':>10}{'cache bytes/token':>19}"
        for row in result["rows"]:
            rate = f"{row['decode_tokens_per_second']:,.1f}" if "reason" not in row else "-"
            size = f"{row.get('cache_bytes_per_token', 0):,}" if "reason" not in row else "does not fit"
            yield f"{row['attention']:10}{row['context']:>8,}{row['batch']:>7}{rate:>10}{size:>19}"
        return
    kind = result["quantization"] or result["dtype"]
    yield (f"decode  {result['decode_tokens_per_second']:,.1f} tokens/s at context {result['context']:,}, "
           f"batch {result['batch']} ({kind})")  # fmt: skip
    yield f"prefill {result['prefill_tokens_per_second']:,.1f} tokens/s"
    yield (f"reads {result['bytes_read_per_step'] / 1e6:,.0f} MB a step: {result['bandwidth_fraction']:.0%} of "
           f"{result['memory_bandwidth'] / 1e9:,.1f} GB/s")  # fmt: skip
    if result["kernels"] not in ("native", "torch"):
        yield f"C++ kernels are missing: {result['kernels']}"
    if "peer" in result:
        other = result["peer"]
        for way in other["ways"]:
            yield (f"{way['name']} {way['version']} ({way['dtype']}, {way['experts'] or 'dense'}): decode "
                   f"{way['decode_tokens_per_second']:,.1f}, prefill {way['prefill_tokens_per_second']:,.1f} "
                   "tokens/s")  # fmt: skip
        yield (f"cadre decodes {result['speed_ratio']:.1f} times as fast as the peer's best, reads prompts "
               f"{result['prefill_ratio']:.1f} times as fast")  # fmt: skip
