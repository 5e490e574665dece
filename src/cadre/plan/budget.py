"""Choosing a model for a budget: width, depth, experts, top-k, tokens, batch and rates, by a scaling rule.

The rule. M is a model's training FLOPs a token without embedding and head, D the tokens of a run.

    bits per byte = E + A / (M S^s)^alpha + B / D'^beta

alpha, beta: their ratio is that of DeepSeek LLM's optimal allocation, M = 0.1715 C^0.5243 and D = 5.8316 C^0.4757 for
C = M D FLOPs (arXiv 2401.02954, equation 4); their sum that of Chinchilla's fit, 0.34 + 0.28 (arXiv 2203.15556, appendix D.2,
equation 10; a fit to the same data with its errors mended has 0.348 + 0.366, arXiv 2404.10102).
A follows from B by the same allocation. E and B are ours: fitted to two runs (docs/log.md) on the default corpus of a shape of
this family, the anchor: width 128, 16 experts, top 2. The recipe `pocket` was that shape then.
S: parameters over active parameters, both without embeddings. s is ours: 0.44, which gives 64 experts, top 6, the 2.5 times
fewer FLOPs to a loss that were seen at 1e16.
D': tokens, of which repeated ones count less and less (arXiv 2305.16264, equation 5, with R* = 15.387756 of its appendix A).

Batch and rates follow DeepSeek LLM's B = 0.2920 C^0.3271 tokens and 0.3118 C^-0.1250 (arXiv 2401.02954, equation 1), both
scaled (ours) so that the anchor comes out at its own 4,096 tokens and rates. Its laws were fitted from 1e17 FLOPs up, with
attention counted whole in M (its equation 2); below that, and with the causal half that is counted here, they are extrapolated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cadre.errors import UsageError
from cadre.model.config import ModelConfig
from cadre.plan.count import Count, count
from cadre.plan.hardware import Device
from cadre.plan.memory import state_bytes
from cadre.plan.shape import Shape

ALPHA, BETA = 0.62 * 0.4757, 0.62 * 0.5243
B_DATA = 61.5
A_MODEL = B_DATA * BETA / ALPHA * 0.1715 ** (ALPHA + BETA)
FLOOR = 0.635
SPARSITY_GAIN = 0.44
REPEATS_WORTH = 15.387756

# The anchor, by which the published rules for AdamW at larger scale are scaled: its FLOPs, tokens a step, rates.
_ANCHOR_FLOPS, _ANCHOR_BATCH, _ANCHOR_MUON, _ANCHOR_ADAMW = 4.5e13, 4096, 0.01, 0.005

# A command that chooses a shape measures this machine first, which takes up to this long.
CALIBRATION_SECONDS = 30.0
# Fewer steps than this train nothing, and cannot end within 5% of a budget.
FEWEST_STEPS = 50
# Of a time, what evaluations, checkpoints and a slower minute take.
TIME_USED = 0.9

# Tokens of a micro-batch: enough for large products, few enough for the memory of what the backward pass needs.
_MICRO_TOKENS = 8192

_WIDTHS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)
# Routed experts, of which a token takes top-k; as many active expert parameters with each.
_EXPERTS = ((8, 2), (16, 2), (32, 4), (64, 6))


@dataclass(frozen=True)
class Budget:
    """What may be spent: seconds of wall clock, FLOPs of training (6 a weight and token, attention's own), or US dollars.
    Exactly one is given."""

    text: str
    seconds: float | None = None
    flops: float | None = None
    usd: float | None = None


def read_budget(text: str) -> Budget:
    """A budget as the command line has it: 90s, 10m, 2h, 2e15flops, 5usd. Raises `UsageError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(s|m|h|flops|usd)", text.strip().lower())
    if not match or not 0 < float(match[1]) < 1e30:
        raise UsageError(
            f"--budget {text}: must be a time such as 90s, 10m or 2h, FLOPs such as 2e15flops, or money such as 5usd"
        )
    value, unit = float(match[1]), match[2]
    if unit == "flops":
        return Budget(text, flops=value)
    if unit == "usd":
        return Budget(text, usd=value)
    return Budget(text, seconds=value * {"s": 1, "m": 60, "h": 3600}[unit])


@dataclass(frozen=True)
class Rung:
    """What a model of some width reached here: FLOP/s in passes, and seconds an update takes per parameter."""

    width: int
    flops_per_second: float
    update_seconds_per_parameter: float


@dataclass(frozen=True)
class Machine:
    """This machine, measured at some widths: between them speeds are interpolated, beyond them they stay."""

    rungs: tuple[Rung, ...]
    memory_bytes: float
    half_rate_width: float = 24.0

    def step_seconds(self, candidate: Candidate, tokens: int) -> float:
        rate, update = self._at(candidate.config.hidden_size)
        flops = candidate.counted.training_flops_per_token * tokens
        return flops * candidate.narrowness(self.half_rate_width) / rate + update * candidate.counted.total_parameters

    def _at(self, width: int) -> tuple[float, float]:
        rungs = sorted(self.rungs, key=lambda rung: rung.width)
        below = [rung for rung in rungs if rung.width <= width] or rungs[:1]
        above = [rung for rung in rungs if rung.width >= width] or rungs[-1:]
        low, high = below[-1], above[0]
        share = 0.0 if low.width == high.width else math.log(width / low.width) / math.log(high.width / low.width)

        def between(a: float, b: float) -> float:
            return a ** (1 - share) * b**share

        return (
            between(low.flops_per_second, high.flops_per_second),
            between(low.update_seconds_per_parameter, high.update_seconds_per_parameter),
        )


@dataclass(frozen=True)
class Candidate:
    """A shape that might be chosen, counted at the length of its sequences."""

    config: ModelConfig
    counted: Count

    @property
    def size(self) -> float:
        """M: training FLOPs a token without the head."""
        return self.counted.training_flops_per_token - 6 * self.config.vocab_size * self.config.hidden_size

    @property
    def sparsity(self) -> float:
        ends = sum(self.counted.parts[name] for name in ("embedding", "head"))
        return (self.counted.total_parameters - ends) / self.counted.active_parameters_without_embeddings

    @property
    def routed_share(self) -> float:
        """What share of the training FLOPs is the routed experts'."""
        config = self.config
        sparse = config.num_hidden_layers - config.first_k_dense_replace
        active = (config.num_experts_per_tok or 0) * 3 * config.hidden_size * (config.moe_intermediate_size or 1) * sparse
        return 6 * active / self.counted.training_flops_per_token

    def narrowness(self, half_rate_width: float) -> float:
        """How much longer passes take than those of the measured shape (top 2), whose experts are wider."""
        width, usual = self.config.moe_intermediate_size or 1, expert_width(self.config.hidden_size, 2)
        slower = (1 + half_rate_width / width) / (1 + half_rate_width / usual)
        return 1 + self.routed_share * (slower - 1)


@dataclass(frozen=True)
class Choice:
    """What to train. seconds: expected here for the steps alone. score: bits per byte expected of text like the default
    corpus."""

    config: ModelConfig
    seq_len: int
    batch: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    score: float
    rate: float
    adamw_rate: float

    def recipe(self) -> dict[str, Any]:
        """The recipe's sections but `data`; the vocabulary is the tokenizer's. Its steps are those expected."""
        fields = self.config.model_dump(exclude_none=True, exclude_defaults=True)
        fields.pop("vocab_size")
        micro = max(n for n in range(1, self.batch + 1) if not self.batch % n and (n == 1 or n * self.seq_len <= _MICRO_TOKENS))
        warm_up = max(5, min(2000, round(0.035 * self.steps)))
        return {
            "model": {"model_type": self.config.model_type, **fields},
            "train": {"steps": self.steps, "batch": self.batch, "micro_batch": micro},
            "optimizer": {"name": "muon", "lr": self.rate, "adamw_lr": self.adamw_rate},
            "schedule": {"kind": "decay", "warmup_steps": warm_up, "decay_share": 0.5, "final": 0.05},
            "balance": {"bias_speed": 0.003},
            "eval": {"every": max(25, self.steps // 5)},
            "checkpoint": {"every": max(100, self.steps // 5)},
        }


def expert_width(hidden: int, top_k: int) -> int:
    """Three quarters of the hidden size for two experts a token, and so many times less for more of them."""
    return max(16, round(1.5 * hidden / top_k / 16) * 16)


def shape(hidden: int, experts: int, top_k: int, vocab_size: int, seq_len: int) -> ModelConfig:
    """The family of shapes, in the anchor's proportions: a block for every 32 of width, heads of 64, one latent of 3/8, one
    dense block, and half as many shared experts as routed ones a token."""
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=max(3, round(hidden / 32)),
        num_attention_heads=max(1, hidden // 64), kv_lora_rank=3 * hidden // 8, qk_nope_head_dim=48, qk_rope_head_dim=16,
        v_head_dim=64, intermediate_size=3 * hidden, first_k_dense_replace=1, n_routed_experts=experts,
        n_shared_experts=top_k // 2, num_experts_per_tok=top_k, moe_intermediate_size=expert_width(hidden, top_k),
        max_position_embeddings=seq_len,
    )  # fmt: skip


def candidates(vocab_size: int, seq_len: int) -> Iterator[Candidate]:
    """Every shape there is to choose from."""
    for hidden in _WIDTHS:
        for experts, top_k in _EXPERTS:
            config = shape(hidden, experts, top_k, vocab_size, seq_len)
            yield Candidate(config, count(Shape.from_config(config), context=seq_len))


def expected_score(candidate: Candidate, tokens: float, unique_tokens: float) -> float:
    """Bits per byte by the rule above."""
    if tokens <= unique_tokens:
        worth = tokens
    else:
        repeats = tokens / unique_tokens - 1
        worth = unique_tokens * (1 + REPEATS_WORTH * (1 - math.exp(-repeats / REPEATS_WORTH)))
    size = candidate.size * candidate.sparsity**SPARSITY_GAIN
    return FLOOR + A_MODEL / size**ALPHA + B_DATA / worth**BETA


def batch_tokens(flops: float) -> float:
    """Tokens a step."""
    return _ANCHOR_BATCH * (flops / _ANCHOR_FLOPS) ** 0.3271


def rates(flops: float) -> tuple[float, float]:
    """Peak rates of Muon and of AdamW beside it."""
    factor = (flops / _ANCHOR_FLOPS) ** -0.125
    return float(f"{_ANCHOR_MUON * factor:.3g}"), float(f"{_ANCHOR_ADAMW * factor:.3g}")


def sequence_length(flops: float) -> int:
    """Ours: longer ones where the budget gives a model time to make use of them."""
    return 256 if flops < 1e15 else 512 if flops < 1e17 else 1024


def width_for(flops: float) -> int:
    """About the width that `choose` will come to: where to measure."""
    wanted = 0.1715 * flops**0.5243
    return min(_WIDTHS, key=lambda width: abs(math.log(wanted / (6 * 20 * width**3 / 32))))


def precision_on(device: Device) -> str:
    """What money is taken to train in on a device."""
    return "bf16" if "bf16" in device.flops else "fp32"


def flops_for(money: float, device: Device, candidate: Candidate) -> float:
    """FLOPs that a rent buys, at what `cadre plan` assumes a device to reach while computing."""
    precision = precision_on(device)
    width = candidate.config.moe_intermediate_size or 1
    reached = device.efficiency[precision] / (1 + candidate.routed_share * device.half_rate_width / width)
    return money / device.rent * 3600 * device.flops[precision] * reached


def choose(
    budget: Budget, machine: Machine, *, vocab_size: int, unique_tokens: int, seq_len: int, device: Device | None = None
) -> Choice:
    """The shape and run of the best expected score within the budget. `device`: what money is spent on.

    Raises `UsageError` if the budget has room for no run at all.
    """
    best: Choice | None = None
    for candidate in candidates(vocab_size, seq_len):
        if state_bytes(Shape.from_config(candidate.config), "muon") > machine.memory_bytes / 2:
            continue
        made = _run(budget, candidate, machine, unique_tokens, seq_len, device)
        if made is not None and (best is None or made.score < best.score):
            best = made
    if best is None:
        raise UsageError(
            f"--budget {budget.text}: not enough for {FEWEST_STEPS} steps of the smallest model; give more, or name a recipe"
        )
    return best


def _run(
    budget: Budget, candidate: Candidate, machine: Machine, unique_tokens: int, seq_len: int, device: Device | None
) -> Choice | None:
    per_token = candidate.counted.training_flops_per_token
    if budget.seconds is None:
        flops = budget.flops if budget.usd is None or device is None else flops_for(budget.usd, device, candidate)
        assert flops is not None
    else:
        # Batch follows FLOPs, which follow the step's time, which follows the batch: one round settles it.
        usual = 16 * seq_len
        flops = budget.seconds * TIME_USED / machine.step_seconds(candidate, usual) * usual * per_token
    batch = max(4, 4 * round(batch_tokens(flops) / seq_len / 4))
    step = machine.step_seconds(candidate, batch * seq_len)
    if budget.seconds is None:
        steps = int(flops / (per_token * batch * seq_len))
    else:
        steps = int(budget.seconds * TIME_USED / step)
    if steps < FEWEST_STEPS:
        return None
    tokens = steps * batch * seq_len
    muon, adamw = rates(flops)
    score = expected_score(candidate, tokens, unique_tokens)
    return Choice(
        candidate.config, seq_len, batch, steps, tokens, tokens * per_token, steps * step, score, muon, adamw
    )  # fmt: skip
