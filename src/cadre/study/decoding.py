"""Decode rates of the arms, measured in turn: at every context and batch one step of each arm after another."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from cadre.errors import UsageError
from cadre.infer.bench.decode import WARM_UP, Decoding, random_model
from cadre.kernels.limits import dtype_name
from cadre.model.config import ModelConfig
from cadre.study.spec import Decode

# Timed steps of each arm at each point.
_STEPS = 12


def decode_rates(
    configs: dict[str, ModelConfig], decode: Decode, dtype: torch.dtype, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row per arm, context and batch: tokens/s over random weights (routing is then about even, as a balanced model's),
    or why it could not be measured. `dtype`: of all arms' weights and caches. The arms' contexts are raised where they are
    shorter than what is asked for."""
    total = WARM_UP + _STEPS
    longest = max(decode.contexts) + total
    models = {}
    for name, config in configs.items():
        reach = max(longest, config.max_position_embeddings)
        models[name] = random_model(config.model_copy(update={"max_position_embeddings": reach}), dtype, None)
    rows: list[dict[str, Any]] = []
    for context, batch in itertools.product(decode.contexts, decode.batches):
        note(f"decoding at context {context:,}, batch {batch}")
        at_work: dict[str, Decoding] = {}
        for name, model in models.items():
            try:
                at_work[name] = Decoding(model, context, batch, total)
            except UsageError as error:
                rows.append({"arm": name, "context": context, "batch": batch, "reason": str(error)})
        seconds: dict[str, list[float]] = {name: [] for name in at_work}
        for _ in range(total):
            for name, decoding in at_work.items():
                seconds[name].append(decoding.step())
        for name, decoding in at_work.items():
            median = statistics.median(seconds[name][WARM_UP:])
            rows.append({
                "arm": name, "context": context, "batch": batch, "tokens_per_second": batch / median,
                "cache_bytes_per_token": decoding.engine.pool.bytes_per_token, "dtype": dtype_name(dtype),
            })  # fmt: skip
    return rows
