"""Where a step's time goes: seconds by part of the model, and how near each part comes to what the machine can do.

One clock runs through the whole step and is always charged to exactly one part, so the parts add up to the step. Forward,
hooks on modules say whose time it is. Backward, every autograd node is charged to the part whose forward pass made it.
Nothing of this is in place outside of `watched`. Watched, shared experts are computed apart from the routed ones, which a
step that nobody watches does not do where a kernel can have both.

Letters in names: T tokens of a step, D hidden, R routed rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cadre.kernels.limits import default_device, gemm_flops_per_second, memory_bytes_per_second, synchronize, training_dtype
from cadre.model.attention import GroupedQueryAttention, LatentAttention
from cadre.model.config import ModelConfig
from cadre.model.experts import Experts, MixtureOfExperts, Router
from cadre.model.layers import SwiGLU
from cadre.model.transformer import Block, MultiTokenPredictor, Transformer
from cadre.train import objective
from cadre.train.bench.step import WARM_UP, TrainingStep, circumstances, speed

ATTENTION, ROUTER, DISPATCH, EXPERTS = "attention", "router", "dispatch and combine", "experts"
DENSE, NORMS, HEAD = "shared and dense feed-forward", "norms and residual", "embedding, head and loss"
OPTIMIZER, OTHER = "optimizer", "other"
PARTS = (ATTENTION, ROUTER, DISPATCH, EXPERTS, DENSE, NORMS, HEAD, OPTIMIZER, OTHER)

# A module of these is a part by itself; what it calls belongs to it, unless that is another of these.
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((LatentAttention, GroupedQueryAttention), ATTENTION),
    ((Router,), ROUTER),
    ((MixtureOfExperts,), DISPATCH),
    ((Experts,), EXPERTS),
    ((SwiGLU,), DENSE),
    ((Block, MultiTokenPredictor), NORMS),
)

# How far the parts may be from an unwatched step in sum: more, and watching (or other work) has distorted it.
TOLERANCE = 0.05


class Ledger:
    """Seconds by part. On an accelerator the clock is events on its stream, so nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._outer: list[str] = []
        self._claimed: set[Any] = set()
        self.switch(OTHER)

    def switch(self, part: str) -> None:
        """From now on time is `part`'s."""
        self._part = part
        self._marks.append((part, self._now()))

    def enter(self, part: str) -> None:
        self._outer.append(self._part)
        self.switch(part)

    def leave(self) -> None:
        """Back to the part before `enter`."""
        self.switch(self._outer.pop())

    def claim(self, value: Any) -> None:
        """Charge to the part now running the gradients of all that `value`'s tensors were computed by, as far as nobody has
        claimed them yet."""
        pending = [tensor.grad_fn for tensor in _tensors(value)]
        while pending:
            node = pending.pop()
            # Gradients are added up right after the node that made them, as part of it.
            if node is None or node in self._claimed or node.name() == "torch::autograd::AccumulateGrad":
                continue
            self._claimed.add(node)
            node.register_prehook(_switching(self, self._part))
            pending.extend(before for before, _ in node.next_functions)

    def close(self) -> dict[str, float]:
        """Stop the clock: seconds of every part, in order."""
        self.switch(OTHER)
        self._claimed.clear()
        synchronize(self._device)
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, stop) in itertools.pairwise(self._marks):
            seconds[part] += start.elapsed_time(stop) / 1000 if self._device.type == "cuda" else stop - start
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _switching(ledger: Ledger, part: str) -> Callable[[Any], None]:
    return lambda gradients: ledger.switch(part)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


@contextmanager
def watched(model: Transformer, ledger: Ledger) -> Iterator[None]:
    """Within it, the model's forward passes and their gradients are charged to their parts."""
    with ExitStack() as undo:
        for module in model.modules():
            part = _part_of(module)
            if part is not None:
                _watch_module(module, part, ledger, undo)
        _watch_module(model.norm, NORMS, ledger, undo)
        for predictor in _predictors(model):
            _watch_module(predictor.eh_proj, DENSE, ledger, undo)
        _watch_function(model, "embed", HEAD, ledger, undo)
        _watch_function(objective, "linear_cross_entropy", HEAD, ledger, undo)
        yield


def _part_of(module: nn.Module) -> str | None:
    return next((part for kinds, part in _MODULES if isinstance(module, kinds)), None)


def _predictors(model: Transformer) -> list[MultiTokenPredictor]:
    return [module for module in model.modules() if isinstance(module, MultiTokenPredictor)]


def _watch_module(module: nn.Module, part: str, ledger: Ledger, undo: ExitStack) -> None:
    def before(_: nn.Module, arguments: Any) -> None:
        ledger.claim(arguments)
        ledger.enter(part)

    def after(_: nn.Module, arguments: Any, output: Any) -> None:
        ledger.claim(output)
        ledger.leave()

    undo.callback(module.register_forward_pre_hook(before).remove)
    undo.callback(module.register_forward_hook(after).remove)


def _watch_function(owner: Any, name: str, part: str, ledger: Ledger, undo: ExitStack) -> None:
    """As a module, for a function that is looked up in `owner` when it is called."""
    function, own = getattr(owner, name), name in vars(owner)

    def run(*arguments: Any, **named: Any) -> Any:
        ledger.claim(arguments)
        ledger.enter(part)
        output = function(*arguments, **named)
        ledger.claim(output)
        ledger.leave()
        return output

    setattr(owner, name, run)
    undo.callback(setattr, owner, name, function) if own else undo.callback(delattr, owner, name)


