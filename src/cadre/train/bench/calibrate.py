"""Measuring this machine on a model's own blocks, so that `cadre.plan.here` can predict a run before it runs.

What is measured is the training step itself (`cadre.train.objective`, `balance`, `optimizer`), of the config with one block of
each kind, on random tokens: prediction and fact come from the same code, clock, threads and allocator. It runs in a process of
its own, as fresh as one that begins to train: a heap that has been used before grows less, and leaves gaps.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from cadre.errors import RunError, UsageError, writing
from cadre.files import replace_file
from cadre.kernels.allocator import keep_freed_memory
from cadre.kernels.limits import (
    default_device,
    dtype_name,
    gemm_flops_per_second,
    memory_bytes_per_second,
    peak_memory_bytes,
    synchronize,
)
from cadre.kernels.memory import free_bytes
from cadre.model.config import ModelConfig
from cadre.model.scoring import token_nats
from cadre.model.transformer import Block
from cadre.plan.count import count
from cadre.plan.here import HEAP_GAPS, Calibration, Forecast, Kind, forecast, kinds
from cadre.plan.memory import Stage, largest_block, loss_bytes, optimizer_bytes, state_bytes, update_bytes
from cadre.plan.shape import Shape
from cadre.train.bench.step import CLIP, TrainingStep, changed
from cadre.train.figures import import_drawing
from cadre.train.optimizer import Optimizer
from cadre.train.recipe import OptimizerSection, Recipe
from cadre.train.run import Run

FILE_NAME = "prediction.json"

# Of the large product's rate, what a pass reaches at least: only to choose how many sequences to measure.
_LEAST_SHARE = 0.25
_GEMM_SIZES = (256, 512, 1024, 2048)
# Of the learning rate: what is measured stays as it was initialised.
_STILL = 1e-6
# Steps after which memory grows no more, and half as many after an evaluation.
_SETTLED = 10
# Whole passes that a measurement takes at least: two steps, an evaluation, two steps, and what a forward pass keeps; those that
# are timed come on top.
_LEAST_PASSES = 5
# What a process holds on a CPU that has loaded all that training loads, rounded up: 300 MB were measured.
_PROCESS_BYTES = 2**29
# Of the free memory, what a measurement may take: no more, or the machine begins to swap, and then to kill.
_MEMORY_USED = 0.8


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `repeats` times, then on until `seconds` have passed or it has been `most` times. Where a
    pass over all sequences would take more than `pass_seconds`, fewer are measured. After `deadline` seconds the process that
    measures is ended."""

    repeats: int
    most: int
    seconds: float
    pass_seconds: float
    deadline: float = 90.0


# THOROUGH: `cadre plan --here`, which within 30 seconds also measures products, the memory's rate and decoding. BRIEF: before a
# run. QUICK: each of the widths between which `cadre train --budget` chooses.
THOROUGH = Effort(repeats=3, most=12, seconds=10.0, pass_seconds=3.0)
BRIEF = Effort(repeats=2, most=5, seconds=1.5, pass_seconds=2.0)
QUICK = Effort(repeats=2, most=4, seconds=0.5, pass_seconds=0.5)


@dataclass(frozen=True)
class Step:
    """The step to be predicted: sequences of a batch and of a micro-batch, tokens of each, and the recipe's other choices
    that its time depends on."""

    batch: int
    micro_batch: int
    seq_len: int
    mtp_share: float
    optimizer: OptimizerSection

    @classmethod
    def of(cls, recipe: Recipe) -> Step:
        train = recipe.train
        micro = train.micro_batch or train.batch
        return cls(train.batch, micro, recipe.data.seq_len, train.mtp_share, recipe.optimizer)


def fewest_blocks(config: ModelConfig) -> ModelConfig:
    """The config with one block of each kind, and its multi-token prediction modules."""
    there = kinds(Shape.from_config(config))
    changes: dict[str, Any] = {"num_hidden_layers": len(there)}
    if config.family.scoring is not None:
        changes["first_k_dense_replace"] = 1 if "dense" in there else 0
        if not config.has_experts:
            changes["first_k_dense_replace"] = len(there) + config.num_nextn_predict_layers
    return changed(config, **changes)


