"""Decode rates of the arms, measured in turn: at every context and batch one step of each shape after another."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from cadre.errors import UsageError
from cadre.infer.bench.decode import WARM_UP, Decoding, random_model
from cadre.kernels.limits import dtype_name
from cadre.model.config import ModelConfig
from cadre.study.spec import Decode

# Timed steps of each shape at each point: at least and at most so many, the others while all have taken fewer seconds a shape.
_ROUNDS = (12, 48)
_CHEAP = 2.0


def decode_rates(
    configs: dict[str, ModelConfig], decode: Decode, dtype: torch.dtype, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row per arm, context and batch: tokens/s over random weights (routing is then about even, as a balanced model's),
    or why it could not be measured. `dtype`: of all arms' weights and caches. The arms' contexts are raised where they are
    shorter than what is asked for. Arms of one shape (`same_as` the first of them) are one measurement. `over_first`: the
    quartiles over the rounds of the first arm's seconds over this arm's, where both were measured and are not the same."""
    least, most = _ROUNDS
    longest = max(decode.contexts) + WARM_UP + most
    reaching = {
        name: config.model_copy(update={"max_position_embeddings": max(longest, config.max_position_embeddings)})
        for name, config in configs.items()
    }
    # Of each arm, the first one of its shape.
    same = {name: next(other for other in reaching if reaching[other] == config) for name, config in reaching.items()}
    first = next(iter(same))
    models = {name: random_model(reaching[name], dtype, None) for name in dict.fromkeys(same.values())}
    rows: list[dict[str, Any]] = []
    for context, batch in itertools.product(decode.contexts, decode.batches):
        note(f"decoding at context {context:,}, batch {batch}")
        at_work: dict[str, Decoding] = {}
        reasons: dict[str, str] = {}
        for name, model in models.items():
            try:
                at_work[name] = Decoding(model, context, batch, WARM_UP + most)
            except UsageError as error:
                reasons[name] = str(error)
        seconds = _in_turn(at_work, least, most)
        for name, measured in same.items():
            row: dict[str, Any] = {"arm": name, "context": context, "batch": batch}
            if measured != name:
                row["same_as"] = measured
            if measured in reasons:
                rows.append({**row, "reason": reasons[measured]})
                continue
            row |= {
                "tokens_per_second": batch / statistics.median(seconds[measured]), "rounds": len(seconds[measured]),
                "cache_bytes_per_token": at_work[measured].engine.pool.bytes_per_token, "dtype": dtype_name(dtype),
            }  # fmt: skip
            if measured != first and first in seconds:
                row["over_first"] = _quartiles([a / b for a, b in zip(seconds[first], seconds[measured], strict=True)])
            rows.append(row)
    return rows


def _in_turn(at_work: dict[str, Decoding], least: int, most: int) -> dict[str, list[float]]:
    """Seconds of a step of each, of rounds in which every one makes one; every other round goes backwards, since what one
    leaves in the processor's caches is what the next one finds."""
    seconds: dict[str, list[float]] = {name: [] for name in at_work}
    until = math.inf
    for number in range(WARM_UP + most):
        if number == WARM_UP:
            until = time.perf_counter() + _CHEAP * len(at_work)
        if number >= WARM_UP + least and time.perf_counter() > until:
            break
        for name in list(at_work) if number % 2 else reversed(list(at_work)):
            seconds[name].append(at_work[name].step())
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


def _quartiles(ratios: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}
