"""What this machine will do with a model, predicted from a few of its blocks that were measured on it.

Arithmetic only: `cadre.train.bench.calibrate` measures. It trains a model with one block of each kind that the whole one has,
and times one block of each kind by itself; every further block of a kind then adds what one took.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cadre.plan.shape import Shape

Kind = Literal["dense", "sparse"]

# What a byte kept for the backward pass costs in the C library's heap, which fits blocks in as best it can. Ours, measured on
# `pocket` and `pocket-dense` with 1, 2 and 4 blocks (1.0 and 1.4); an accelerator's peak is counted without gaps.
HEAP_GAPS = 1.2


@dataclass(frozen=True)
class Calibration:
    """A measurement on one machine, of one shape under one recipe. Seconds are medians, bytes are of one process.

    batch, micro_batch, seq_len: of the run that is to be predicted. rows: sequences of a measured pass.
    pass_seconds, update_seconds: of the measured model (one block of each kind, embedding, head, loss, multi-token prediction),
    forward and backward on `rows` sequences, and what follows the last backward pass (clipping, balance, optimizer).
    block_pass_seconds, block_update_seconds: the same of one block of a kind.
    process_bytes, growth_bytes: what a process holds that has loaded all that training loads, and how much more its peak is
    after steps of the measured model. copy_bytes, block_copy_bytes: of the measured model and of a block, the copy in the same
    memory that checkpoints are written from. block_kept_bytes: what a block keeps from forward to backward, kept_bytes what the
    measured model does, each for one sequence. block_state_bytes: weights, gradients and optimizer states of a block.
    decode_seconds: of one token after `decode_context` others; None if not measured.
    gemm_flops_per_second: by dtype, then size. memory_bytes_per_second: None if not measured.
    """

    device: str
    dtype: str
    threads: int
    batch: int
    micro_batch: int
    seq_len: int
    rows: int
    pass_seconds: float
    update_seconds: float
    block_pass_seconds: dict[Kind, float]
    block_update_seconds: dict[Kind, float]
    process_bytes: int
    growth_bytes: int
    kept_bytes: int
    block_kept_bytes: dict[Kind, int]
    block_state_bytes: dict[Kind, int]
    copy_bytes: int
    block_copy_bytes: dict[Kind, int]
    decode_seconds: float | None = None
    decode_context: int | None = None
    gemm_flops_per_second: dict[str, dict[str, float]] | None = None
    memory_bytes_per_second: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What a run will take. `terms`: seconds of a step by part, which add up to it. Decoding in tokens/s for one user."""

    seconds_per_step: float
    tokens_per_second: float
    peak_memory_bytes: int
    decode_tokens_per_second: float | None
    terms: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def forecast(shape: Shape, measured: Calibration, process_bytes: int | None = None) -> Forecast:
    """Predict a step of the shape that `measured` is a measurement for.

    A step is micro-batches x (passes of all blocks + passes of the ends) + one update. Memory is that of the process
    (`process_bytes`, weights apart, if it is there already), what the measured model added, and for every further block its
    states and what it keeps for the backward pass, with the heap's gaps.
    """
    blocks = kinds(shape)
    more = {kind: count - 1 for kind, count in blocks.items()}
    passes = measured.batch / measured.rows
    one_each = sum(measured.block_pass_seconds[kind] for kind in blocks)
    terms = {
        f"{kind} blocks": passes * count * measured.block_pass_seconds[kind] for kind, count in blocks.items()
    }  # fmt: skip
    # Negative only by noise of the measurement: the whole stays what was measured.
    terms["embedding, head and loss, prediction modules"] = passes * (measured.pass_seconds - one_each)
    terms["clipping, balance and optimizer"] = measured.update_seconds + sum(
        count * measured.block_update_seconds[kind] for kind, count in more.items()
    )
    seconds = sum(terms.values())
    gaps = 1.0 if measured.device.startswith("cuda") else HEAP_GAPS
    kept = (measured.micro_batch - measured.rows) * measured.kept_bytes
    states, copies = 0, measured.copy_bytes
    for kind, count in more.items():
        kept += count * measured.micro_batch * measured.block_kept_bytes[kind]
        states += count * measured.block_state_bytes[kind]
        copies += count * measured.block_copy_bytes[kind]
    held = measured.process_bytes if process_bytes is None else process_bytes
    return Forecast(
        seconds_per_step=seconds,
        tokens_per_second=measured.batch * measured.seq_len / seconds,
        peak_memory_bytes=round(held + measured.growth_bytes + states + copies + gaps * kept),
        decode_tokens_per_second=None if measured.decode_seconds is None else 1 / measured.decode_seconds,
        terms=terms,
    )


def kinds(shape: Shape) -> dict[Kind, int]:
    """How many blocks of each kind the main model has; kinds it lacks are left out."""
    sparse = shape.sparse_blocks
    counts: dict[Kind, int] = {"dense": len(shape.blocks) - sparse, "sparse": sparse}
    return {kind: count for kind, count in counts.items() if count}


def compare(predicted: dict[str, Any], seconds_per_step: float | None, peak_memory_bytes: int) -> list[dict[str, Any]]:
    """Prediction beside fact, a row a quantity: `name`, `predicted`, `measured`, `off` (of the prediction, as a share of
    the fact)."""
    pairs = [
        ("seconds_per_step", predicted["seconds_per_step"], seconds_per_step),
        ("peak_memory_bytes", predicted["peak_memory_bytes"], peak_memory_bytes),
    ]
    return [{"name": name, "predicted": said, "measured": fact, "off": said / fact - 1} for name, said, fact in pairs if fact]
