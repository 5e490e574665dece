"""What a run is refused for, or warned of, before it begins."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from cadre.data.shards import TokenData
from cadre.errors import UsageError
from cadre.kernels.card import multiplies_fp8
from cadre.kernels.limits import gemm_flops_per_second
from cadre.kernels.memory import total_bytes
from cadre.kernels.native.library import own_products_faster
from cadre.model.config import ModelConfig
from cadre.model.scoring import document_start
from cadre.plan.count import count
from cadre.plan.memory import state_bytes
from cadre.plan.shape import Shape
from cadre.train.recipe import Recipe


def check_memory(
    config: ModelConfig, device: torch.device, optimizer: str = "adamw", processes: int = 1, replicas: int = 1,
    beside: ModelConfig | None = None,
) -> None:  # fmt: skip
    """Refuse a model whose float32 masters, gradients and optimizer states alone, `replicas` times, exceed the memory of the
    machines, or of the accelerators, that `processes` share. `beside`: a model that is trained at the same time."""
    parameters = count(config).total_parameters
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    held = total_bytes(device) * (processes // sharing)
    need = state_bytes(Shape.from_config(config), optimizer) * replicas
    of = "" if replicas == 1 else f" of {replicas} replicas"
    if beside is not None:
        need += state_bytes(Shape.from_config(beside), optimizer)
        of = f", and of the model of {count(beside).total_parameters:,} parameters beside it"
    if need > held:
        raise UsageError(
            f"the model has {parameters:,} parameters: training takes {need / 2**30:,.0f} GiB for weights, "
            f"gradients and moments{of}, but there are {held / 2**30:,.0f} GiB; choose a smaller model"
        )


def check_fp8(config: ModelConfig, device: torch.device, what: str = "train.fp8_experts") -> None:
    """Refuse experts in FP8 for a model without experts, and on a card without FP8."""
    if not config.has_experts:
        raise UsageError(f"{what}: the model has no experts")
    if device.type == "cuda" and not multiplies_fp8(device):
        raise UsageError(
            f"{what}: needs Triton and a card that multiplies FP8 (compute capability 8.9 or higher): leave it out"
        )


def check_samples(recipe: Recipe, config: ModelConfig, data: TokenData) -> None:
    """Refuse now what would fail when the model is scored and sampled."""
    if recipe.checkpoint.best and not data.manifest["held_out"]["tokens"]:
        raise UsageError(
            "checkpoint.best: keeps the model of the lowest evaluation, but no text is held out to evaluate it on: set "
            "data.held_out above 0 (of a folder made by cadre data, make it anew), or checkpoint.best=false"
        )
    document_start(config, data.tokenizer)
    for prompt in recipe.eval.prompts or ():
        length = len(data.tokenizer.encode(prompt).ids)
        if length >= config.max_position_embeddings:
            raise UsageError(
                f"eval.prompts: {prompt[:20]!r}... has {length} tokens; the model's context (max_position_embeddings) "
                f"is {config.max_position_embeddings}"
            )


def advise(recipe: Recipe, config: ModelConfig, note: Callable[[str], None]) -> None:
    """Say what is allowed and hardly meant."""
    schedule, balance = recipe.schedule, recipe.balance
    if recipe.train.steps is not None and schedule.warmup_steps >= recipe.train.steps:
        note(f"the rate warms up over {schedule.warmup_steps} steps, all of this run: schedule.warmup_steps sets fewer")
    losses = (balance.sequence_weight, balance.batch_weight, balance.global_weight)
    biased = config.scoring_func == "sigmoid" and balance.use_bias and balance.bias_update != "none" and balance.bias_speed > 0
    if config.has_experts and not biased and not any(losses):
        why = f" (routers of {config.model_type} own no bias)" if config.scoring_func == "softmax" else ""
        note(f"nothing keeps the experts evenly used{why}: balance.sequence_weight=0.001 would")


# Models that take more than some seconds to build.
_DEEP, _LARGE = 1000, 10**9
# How many times as slow as float32 bfloat16 may be without a word.
_SLOW = 2


def say_slow(config: ModelConfig, dtype: torch.dtype, device: torch.device, note: Callable[[str], None]) -> None:
    """What would else be a long silence: products in a dtype that the CPU only emulates, a model being built, and its first
    step."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not own_products_faster(narrow=True):
        slower = gemm_flops_per_second(torch.float32, device, 256) / gemm_flops_per_second(dtype, device, 256)
        if slower > _SLOW:
            note(f"this CPU multiplies bfloat16 {slower:,.0f} times as slowly as float32: train.dtype=float32 is faster here")
    blocks, parameters = config.num_hidden_layers, count(config).total_parameters
    if blocks >= _DEEP or parameters >= _LARGE:
        note(f"building the model: {blocks:,} blocks, {parameters / 1e6:,.0f}M parameters; its first steps take long, too")