def profiled_step(step: TrainingStep) -> dict[str, float]:
    """Make one step; seconds of every part."""
    ids = step.tokens()
    synchronize(step.device)
    ledger = Ledger(step.device)
    with watched(step.model, ledger):
        loss = step.loss(ids)
        ledger.claim(loss)
        loss.backward()
        ledger.switch(OPTIMIZER)
        step.update()
    return ledger.close()


def counted(model: Transformer, batch: int, seq_len: int) -> dict[str, tuple[str, float]]:
    """What a step must do at least, by part: ("flops", FLOPs) where products decide, ("bytes", bytes moved) where memory
    does. FLOPs are those of `cadre.count`: 6 a weight and token, 2 forward and 4 backward, and causal attention's own.

    Bytes, of one pass over each operand: a norm reads and writes its input and again, with the gradient, backward (5 T D); a
    residual adds two and writes one, both ways (6 T D). Dispatch reads T D and writes R D, combine the reverse; backward also
    reads the experts' output for the gradient of the router's weights (4 T D + 5 R D); where the experts' kernel moves rows
    itself, that is part of its time and not counted apart. AdamW reads weight, gradient and moments and writes all but the
    gradient, clipping reads the gradient twice and writes it (10 float32 a parameter).
    """
    config, tokens = model.config, batch * seq_len
    flops = dict.fromkeys((ATTENTION, ROUTER, EXPERTS, DENSE, HEAD), 0.0)
    for module in model.modules():
        part = _part_of(module)
        if part not in flops:
            continue
        share = (config.num_experts_per_tok or 0) / (config.n_routed_experts or 1) if part == EXPERTS else 1
        flops[part] += 6 * tokens * share * sum(p.numel() for p in module.parameters() if p.ndim > 1)
    pair_width = config.num_attention_heads * (config.qk_head_dim + config.value_head_dim)
    flops[ATTENTION] += 3 * tokens * seq_len * config.total_layers * pair_width
    flops[DENSE] += sum(6 * tokens * predictor.eh_proj.weight.numel() for predictor in _predictors(model))
    flops[HEAD] += 6 * tokens * (1 + len(model.mtp)) * config.vocab_size * config.hidden_size
    dtype = model.compute_dtype or torch.float32  # of what flows between products
    row = config.hidden_size * dtype.itemsize
    sparse = len(model.sparse_layers())
    moved = {
        DISPATCH: tokens * row * sparse * (4 + 5 * (config.num_experts_per_tok or 0)),
        # Two norms and two residuals a block; the last norm; three more norms in a predictor.
        NORMS: tokens * row * (config.total_layers * 22 + 5 + 15 * len(model.mtp)),
        OPTIMIZER: 40 * sum(parameter.numel() for parameter in model.parameters()),
    }
    counts = {part: ("flops", amount) for part, amount in flops.items()}
    if any(mixture.experts.moves_rows(torch.empty(0, config.hidden_size, dtype=dtype)) for _, mixture in model.sparse_layers()):
        del moved[DISPATCH]
    counts |= {part: ("bytes", float(amount)) for part, amount in moved.items()}
    return {part: count for part, count in counts.items() if count[1]}


def bench_profile(
    config: ModelConfig, *, batch: int, seq_len: int, steps: int, dtype: torch.dtype | None, note: Callable[[str], None]
) -> dict[str, Any]:
    """Watch `steps` steps, in turn with as many that nobody watches, after two that warm up.

    Returns `parts` of the watched step with the median time: `part`, `seconds`, `share` and, where they are counted, the
    `unit` ("flops" or "bytes"), `achieved_per_second`, `limit_per_second` (of a large GEMM, of a pass over a large block)
    and `of_limit`, their ratio. `watched_seconds` is their sum, `difference` how far it is from `step_seconds_median`, the
    unwatched step's, as a share of it, `distorted` whether that is more than 5%.
    """
    device = default_device()
    dtype = dtype or training_dtype(device)
    step = TrainingStep(config, batch=batch, seq_len=seq_len, dtype=dtype, device=device)
    limits = {"flops": gemm_flops_per_second(dtype, device), "bytes": memory_bytes_per_second(device)}
    for _ in range(WARM_UP):
        step()
    free, seen = [], []
    for done in range(steps):
        note(f"{done} of {steps} steps")
        free.append(step())
        seen.append(profiled_step(step))
    limits["flops"] = max(limits["flops"], gemm_flops_per_second(dtype, device))
    limits["bytes"] = max(limits["bytes"], memory_bytes_per_second(device))
    seconds = sorted(seen, key=lambda parts: sum(parts.values()))[(steps - 1) // 2]
    result = speed(config, batch=batch, seq_len=seq_len, seconds=free)
    total = sum(seconds.values())
    difference = total / result["step_seconds_median"] - 1
    counts = counted(step.model, batch, seq_len)
    return {
        **result,
        "parts": [_part(name, taken, total, counts.get(name), limits) for name, taken in seconds.items()],
        "watched_seconds": total,
        "difference": difference,
        "distorted": abs(difference) > TOLERANCE,
        "mfu": result["model_flops_per_second"] / limits["flops"],
        "gemm_flops_per_second": limits["flops"],
        "memory_bytes_per_second": limits["bytes"],
        **circumstances(batch, seq_len, dtype, device),
    }


def _part(name: str, seconds: float, total: float, count: tuple[str, float] | None, limits: dict[str, float]) -> dict[str, Any]:
    part: dict[str, Any] = {"part": name, "seconds": seconds, "share": seconds / total}
    if count is None or not seconds:
        return part
    unit, amount = count
    rate, limit = amount / seconds, limits[unit]
    return {**part, "unit": unit, "achieved_per_second": rate, "limit_per_second": limit, "of_limit": rate / limit}
