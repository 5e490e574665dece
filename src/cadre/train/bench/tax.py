"""The routing tax: what a step with experts takes over the step of a dense model with as much arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cadre.errors import UsageError
from cadre.kernels.limits import default_device, training_dtype
from cadre.model.config import ModelConfig
from cadre.plan.count import count
from cadre.train.bench.step import changed, check_length, circumstances
from cadre.train.bench.worker import TimeLeft, ours, race, result
from cadre.train.checks import check_memory

EXPERTS = (16, 64, 128)
TOP_K = (2, 4, 8)
QUICK_EXPERTS = (64,)

# Grouped products want rows of a multiple of 16 bytes: 8 elements of bfloat16.
_ALIGNED = 8


def active_width(config: ModelConfig) -> int:
    """How wide the feed-forward of one token is in a sparse layer: its routed experts and the shared ones together."""
    return ((config.num_experts_per_tok or 0) + config.n_shared_experts) * (config.moe_intermediate_size or 0)


def with_experts(config: ModelConfig, experts: int, top_k: int, width: int) -> ModelConfig:
    """The config with other experts. Groups stay where `experts` and `top_k` allow them, else there are none."""
    groups, chosen = config.n_group, config.topk_group
    if experts % groups or experts // groups < 2 or top_k > chosen * (experts // groups):
        groups = chosen = 1
    return changed(
        config, n_routed_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=width, n_group=groups,
        topk_group=chosen,
    )  # fmt: skip


def variant(config: ModelConfig, experts: int, top_k: int) -> ModelConfig:
    """The config with `experts` of which each token takes `top_k`, its active width as before: experts are narrower the more
    of them a token takes, rounded to what kernels want. Its dense layers, if any, get that active width too, so that
    its dense twin differs in nothing but the routing."""
    width = active_width(config) / (top_k + config.n_shared_experts)
    step = _ALIGNED if width >= _ALIGNED else 1
    sparse = with_experts(config, experts, top_k, max(1, step * round(width / step)))
    return changed(sparse, intermediate_size=active_width(sparse)) if sparse.first_k_dense_replace else sparse


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The same attention, depth and vocabulary with dense feed-forward layers of the active width. Of a `variant`, its
    active FLOPs are the variant's, less the router's own."""
    return changed(config, intermediate_size=active_width(config), first_k_dense_replace=config.total_layers)


def bench_tax(
    config: ModelConfig,
    *,
    batch: int,
    seq_len: int,
    steps: int,
    dtype: torch.dtype | None,
    quick: bool = False,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Time a step with 16, 64 and 128 experts (64 if `quick`), top 2, 4 and 8, against the dense twin's, in turn.

    Returns `rows`, each with experts, top_k, widths, parameters, median step and peak memory of both, and `ratio`, the
    step over the twin's. Raises `UsageError` for a model without experts.
    """
    if not config.has_experts:
        raise UsageError("--tax: the config has no experts; give one with experts, its dense twin is made from it")
    check_length(config, seq_len)
    device = default_device()
    dtype = dtype or training_dtype(device)
    shapes = [(experts, top_k) for top_k in TOP_K for experts in (QUICK_EXPERTS if quick else EXPERTS)]
    for experts, top_k in shapes:
        sparse = variant(config, experts, top_k)
        check_memory(sparse, device, beside=dense_twin(sparse))
    left = TimeLeft(len(shapes))
    rows: list[dict[str, Any]] = []
    for experts, top_k in shapes:
        note(f"{experts} experts, top {top_k}: {len(rows)} of {len(shapes)} done, {left} left")
        rows.append(_row(variant(config, experts, top_k), batch, seq_len, steps, dtype))
        left.add(1)
    return {"rows": rows, **circumstances(batch, seq_len, dtype, device)}


def _row(config: ModelConfig, batch: int, seq_len: int, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    twin = dense_twin(config)
    shape: dict[str, Any] = {"batch": batch, "seq_len": seq_len}
    builds = {"experts": ours(config, **shape, dtype=dtype), "dense": ours(twin, **shape, dtype=dtype)}
    taken = race(builds, steps)
    sparse, dense = (result(of, **shape, taken=one) for of, one in zip((config, twin), taken, strict=True))
    return {
        "experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "expert_width": config.moe_intermediate_size,
        "active_width": active_width(config),
        "total_parameters": count(config).total_parameters,
        "dense_total_parameters": count(twin).total_parameters,
        "ratio": sparse["step_seconds_median"] / dense["step_seconds_median"],
        "sparse": sparse,
        "dense": dense,
    }
