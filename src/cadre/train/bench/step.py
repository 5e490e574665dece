"""How fast a real optimizer step is: forward, backward, clipping, AdamW, bias update, on random tokens."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from cadre.errors import UsageError
from cadre.kernels.limits import (
    default_device,
    dtype_name,
    gemm_flops_per_second,
    peak_memory_bytes,
    synchronize,
    training_dtype,
)
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.train.balance import Balance
from cadre.train.checks import check_memory
from cadre.train.objective import MicroBatch, losses
from cadre.train.optimizer import Optimizer
from cadre.train.recipe import BalanceSection, OptimizerSection

# Steps that are not timed: the first ones fill the allocator and make the optimizer's state.
WARM_UP = 2

# What optimizer and balance of a measured step are, a peer's included, where no recipe says otherwise.
ADAMW = OptimizerSection(name="adamw", lr=1e-3)
BALANCE = BalanceSection()
# Of every measured step, a peer's included: the largest norm of gradients.
CLIP = 1.0
MTP_WEIGHT = 0.3


class TrainingStep:
    """A model in training on `batch` x `seq_len` random tokens: a pass is forward and backward, an update what follows. Float32
    masters, computing in `dtype`, experts in FP8 if told to; `mtp_rows` of the sequences (None: all) train multi-token
    prediction. Calling it makes one step on fresh tokens and returns its seconds, the making of the tokens left out.

    Raises `UsageError` for a sequence beyond the model's context and a model beyond the machine's memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        fp8_experts: bool = False,
        optimizer: OptimizerSection = ADAMW,
        balance: BalanceSection = BALANCE,
        mtp_rows: int | None = None,
    ) -> None:
        check_length(config, seq_len)
        check_memory(config, device, optimizer.name)
        torch.manual_seed(0)
        self.batch, self.seq_len, self.dtype, self.device = batch, seq_len, dtype, device
        self.mtp_rows = batch if mtp_rows is None else mtp_rows
        with device:
            self.model = Transformer(config).initialize(0, device)
        self.model.compute_in(dtype, fp8_experts)
        self.model.train()
        self.optimizer = Optimizer(self.model, optimizer, narrow=dtype == torch.bfloat16)
        self.balance = Balance(self.model, balance)

    def __call__(self) -> float:
        ids = self.tokens()
        synchronize(self.device)
        start = time.perf_counter()
        self.run_pass(ids)
        self.update()
        synchronize(self.device)
        return time.perf_counter() - start

    def tokens(self) -> Tensor:
        """Random ids, int64 [batch, seq_len + 1 + modules of multi-token prediction]."""
        reach = self.seq_len + 1 + len(self.model.mtp)
        return torch.randint(self.model.config.vocab_size, (self.batch, reach), device=self.device)

    def loss(self, ids: Tensor) -> Tensor:
        """The loss to take gradients of, from none: the last step's are dropped."""
        self.optimizer.zero_grad()
        self.balance.reset()
        share = self.mtp_rows / self.batch
        micro = MicroBatch(ids, mtp_rows=self.mtp_rows)
        return losses(self.model, micro, self.balance, mtp_weight=MTP_WEIGHT, mtp_share=share).total

    def run_pass(self, ids: Tensor) -> None:
        self.loss(ids).backward()

    def update(self, factor: float = 1.0) -> None:
        """What follows the backward pass, at so much of the learning rate."""
        self.optimizer.clip(CLIP)
        self.balance.update()
        self.optimizer.step(factor)


def check_length(config: ModelConfig, seq_len: int) -> None:
    """Raise `UsageError` where the model's context is shorter."""
    if seq_len > config.max_position_embeddings:
        raise UsageError(f"--seq {seq_len}: the model's context is {config.max_position_embeddings}")


def changed(config: ModelConfig, **values: Any) -> ModelConfig:
    """The config with some fields changed, checked again. Raises `UsageError` for a shape that cannot be."""
    return ModelConfig(**{**config.model_dump(exclude_none=True), **values})


def speed(config: ModelConfig, *, batch: int, seq_len: int, seconds: list[float]) -> dict[str, Any]:
    """What the seconds of some steps say: their median, tokens/s, model FLOP/s (the counted 6 N + attention, no
    recomputation)."""
    median = statistics.median(seconds)
    rate = batch * seq_len / median
    flops = count(config, context=seq_len).training_flops_per_token
    return {
        "tokens_per_second": rate,
        "step_seconds_median": median,
        "step_seconds": seconds,
        "model_flops_per_second": rate * flops,
        "training_flops_per_token": flops,
    }


def circumstances(batch: int, seq_len: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Under what a result was measured."""
    return {
        "batch": batch,
        "seq_len": seq_len,
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def bench_train(config: ModelConfig, *, batch: int, seq_len: int, steps: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """Time `steps` optimizer steps of `batch` x `seq_len` random tokens after two that warm up.

    Returns `speed` and `circumstances`, the GEMM rate measured before and after (the larger), the ratio `mfu` of model
    FLOP/s to it, and the peak memory of the process in bytes.
    """
    device = default_device()
    dtype = dtype or training_dtype(device)
    step = TrainingStep(config, batch=batch, seq_len=seq_len, dtype=dtype, device=device)
    gemm = gemm_flops_per_second(dtype, device)
    seconds = [step() for _ in range(WARM_UP + steps)][WARM_UP:]
    gemm = max(gemm, gemm_flops_per_second(dtype, device))
    result = speed(config, batch=batch, seq_len=seq_len, seconds=seconds)
    return {
        **result,
        "gemm_flops_per_second": gemm,
        "mfu": result["model_flops_per_second"] / gemm,
        "peak_memory_bytes": peak_memory_bytes(device),
        **circumstances(batch, seq_len, dtype, device),
    }
