"""What it costs to see the balance: counting loads in every step, and a record to metrics.jsonl and TensorBoard.

python benchmarks/balance_cost.py [RECIPE] [--steps N]        the recipe's shape and batch on random tokens
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cadre.kernels.limits import training_dtype
from cadre.train.bench.step import TrainingStep
from cadre.train.collapse import CollapseAlarm
from cadre.train.metrics import MetricsLog
from cadre.train.recipe import read_recipe


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="pocket")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    recipe = read_recipe(options.recipe)
    config = recipe.config(recipe.data.vocab_size or 32768)
    train, seq_len = recipe.train, recipe.data.seq_len
    cpu, rows = torch.device("cpu"), train.mtp_rows
    training = TrainingStep(
        config, batch=train.batch, seq_len=seq_len, dtype=training_dtype(cpu), device=cpu, optimizer=recipe.optimizer,
        balance=recipe.balance, mtp_rows=rows,
    )  # fmt: skip
    model, balance, ids = training.model, training.balance, training.tokens()

    def step() -> None:
        training.run_pass(ids)
        training.update()

    step()
    step_seconds = median_seconds(step, options.steps)
    balance.record()
    with torch.no_grad():
        hidden = model.hidden(ids[:, :seq_len])
        for depth in range(len(model.mtp)):
            hidden = model.mtp_hidden(hidden[:rows], ids[:rows, depth + 1 : seq_len + depth + 1], depth)
    recorded = balance.recorded(seq_len)

    def count() -> None:
        balance.reset()
        balance.count(recorded)
        balance.update()

    count_seconds = median_seconds(count, 50)
    alarm = CollapseAlarm([index for index, _ in balance.layers], recipe.balance)
    with tempfile.TemporaryDirectory() as folder:
        log, number = MetricsLog(Path(folder)), 0

        def record() -> None:
            nonlocal number
            number += train.log_every
            found = balance.metrics()
            log.write({"step": number, "loss": 1.0, "grad_norm": 1.0, **found})
            alarm.check(number, balance.window_steps, balance.window_LE, found["bias_range"], found["logit_scale"])

        record_seconds = median_seconds(record, 50)
        log.close()
    share = (count_seconds + record_seconds / train.log_every) / step_seconds
    print(f"{options.recipe}: a step takes {step_seconds * 1e3:.0f} ms ({torch.get_num_threads()} threads); counting loads and "
          f"moving biases {count_seconds * 1e3:.2f} ms of it;\na record {record_seconds * 1e3:.2f} ms every {train.log_every} "
          f"steps; together {share:.2%} of a step")  # fmt: skip


if __name__ == "__main__":
    main()
