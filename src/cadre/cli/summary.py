"""What the report says of a run beside its metrics: counts, data, machine, result."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from cadre.plan.count import count
from cadre.plan.here import compare
from cadre.train.bench.calibrate import read_prediction

if TYPE_CHECKING:
    from cadre.train.run import Run
    from cadre.train.trainer import Result


def summarize(run: Run, result: Result, samples: list[dict[str, str]], command: str) -> dict[str, Any]:
    """The `summary` of `cadre.train.report.write_report`."""
    manifest = run.data.manifest
    predicted = read_prediction(run.path)
    train, seq_len = run.recipe.train, run.recipe.data.seq_len
    per_step = train.batch * seq_len
    step_seconds = per_step / result.tokens_per_second if result.tokens_per_second else None
    return {
        "name": run.recipe.name,
        "command": command,
        "config": run.config.to_hf(),
        "recipe": run.recipe.model_dump(exclude_none=True, exclude={"name": True, "model": True, "data": {"source"}}),
        "counts": count(run.config, context=seq_len, cache_bytes=run.dtype.itemsize).trained(train.mtp_rows_share).as_dict(),
        "data": {
            "source": " ".join(run.recipe.data.sources),
            "vocab_size": run.config.vocab_size,
            "bytes_per_token": manifest["bytes_per_token"],
            **manifest["train"],
            "held_out_documents": manifest["held_out"]["documents"],
        },
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "dtype": train.dtype,
            "gemm_flops_per_second": result.gemm_flops_per_second,
            "torch": torch.__version__,
        },
        "result": asdict(result),
        "prediction": compare(predicted, step_seconds, result.peak_memory_bytes) if predicted else [],
        "samples": samples,
        "model_dir": str(run.path / "model"),
        "load_line": load_line(run.path / "model"),
        "cost": {
            "device_hours": result.seconds / 3600,
            "note": "one machine, wall clock of training and evaluation; preparing the text is not counted",
        },
    }


def load_line(model_dir: Path) -> str:
    return f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({json.dumps(str(model_dir))}))"


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
