"""`cadre plan --here`: measure this machine on a model's own blocks, and say what training and decoding it would take."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

import typer

from cadre.errors import UsageError

if TYPE_CHECKING:
    from cadre.model.config import ModelConfig
    from cadre.plan.planner import Request
    from cadre.train.bench.calibrate import Step
    from cadre.train.recipe import Recipe

# A model up to this size is decoded whole; of a larger one two with few blocks are, and the difference is one block's.
_WHOLE_PARAMETERS = 30e6
_DECODE_STEPS = 24
_DECODE_WARM_UP = 3
_DECODE_CONTEXT = 512
# Seconds after which a large model's decoding is left out: the measurement has taken its time.
_TIME_FOR_TRAINING = 30.0


def plan_here(request: Request, config: ModelConfig, recipe: Recipe | None) -> dict[str, Any]:
    """The plan for this machine as plain values; the seconds of a step are the recipe's own, or those of `request`.

    Raises `UsageError` if even a part of the model cannot be trained here.
    """
    import torch

    from cadre.kernels.limits import default_device, training_dtype
    from cadre.plan.count import count
    from cadre.plan.here import forecast
    from cadre.plan.planner import counts
    from cadre.train.bench.calibrate import calibrate

    step = _step(request, recipe)
    if config.max_position_embeddings < step.seq_len:
        raise UsageError(f"--context {step.seq_len}: the model's context is {config.max_position_embeddings}")
    device = default_device()
    if request.precision is not None and request.precision not in _DTYPES:
        raise UsageError(f"--precision {request.precision}: --here measures fp32 and bf16, in which Cadre trains")
    dtype = training_dtype(device) if request.precision is None else getattr(torch, _DTYPES[request.precision])
    began = time.perf_counter()
    measured = calibrate(config, step, dtype=dtype, limits=True)
    took, notes = time.perf_counter() - began, list(request.notes)
    context = min(_DECODE_CONTEXT, config.max_position_embeddings - _DECODE_STEPS)
    if took > _TIME_FOR_TRAINING and count(config).total_parameters > _WHOLE_PARAMETERS:
        notes.append(f"decoding was not measured: measuring training took {took:.0f} s")
    elif context > 0:
        seconds = _decode_seconds(config, context)
        measured = dataclasses.replace(measured, decode_seconds=seconds, decode_context=context)
    predicted = forecast(request.shape, measured)
    steps = None if request.tokens is None else max(1, round(request.tokens / (step.batch * step.seq_len)))
    counted = counts(request, "fp32" if dtype == torch.float32 else "bf16").as_dict()
    return {
        "model": request.name,
        "source": request.source,
        "notes": notes,
        **{key: value for key, value in counted.items() if key != "parts"},
        **predicted.as_dict(),
        "tokens": request.tokens,
        "steps": steps,
        "training_seconds": None if steps is None else steps * predicted.seconds_per_step,
        "calibration": dataclasses.asdict(measured),
    }


_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _step(request: Request, recipe: Recipe | None) -> Step:
    from cadre.train.bench.calibrate import Step
    from cadre.train.recipe import OptimizerSection

    if recipe is not None:
        if request.optimizer != recipe.optimizer.name:
            raise UsageError(f"--optimizer {request.optimizer}: --here measures the recipe's own, {recipe.optimizer.name}")
        step = Step.of(recipe)
        batch = request.batch or step.batch
        return dataclasses.replace(step, batch=batch, micro_batch=min(step.micro_batch, batch), seq_len=request.context)
    batch = request.batch or 8
    optimizer = OptimizerSection.model_validate({"name": request.optimizer, "lr": 1e-3})
    return Step(batch, batch, request.context, 1.0, optimizer)


def _decode_seconds(config: ModelConfig, context: int) -> float:
    """Seconds of one more token of one sequence that has `context`, on random weights."""
    from cadre.plan.count import count
    from cadre.train.bench.calibrate import fewest_blocks

    if count(config).total_parameters <= _WHOLE_PARAMETERS:
        return _median_step(config, context)
    few = fewest_blocks(config)
    one_more = few.model_copy(update={"num_hidden_layers": few.num_hidden_layers + 1})
    first = _median_step(few, context)
    block = max(0.0, _median_step(one_more, context) - first)
    return first + block * (config.num_hidden_layers - few.num_hidden_layers)


def _median_step(config: ModelConfig, context: int) -> float:
    from cadre.infer.bench.decode import Decoding, default_dtype, random_model

    plain = config.model_copy(update={"num_nextn_predict_layers": 0})
    decoding = Decoding(random_model(plain, default_dtype(config), None), context, 1, _DECODE_STEPS)
    return statistics.median([decoding.step() for _ in range(_DECODE_STEPS)][_DECODE_WARM_UP:])


def show(made: dict[str, Any]) -> None:
    """Print what `plan_here` made."""
    measured = made["calibration"]
    typer.echo(f"{made['model']}  ({made['source']})")
    for note in made["notes"]:
        typer.echo(f"note: {note}")
    total, active = made["total_parameters"], made["active_parameters"]
    rows = [("parameters", f"{total:,} ({active:,} active)"), ("step", _seconds(made["seconds_per_step"]))]
    rows += [(f"  {name}", _seconds(seconds)) for name, seconds in made["terms"].items()]
    rows += [
        ("training", f"{made['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", f"{made['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    if made["training_seconds"] is not None:
        rows.append((f"{made['steps']:,} steps", f"{made['training_seconds'] / 60:,.1f} minutes, evaluations apart"))
    if made["decode_tokens_per_second"] is not None:
        rate = f"{made['decode_tokens_per_second']:,.0f} tokens/s at context {measured['decode_context']}, one user"
        rows.append(("decoding", rate))
    typer.echo(
        f"\nOn this machine: {measured['device']}, {measured['threads']} threads, {measured['dtype']}, "
        f"{measured['batch']} x {measured['seq_len']} tokens a step"
    )
    _table(rows)
    limits = [("memory", f"{measured['memory_bytes_per_second'] / 1e9:,.1f} GB/s")]
    for dtype, rates in measured["gemm_flops_per_second"].items():
        limits += [(f"product of {size}, {dtype}", f"{rate / 1e9:,.0f} GFLOP/s") for size, rate in rates.items()]
    typer.echo("\nMeasured")
    _table(limits)
    if measured["rows"] < measured["micro_batch"]:
        typer.echo(f"note: measured on {measured['rows']} of a micro-batch's {measured['micro_batch']} sequences")


def _table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        typer.echo(f"{name:{width}}{value}")


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"