def calibrate(
    config: ModelConfig, step: Step, *, dtype: torch.dtype, effort: Effort = THOROUGH, limits: bool = False
) -> Calibration:
    """Measure what `forecast` needs, in a new process; with `limits` also what this machine's products and memory do.

    Raises `UsageError` if even one block of each kind cannot be trained on one sequence in this machine's memory, or in the
    time there is, `RunError` if the process fails.
    """
    few = fewest_blocks(config)
    most_rows = _rows_in_memory(few, step, default_device())
    asked = {
        "config": few.model_dump(exclude_none=True),
        "step": {**dataclasses.asdict(step), "optimizer": step.optimizer.model_dump()},
        "dtype": dtype_name(dtype),
        "effort": dataclasses.asdict(effort),
        "limits": limits,
        "most_rows": most_rows,
    }
    command = [sys.executable, "-m", "cadre.train.bench.calibrate"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=effort.deadline
        )
    except subprocess.TimeoutExpired:
        raise RunError(
            f"measuring this machine had not ended after {effort.deadline:.0f} s and was stopped: the model is too large for "
            "it, or other work takes its time"
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        if done.returncode == UsageError.status and said:
            raise UsageError(said[-1])
        if done.returncode == -signal.SIGKILL:
            said = ["killed, most likely for want of memory"]
        raise RunError(f"measuring this machine failed: {said[-1] if said else f'status {done.returncode}'}")
    # What libraries may have printed stands before it.
    return Calibration(**json.loads(done.stdout.splitlines()[-1]))


def measure(
    few: ModelConfig, step: Step, dtype: torch.dtype, device: torch.device, effort: Effort, most_rows: int | None = None
) -> Calibration:  # fmt: skip
    """The measurement, in this process: `few` has one block of each kind. `most_rows`: sequences that there is memory for.

    Raises `UsageError` if one sequence takes so long that `effort.deadline` would pass."""
    rows = _rows(few, step, dtype, device, effort)
    rows = min(rows, most_rows or rows)
    process = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    trained = TrainingStep(
        few, batch=rows, seq_len=step.seq_len, dtype=dtype, device=device, optimizer=step.optimizer,
        mtp_rows=max(1, round(rows * step.mtp_share)),
    )  # fmt: skip
    ids = trained.tokens()
    _settle(trained, ids, effort.seconds)
    peak = peak_memory_bytes(device)
    kept = _kept_bytes(lambda: trained.loss(ids), trained.model)
    alone: dict[Kind, _Alone] = {}
    for index, block in enumerate(trained.model.layers):
        assert isinstance(block, Block)
        alone["sparse" if few.is_sparse(index) else "dense"] = _Alone(trained, block, step.optimizer)
    work: dict[tuple[str, Kind | None], Callable[[], Any]] = {
        ("pass", None): partial(trained.run_pass, ids), ("update", None): partial(trained.update, _STILL),
    }  # fmt: skip
    for kind, one in alone.items():
        work |= {("pass", kind): one.run_pass, ("update", kind): one.update}
    seconds = _times(work, device, effort)

    def copied(module: nn.Module, optimizer: Optimizer) -> int:
        return 0 if device.type == "cuda" else _copy_bytes(module, optimizer)  # the peak is an accelerator's own

    return Calibration(
        device=str(device),
        dtype=dtype_name(dtype),
        threads=torch.get_num_threads(),
        batch=step.batch,
        micro_batch=step.micro_batch,
        seq_len=step.seq_len,
        rows=rows,
        pass_seconds=seconds["pass", None],
        update_seconds=seconds["update", None],
        block_pass_seconds={kind: seconds["pass", kind] for kind in alone},
        block_update_seconds={kind: seconds["update", kind] for kind in alone},
        process_bytes=process,
        growth_bytes=peak - process,
        kept_bytes=kept // rows,
        block_kept_bytes={kind: _kept_bytes(one.forward, one) // rows for kind, one in alone.items()},
        block_state_bytes={kind: one.weight_bytes() + _copy_bytes(one.block, one.optimizer) for kind, one in alone.items()},
        copy_bytes=copied(trained.model, trained.optimizer),
        block_copy_bytes={kind: copied(one.block, one.optimizer) for kind, one in alone.items()},
    )


def with_limits(measured: Calibration, device: torch.device) -> Calibration:
    """The calibration with the machine's own limits beside it: products by dtype and size, and memory."""
    dtypes = (torch.float32, torch.bfloat16)
    rates = {
        dtype_name(dtype): {str(size): gemm_flops_per_second(dtype, device, size, 3) for size in _GEMM_SIZES}
        for dtype in dtypes
    }
    return dataclasses.replace(measured, gemm_flops_per_second=rates, memory_bytes_per_second=memory_bytes_per_second(device))


def predict_run(run: Run) -> Forecast:
    """Predict a run that is about to train, briefly, and keep it as `prediction.json` beside its recipe.

    Raises `RunError` if the disk is full or the measurement fails.
    """
    device = next(run.model.parameters()).device
    weights = sum(tensor.nbytes for tensor in run.model.parameters())
    import_drawing()  # the run ends with a report
    held = 0 if device.type == "cuda" else psutil.Process().memory_info().rss - weights
    measured = calibrate(run.config, Step.of(run.recipe), dtype=run.dtype, effort=BRIEF)
    predicted = forecast(Shape.from_config(run.config), measured, held)
    # What preparing the data once took stays the process's peak where training takes less.
    peak = max(predicted.peak_memory_bytes, peak_memory_bytes(device))
    predicted = dataclasses.replace(predicted, peak_memory_bytes=peak)
    kept = {**predicted.as_dict(), "calibration": dataclasses.asdict(measured)}
    path = run.path / FILE_NAME
    with writing(path):
        replace_file(path, (json.dumps(kept, indent=1) + "\n").encode())
    return predicted


def read_prediction(run_dir: Path) -> dict[str, Any] | None:
    """What `predict_run` kept, or None where there is nothing to be read."""
    try:
        return json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _settle(trained: TrainingStep, ids: Tensor, seconds: float) -> None:
    """Take steps until memory has become what it stays: blocks of the heap find their places over several, and anew after an
    evaluation, whose blocks are of other sizes."""
    began = time.perf_counter()
    for most in (_SETTLED, _SETTLED // 2):
        for step in range(most):
            trained.run_pass(ids)
            trained.update(_STILL)
            if step >= 1 and time.perf_counter() - began > seconds:
                break
        if most == _SETTLED:
            token_nats(trained.model, ids.flatten().cpu(), first=0, context=trained.seq_len)
            trained.model.train()


class _Alone(nn.Module):
    """One block of a trained model by itself. Embedding and head, which an optimizer asks for, are of one element."""

    def __init__(self, trained: TrainingStep, block: Block, optimizer: OptimizerSection) -> None:
        super().__init__()
        self.block = block
        self.embed_tokens, self.lm_head = nn.Embedding(1, 1), nn.Linear(1, 1, bias=False)
        self.turn = trained.model.rotary(trained.seq_len, trained.device)
        shape = (trained.batch, trained.seq_len, trained.model.config.hidden_size)
        dtype = trained.model.compute_dtype  # of what flows between blocks
        self.x = torch.randn(shape, device=trained.device, dtype=dtype, requires_grad=True)
        self.gradient = torch.full_like(self.x, 1 / self.x.numel())
        narrow = trained.dtype == torch.bfloat16
        self.optimizer = Optimizer(self, optimizer, narrow=narrow)  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        return self.block(self.x, self.turn, None, None)

    def run_pass(self) -> None:
        self.block.zero_grad(set_to_none=True)
        self.x.grad = None
        self.forward().backward(self.gradient)

    def update(self) -> None:
        self.optimizer.clip(CLIP)
        self.optimizer.step(_STILL)

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.block.parameters())


def _copy_bytes(module: nn.Module, optimizer: Optimizer) -> int:
    """Weights and optimizer states."""
    tensors = (*module.parameters(), *optimizer.tensors().values())
    return sum(tensor.nbytes for tensor in tensors)


def _times(
    work: dict[tuple[str, Kind | None], Callable[[], Any]], device: torch.device, effort: Effort
) -> dict[tuple[str, Kind | None], float]:
    """Median seconds of each, taken in turn so that other work on the machine falls on all alike, after one turn apart."""
    seconds: dict[tuple[str, Kind | None], list[float]] = {name: [] for name in work}
    began = time.perf_counter()
    for turn in range(effort.most + 1):
        for name, run in work.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
        if turn >= effort.repeats and time.perf_counter() - began > effort.seconds:
            break
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters apart; memory that tensors share counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = forward()
    del held
    return sum(kept.values())


def _rows(config: ModelConfig, step: Step, dtype: torch.dtype, device: torch.device, effort: Effort) -> int:
    """Sequences of a micro-batch to measure: all of them unless a pass would take longer than `effort.pass_seconds`. Raises
    `UsageError` where one sequence takes too long even at the rate of a large product."""
    rate = gemm_flops_per_second(dtype, device, None if device.type == "cuda" else 512, 3)
    flops = count(config, context=step.seq_len).training_flops_per_token * step.seq_len
    least = (_LEAST_PASSES + effort.repeats + 1) * flops / rate
    if least > effort.deadline:
        raise UsageError(
            f"one block of each kind with embedding and head has {count(config).total_parameters:,} parameters: measuring them "
            f"on one sequence of {step.seq_len:,} tokens takes {least:,.0f} s here or more: plan without --here, or with a "
            "shorter --context"
        )
    return max(1, min(step.micro_batch, int(effort.pass_seconds * rate * _LEAST_SHARE / flops)))


def _rows_in_memory(few: ModelConfig, step: Step, device: torch.device) -> int:
    """Sequences of a micro-batch that a measurement has memory for. Raises `UsageError` where that is none."""
    room = _MEMORY_USED * free_bytes(device)
    if (need := measuring_bytes(few, step, device, 1)) > room:
        raise UsageError(
            f"one block of each kind with embedding and head has {count(few).total_parameters:,} parameters: training them on "
            f"one sequence of {step.seq_len:,} tokens to measure takes {need / 2**30:,.1f} GiB, but of the memory that is free "
            f"it may take {room / 2**30:,.1f} GiB: plan without --here"
        )
    each = measuring_bytes(few, step, device, 2) - need
    return max(1, min(step.micro_batch, 1 + int((room - need) / each)))


def measuring_bytes(few: ModelConfig, step: Step, device: torch.device, rows: int) -> float:
    """What a measurement on `rows` sequences takes at its peak: the process; weights, gradients and optimizer states of `few`,
    and once more the states of the blocks that are trained alone; what `rows` sequences keep from forward to backward, with a
    block's gradients of it; logits. (Checkpoints' copies are predicted, not made.)"""
    shape, name = Shape.from_config(few), step.optimizer.name
    whole, tokens = Stage(shape, shape.blocks, first=True, last=True), rows * step.seq_len
    alone = sum(shape.every_token(block) + (shape.routed if block.sparse else 0) for block in shape.blocks)
    states = state_bytes(shape, name) + alone * optimizer_bytes(name, "fp32")
    # Float32 whatever the products' factors are: on a CPU what flows between them stays so.
    kept = (whole.activations("fp32", "none") + largest_block([whole], "fp32") + 2 * 4 * shape.hidden_size) * tokens
    logits = loss_bytes(shape, tokens, "fp32", card=device.type == "cuda")
    if device.type == "cpu":
        return _PROCESS_BYTES + states + HEAP_GAPS * kept + logits
    return states + kept + logits + update_bytes(name, whole.matrices, whole.alike, False, whole.expert, shape.routed)


def _main() -> None:
    """What `calibrate` asks on standard input, answered on standard output."""
    import cadre.train.trainer  # noqa: F401  (its memory counts as training's)

    asked = json.loads(sys.stdin.read())
    keep_freed_memory()
    device = default_device()
    step = Step(**{**asked["step"], "optimizer": OptimizerSection(**asked["step"]["optimizer"])})
    few, dtype = ModelConfig(**asked["config"]), getattr(torch, asked["dtype"])
    try:
        measured = measure(few, step, dtype, device, Effort(**asked["effort"]), asked["most_rows"])
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(UsageError.status)
    if asked["limits"]:
        measured = with_limits(measured, device)
    print(json.dumps(dataclasses.asdict(measured)))


if __name__ == "__main__":
    _main()
