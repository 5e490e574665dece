"""How fast a real optimizer step is: forward, backward, clipping, AdamW, bias update, on random tokens."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from cadre.errors import UsageError
from cadre.kernels.limits import best_dtype, default_device, gemm_flops_per_second, peak_memory_bytes, synchronize
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.train.balance import Balance
from cadre.train.objective import losses
from cadre.train.optimizer import Optimizer
from cadre.train.recipe import OptimizerSection
from cadre.train.run import check_memory


def bench_train(config: ModelConfig, *, batch: int, seq_len: int, steps: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """Time `steps` optimizer steps of `batch` x `seq_len` random tokens after two that warm up.

    Returns medians: tokens/s, seconds a step, model FLOP/s (the counted 6 N + attention, no recomputation), the GEMM rate
    measured before and after (the larger), their ratio `mfu`, peak memory of the process in bytes.
    """
    if seq_len > config.max_position_embeddings:
        raise UsageError(f"--seq {seq_len}: the model's context is {config.max_position_embeddings}")
    device = default_device()
    check_memory(config, device)
    dtype = dtype or best_dtype(device)
    torch.manual_seed(0)
    model = Transformer(config).initialize(0).to(device)
    model.compute_dtype = dtype
    model.train()
    optimizer = Optimizer(model, OptimizerSection(name="adamw", lr=1e-3))
    balance = Balance(model, speed=0.001)
    flops = count(config, context=seq_len).training_flops_per_token
    gemm = gemm_flops_per_second(dtype, device)
    seconds = []
    for _ in range(steps + 2):
        ids = torch.randint(config.vocab_size, (batch, seq_len + 1 + len(model.mtp)), device=device)
        synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        balance.reset()
        loss = losses(model, ids, None, balance, mtp_weight=0.3, sequence_weight=1e-4)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        balance.update()
        optimizer.step(1.0)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    gemm = max(gemm, gemm_flops_per_second(dtype, device))
    median = statistics.median(seconds[2:])
    rate = batch * seq_len / median
    return {
        "tokens_per_second": rate,
        "step_seconds_median": median,
        "step_seconds": seconds[2:],
        "model_flops_per_second": rate * flops,
        "gemm_flops_per_second": gemm,
        "mfu": rate * flops / gemm,
        "peak_memory_bytes": peak_memory_bytes(device),
        "training_flops_per_token": flops,
        "batch": batch,
        "seq_len": seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
