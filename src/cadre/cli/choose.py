"""`cadre train --budget` without a recipe: measure this machine, choose a shape, and say what was chosen and why."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cadre.errors import UsageError

if TYPE_CHECKING:
    from cadre.model.config import ModelConfig
    from cadre.plan.budget import Budget, Choice, Machine
    from cadre.plan.hardware import Device
    from cadre.train.recipe import DataSection, Recipe

# A run on other hardware's budget, or of so many FLOPs, that would take longer here than this is refused: it is meant for that
# hardware. A time is what whoever gave it wants to spend.
_LONGEST_DAYS = 7
# Below this share of a time budget, preparing and measuring has left enough to train in.
_LEAST_SHARE_LEFT = 0.3


def check_hardware(budget: Budget, hardware: str | None) -> Device | None:
    """The device that money is spent on. Raises `UsageError` for money without one, and for one without money."""
    from cadre.plan.hardware import hardware as device

    if budget.usd is None:
        if hardware is not None:
            raise UsageError("--hardware says what money is spent on: give it with a --budget such as 5usd")
        return None
    if hardware is None:
        raise UsageError(f"--budget {budget.text}: money needs --hardware, such as --hardware h100")
    return device(hardware)


def as_time_here(budget: Budget, device: Device | None) -> Budget:
    """Money as the time that it rents, where this machine is of the rented kind: then its own speed counts, no assumption."""
    if budget.usd is None or device is None or not _is_here(device):
        return budget
    return dataclasses.replace(budget, usd=None, seconds=budget.usd / device.rent * 3600)


def _is_here(device: Device) -> bool:
    import torch

    if device.name.startswith("cpu"):
        return not torch.cuda.is_available()
    return torch.cuda.is_available() and device.name in torch.cuda.get_device_name().lower().replace(" ", "")


def choose_recipe(
    budget: Budget, device: Device | None, overrides: list[str] | None, began: float, note: Callable[[str], None],
    processes: int = 1,
) -> Recipe:  # fmt: skip
    """The recipe of the best expected score within `budget`, with `overrides` over it. `began`: of time, what has gone of the
    budget. `processes`: how many will train it, each on an accelerator of its own if there are some. Raises `UsageError` if
    the budget is below one calibration."""
    from cadre.data.prepare import prepare
    from cadre.plan.budget import CALIBRATION_SECONDS, choose, sequence_length
    from cadre.train.recipe import dump_toml, parse_recipe

    if budget.seconds is not None and budget.seconds < 2 * CALIBRATION_SECONDS:
        raise UsageError(
            f"--budget {budget.text}: choosing a shape takes a calibration of up to {CALIBRATION_SECONDS:.0f} s; give at least "
            f"{2 * CALIBRATION_SECONDS:.0f} s, or name a recipe"
        )
    data = _asked(overrides)
    text = prepare(data.source, tokenizer=data.tokenizer, vocab_size=data.vocab_size, held_out=data.held_out, progress=note)
    note("measuring this machine")
    machine, rate = _together(*measure_machine(_guess_flops(budget, device), text.vocab_size), processes)
    left = budget
    if budget.seconds is not None:
        seconds = budget.seconds - (time.monotonic() - began)
        if seconds < _LEAST_SHARE_LEFT * budget.seconds:
            raise UsageError(
                f"--budget {budget.text}: preparing and measuring took {time.monotonic() - began:.0f} s of it; give more, or "
                "name a recipe"
            )
        left = dataclasses.replace(budget, seconds=seconds)
    flops = _flops(left, device, rate)
    chosen = choose(
        left, machine, vocab_size=text.vocab_size, unique_tokens=len(text.train), seq_len=sequence_length(flops), device=device
    )
    for line in describe(chosen, budget, device):
        note(line)
    days = chosen.seconds / 86400
    if budget.seconds is None and days > _LONGEST_DAYS:
        raise UsageError(
            f"--budget {budget.text}: the run chosen would take {days:,.0f} days on this machine; train it on faster hardware, "
            "or give a time such as --budget 10m"
        )
    sections = {**chosen.recipe(), "data": {"seq_len": chosen.seq_len}}
    sections["train"] |= _shared_out(sections["train"], processes)
    recipe = parse_recipe(dump_toml(sections), f"--budget {budget.text}", overrides, name="budget")
    if budget.seconds is not None:
        length: dict[str, float | None] = {"steps": None, "minutes": budget.seconds / 60}
    else:
        cap = chosen.flops if budget.flops is None else budget.flops
        length = {"steps": steps_within(recipe, cap, text.vocab_size, budget.text), "minutes": None}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=length)})


# What is chosen, or depends on it.
_CHOSEN = ("model.", "data.seq_len", "train.steps", "train.minutes", "train.batch", "train.micro_batch")


def _asked(overrides: list[str] | None) -> DataSection:
    """The data that the overrides ask for. Raises `UsageError` for those of them that are wrong whatever is chosen, before time
    goes into choosing."""
    from cadre.plan.budget import shape
    from cadre.train.boards import check_wandb
    from cadre.train.recipe import dump_toml, parse_recipe

    model = shape(64, 8, 2, 4096, 16).model_dump(exclude_none=True, exclude_defaults=True)
    any_recipe = {"model": model, "data": {"seq_len": 16}, "train": {"steps": 1, "batch": 1}, "optimizer": {"lr": 1.0}}
    ours = [one for one in overrides or [] if not one.strip().startswith(_CHOSEN)]
    recipe = parse_recipe(dump_toml(any_recipe), "--set", ours)
    check_wandb(recipe.train.wandb)
    return recipe.data


def _together(machine: Machine, rate: float, processes: int) -> tuple[Machine, float]:
    """The machine that one process has measured, and its rate, for several: on a processor they share its cores, but each has
    an accelerator of its own. What they send one another is not counted."""
    import torch

    cards = min(processes, torch.cuda.device_count()) if torch.cuda.is_available() else 1
    rungs = tuple(
        dataclasses.replace(
            rung,
            flops_per_second=rung.flops_per_second * cards,
            update_seconds_per_parameter=rung.update_seconds_per_parameter / cards,
        )
        for rung in machine.rungs
    )
    return dataclasses.replace(machine, rungs=rungs, memory_bytes=machine.memory_bytes * cards), rate * cards


def _shared_out(train: dict[str, int], processes: int) -> dict[str, int]:
    """The batch, and the micro-batches of it, that so many processes can share equally."""
    share = -(-train["batch"] // processes)
    micro = max(size for size in range(1, share + 1) if share % size == 0 and size <= train["micro_batch"])
    return {"batch": share * processes, "micro_batch": micro}


def steps_within(recipe: Recipe, flops: float, vocab_size: int, text: str) -> int:
    """The most steps whose training FLOPs stay within `flops`. Raises `UsageError` if that is not one."""
    from cadre.plan.count import count

    train, seq_len = recipe.train, recipe.data.seq_len
    counted = count(_config(recipe, vocab_size), context=seq_len)
    step = train.batch * seq_len * counted.training_flops(train.mtp_rows_share)
    if flops < step:
        raise UsageError(f"--budget {text}: less than one step of {recipe.name}, which takes {step:.2g} FLOPs; give more")
    return int(flops / step)


def money_flops(recipe: Recipe, budget: Budget, device: Device, vocab_size: int) -> float:
    """FLOPs that the money buys of the recipe's model, by `cadre plan`'s assumptions."""
    from cadre.plan.budget import Candidate, flops_for
    from cadre.plan.count import count

    assert budget.usd is not None
    config = _config(recipe, vocab_size)
    return flops_for(budget.usd, device, Candidate(config, count(config, context=recipe.data.seq_len)))


def _config(recipe: Recipe, vocab_size: int) -> ModelConfig:
    from cadre.hub.directory import load_config

    return load_config(Path(recipe.model["from"])) if "from" in recipe.model else recipe.config(vocab_size)


def _guess_flops(budget: Budget, device: Device | None) -> float:
    import torch

    from cadre.kernels.limits import default_device, gemm_flops_per_second, training_dtype

    here = default_device()
    size = 512 if here == torch.device("cpu") else 8192
    return _flops(budget, device, 0.35 * gemm_flops_per_second(training_dtype(here), here, size, 3))


def _flops(budget: Budget, device: Device | None, rate: float) -> float:
    """About what a budget comes to."""
    from cadre.plan.budget import precision_on

    if budget.flops is not None:
        return budget.flops
    if budget.seconds is not None:
        return budget.seconds * rate
    assert budget.usd is not None and device is not None
    precision = precision_on(device)
    return budget.usd / device.rent * 3600 * device.flops[precision] * device.efficiency[precision] / 3


def measure_machine(flops: float, vocab_size: int) -> tuple[Machine, float]:
    """Rungs around the width that `flops` call for, and the FLOP/s of the upper one."""
    from cadre.kernels.limits import default_device, training_dtype
    from cadre.kernels.memory import total_bytes
    from cadre.plan.budget import Machine, Rung, rates, sequence_length, shape, width_for
    from cadre.plan.count import count
    from cadre.plan.here import forecast
    from cadre.plan.shape import Shape
    from cadre.train.bench.calibrate import QUICK, Step, calibrate
    from cadre.train.recipe import OptimizerSection

    here = default_device()
    dtype, seq_len, width = training_dtype(here), sequence_length(flops), width_for(flops)
    muon, adamw = rates(flops)
    step = Step(16, 16, seq_len, 1.0, OptimizerSection(name="muon", lr=muon, adamw_lr=adamw))
    rungs = []
    # Around a small model one width says enough: its neighbours are near, and time is short.
    around = {width} if width <= 96 else {32 * round(width / 1.4 / 32), 32 * round(width * 1.4 / 32)}
    for hidden in sorted(around):
        config = shape(hidden, 16, 2, vocab_size, seq_len)
        measured = calibrate(config, step, dtype=dtype, effort=QUICK)
        counted = count(config, context=seq_len)
        predicted = forecast(Shape.from_config(config), measured)
        update = predicted.terms["clipping, balance and optimizer"]
        passes = predicted.seconds_per_step - update
        reached = counted.training_flops_per_token * step.batch * seq_len / passes
        rungs.append(Rung(hidden, reached, update / counted.total_parameters))
    return Machine(tuple(rungs), total_bytes(here)), rungs[-1].flops_per_second


def describe(chosen: Choice, budget: Budget, device: Device | None) -> list[str]:
    """The choice, a line each."""
    from cadre.plan.budget import precision_on

    config, hours = chosen.config, chosen.seconds / 3600
    lines = [
        f"chosen for {budget.text}: width {config.hidden_size}, {config.num_hidden_layers} blocks, "
        f"{config.n_routed_experts} experts of {config.moe_intermediate_size}, top {config.num_experts_per_tok}, "
        f"{config.n_shared_experts} shared",
        f"{chosen.steps:,} steps of {chosen.batch} x {chosen.seq_len}: {chosen.tokens / 1e6:,.2f}M tokens, {chosen.flops:.2e} "
        f"FLOPs, about {f'{hours:,.1f} hours' if hours >= 2 else f'{chosen.seconds / 60:,.1f} minutes'} here; "
        f"rate {chosen.rate:g} (Muon), {chosen.adamw_rate:g} (AdamW)",
        f"expected: {chosen.score:.2f} bits per byte on text like the default corpus (docs/plan.md says by which rule)",
    ]
    if device is not None:
        lines.append(f"assumed: ${device.rent:g} an hour of {device.name} ({device.sources['rent']})")
        if budget.usd is not None:
            share = device.efficiency[precision_on(device)]
            lines.append(f"assumed: it reaches {share:.0%} of its peak, less in narrow experts")
    return lines
