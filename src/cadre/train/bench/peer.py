"""The peer: transformers' model of the same shape under the same step, in its fastest mode, in turn with ours."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from cadre.errors import RunError, UsageError
from cadre.kernels.limits import default_device, gemm_flops_per_second, synchronize, training_dtype
from cadre.kernels.memory import free_bytes
from cadre.model.config import ModelConfig
from cadre.train.bench.step import ADAMW, CLIP, WARM_UP, changed, check_length, circumstances
from cadre.train.bench.worker import Build, Worker, ours, race, result
from cadre.train.checks import check_memory

# A mode whose first step is this many times the best one's is not tried a second time, nor waited for. (A processor without
# bfloat16 products can take a hundred times as long in that type.)
_HOPELESS = 2.0
# Starting a process, importing and building may take this many times what they took in the fastest mode so far.
_PATIENCE = 2.0


_Experts = Literal["eager", "grouped_mm", "batched_mm"] | None
_Precision = Literal["float32", "bfloat16", "autocast"]
_PRECISIONS: tuple[_Precision, ...] = ("float32", "bfloat16", "autocast")


@dataclass(frozen=True)
class Mode:
    """How transformers computes: its `experts_implementation` (None in a dense model), and float32, weights and all of the
    rest in bfloat16, or bfloat16 by autocast over float32 weights. Attention is always sdpa."""

    experts: _Experts
    dtype: _Precision

    def __str__(self) -> str:
        return f"{self.experts or 'dense'}, {self.dtype}"


class PeerStep:
    """As `TrainingStep`, by transformers: its model, its loss, the same clipping and the same fused AdamW."""

    def __init__(self, config: ModelConfig, mode: Mode, *, batch: int, seq_len: int, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        values = config.to_hf()
        theirs = AutoConfig.for_model(values.pop("model_type"), **values)
        dtype = torch.bfloat16 if mode.dtype == "bfloat16" else torch.float32
        choice = {} if mode.experts is None else {"experts_implementation": mode.experts}
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(theirs, dtype=dtype, attn_implementation="sdpa", **choice).to(device)
        self.model.train()
        self.batch, self.seq_len, self.device, self.autocast = batch, seq_len, device, mode.dtype == "autocast"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=ADAMW.lr, betas=(ADAMW.beta1, ADAMW.beta2), eps=ADAMW.eps,
            weight_decay=ADAMW.weight_decay, fused=True,
        )  # fmt: skip

    def __call__(self) -> float:
        ids = torch.randint(self.model.config.vocab_size, (self.batch, self.seq_len), device=self.device)
        synchronize(self.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start


def peer_step(config: ModelConfig, mode: Mode, *, batch: int, seq_len: int) -> Build:
    return partial(_peer_step, config, mode, batch, seq_len)


def _peer_step(config: ModelConfig, mode: Mode, batch: int, seq_len: int) -> PeerStep:
    return PeerStep(config, mode, batch=batch, seq_len=seq_len, device=default_device())


def comparable(config: ModelConfig) -> ModelConfig:
    """The config without what transformers does not train: multi-token prediction modules."""
    return changed(config, num_nextn_predict_layers=0)


def modes(config: ModelConfig) -> list[Mode]:
    """All modes that a model can run in."""
    experts: tuple[_Experts, ...] = ("eager", "grouped_mm", "batched_mm") if config.has_experts else (None,)
    return [Mode(way, dtype) for dtype, way in itertools.product(_PRECISIONS, experts)]


def selected_bytes(config: ModelConfig, mode: Mode, tokens: int) -> int:
    """What `batched_mm` holds: a copy of an expert's weights for every choice of every token, in every layer, kept for
    the backward pass."""
    if mode.experts != "batched_mm":
        return 0
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    weights = 3 * config.hidden_size * (config.moe_intermediate_size or 0) * (2 if mode.dtype == "bfloat16" else 4)
    return sparse * tokens * (config.num_experts_per_tok or 0) * weights


def bench_peer(
    config: ModelConfig, *, batch: int, seq_len: int, steps: int, dtype: torch.dtype | None, note: Callable[[str], None]
) -> dict[str, Any]:
    """Time steps of transformers' fastest mode and of ours in turn, each in a process of its own.

    Returns `peer` and `ours` (`speed` and peak memory of each), `speed_ratio` (their median step over ours), `memory_ratio`
    (our peak over theirs), `probe` (what each mode took, or why it did not run). Ours computes in `dtype`, or what is best
    here; theirs in whatever is fastest. Multi-token prediction is left out on both sides.

    Raises `UsageError` without transformers, `RunError` if no mode of it runs.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("--peer transformers: it is not installed here: pip install 'cadre-lm[test]' brings it")
    config = comparable(config)
    check_length(config, seq_len)
    device = default_device()
    check_memory(config, device, beside=config)
    dtype = dtype or training_dtype(device)
    best, probes = _probe(config, batch, seq_len, note)
    gemm = gemm_flops_per_second(dtype, device)
    shape: dict[str, Any] = {"batch": batch, "seq_len": seq_len}
    rounds = WARM_UP + steps
    builds = {f"transformers ({best})": peer_step(config, best, **shape), "cadre": ours(config, **shape, dtype=dtype)}
    taken = race(builds, steps, lambda done: note(f"in turn, {best}: {done} of {rounds} steps each"))
    gemm = max(gemm, gemm_flops_per_second(dtype, device))
    peer, mine = (result(config, **shape, taken=one) for one in taken)
    for side in (peer, mine):
        side["mfu"] = side["model_flops_per_second"] / gemm
    version = importlib.metadata.version("transformers")
    return {
        "peer": {"name": "transformers", "version": version, "mode": asdict(best), **peer},
        "ours": mine,
        "speed_ratio": peer["step_seconds_median"] / mine["step_seconds_median"],
        "memory_ratio": mine["peak_memory_bytes"] / peer["peak_memory_bytes"],
        "gemm_flops_per_second": gemm,
        "probe": probes,
        **circumstances(batch, seq_len, dtype, device),
    }


def _probe(config: ModelConfig, batch: int, seq_len: int, note: Callable[[str], None]) -> tuple[Mode, list[dict[str, Any]]]:
    """The mode with the fastest step of two, and what each took. Each has a process of its own, which may die."""
    best: Mode | None = None
    least = limit = float("inf")
    probes: list[dict[str, Any]] = []
    for mode in modes(config):
        note(f"probing transformers: {mode}")
        held, free = selected_bytes(config, mode, batch * seq_len), free_bytes(default_device())
        if held > free:
            reason = f"copies {held / 2**30:,.0f} GiB of weights, {free / 2**30:,.0f} GiB are free"
            probes.append({**asdict(mode), "reason": reason})
            continue
        try:
            with Worker(f"transformers ({mode})", peer_step(config, mode, batch=batch, seq_len=seq_len)) as worker:
                began = time.perf_counter()
                seconds = worker.step(within=limit)
                start = max(time.perf_counter() - began - seconds, 0.0)
                if seconds < _HOPELESS * least:
                    seconds = min(seconds, worker.step())
        except RunError as error:
            probes.append({**asdict(mode), "reason": str(error)})
            continue
        probes.append({**asdict(mode), "seconds": seconds})
        if seconds < least:
            best, least = mode, seconds
            limit = _PATIENCE * start + _HOPELESS * least
    if best is None:
        raise RunError(f"no mode of transformers ran this shape; the last one: {probes[-1]['reason']}")
    return best, probes
