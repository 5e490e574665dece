"""The run's record of itself: `metrics.jsonl`, one JSON object per line, mirrored to whoever shows it (cadre/train/boards.py).

Every record has "step". Which of these keys it has says what it is:

    training    loss (nats/token, main head), tokens (seen so far), mtp_loss (one per module), grad_norm, learning_rate,
                attention_logit (under qk_clip: the step's largest, before it was clipped),
                tokens_per_second, mfu (a fraction), seconds (of training so far), seconds_per_step,
                balance_loss (sequence-wise), batch_balance_loss, global_balance_loss, router_z_loss: those in use, each
                without its weight and averaged over sparse layers;
                load_layers (the sparse layers' numbers), and in their order, of the logged step,
                load [layers][experts] (fractions of the routed assignments, each layer sums to 1), max_vio, logit_scale
                (root mean square of the router's logits), bias_range (largest less smallest, null without a bias);
                of all steps since the record before, max_vio_window, load_entropy (over that of an even load: 1 is
                balance), dead_experts (how many have less than 1% of the mean load)
    evaluation  bits_per_byte, eval_seconds, tokens, seconds, final (of all held-out text, with a sliding context); part (of a
                final one that had no time for all: the share of the bytes that it read)
    event       event ("resumed", "skipped", "unsaved", "stopped", "in part", "risen" (held-out loss), "finished", "collapse",
                "recovered"), message; layer (of the last two)

What they mean: cadre/train/loads.py, cadre/train/collapse.py.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadre.errors import RunError, UsageError, write_error
from cadre.files import replacing
from cadre.train.boards import TensorBoard, WeightsAndBiases
from cadre.train.figures import load_colours
from cadre.train.loads import load_ratio

FILE_NAME = "metrics.jsonl"

# More than any record: with the loads of 61 layers of 256 experts one has some 140 KB.
_LAST_BYTES = 2**22

# An assignment's share to 6 decimals is finer than any batch resolves, and 61 layers x 256 experts stay near 140 KB.
LOAD_DECIMALS = 6

TAGS = {
    "loss": "loss/train",
    "balance_loss": "loss/balance",
    "batch_balance_loss": "loss/batch_balance",
    "global_balance_loss": "loss/global_balance",
    "router_z_loss": "loss/router_z",
    "bits_per_byte": "eval/bits_per_byte",
    "eval_seconds": "eval/seconds",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "attention_logit": "optimizer/attention_logit",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "seconds_per_step": "speed/seconds_per_step",
    "tokens": "progress/tokens",
}

# Lists with one number for each of `load_layers`.
LAYER_TAGS = {
    "max_vio": "load/max_vio",
    "max_vio_window": "load/max_vio_window",
    "load_entropy": "load/entropy",
    "dead_experts": "load/dead_experts",
    "bias_range": "router/bias_range",
    "logit_scale": "router/logit_scale",
}


class MetricsLog:
    """Appends records to `run_dir/metrics.jsonl` and mirrors them to `run_dir/tensorboard/` and whatever else is in `boards`.

    `resume_step` is the step training continues from, -1 of one that begins: lines of later steps, which the resumed run writes
    again, are dropped first, so that N + N steps leave the records of 2N. A torn last line (`kill -9`, full disk) is always
    dropped. The caller writes a step's records before it saves that step's checkpoint, but for those that `again` knows: of
    `resume_step` itself, what the resumed run writes again.

    Raises UsageError if an existing file is not a metrics file, RunError if the disk refuses.
    """

    def __init__(
        self, run_dir: Path, *, resume_step: int = -1, again: Callable[[dict[str, Any]], bool] = lambda record: False
    ) -> None:
        self.path = run_dir / FILE_NAME
        with _disk(self.path):
            run_dir.mkdir(parents=True, exist_ok=True)
            _trim(self.path, resume_step, again)
            self._file = self.path.open("a", encoding="utf-8")
            self.boards: list[TensorBoard | WeightsAndBiases] = [TensorBoard(run_dir, resume_step + 1)]
        self._load: NDArray[np.float64] | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record and flushes it; NaN and infinity become null. Raises RunError on a full disk."""
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a metrics record needs an integer 'step', got {record.get('step')!r}")
        record = _finite(record)
        if "load" in record:
            record["load"] = [[None if f is None else round(f, LOAD_DECIMALS) for f in row] for row in record["load"]]
        with _disk(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            self._mirror(record)

    def close(self) -> None:
        with _disk(self.path), ExitStack() as every:  # one that fails keeps none of the others
            for closing in (*self.boards, self._file):
                every.callback(closing.close)

    def _mirror(self, record: dict[str, Any]) -> None:
        scalars = {tag: record.get(key) for key, tag in TAGS.items()}
        scalars |= {f"loss/mtp_{i}": loss for i, loss in enumerate(record.get("mtp_loss") or [], start=1)}
        layers = record.get("load_layers") or []
        for key, tag in LAYER_TAGS.items():
            values = zip(layers, record.get(key) or [], strict=False)
            scalars |= {f"{tag}/layer_{layer}": value for layer, value in values}
        event = f"{record['event']}: {record.get('message') or ''}" if "event" in record else None
        if record.get("load"):
            self._load = np.array(record["load"], dtype=float)
        image: NDArray[Any] | None = None
        # An image costs a thousand scalars, so the map (layers x experts) goes out with the evaluations only.
        if "bits_per_byte" in record and self._load is not None:
            pixels = max(1, 512 // self._load.shape[1])
            image = np.kron(load_colours(load_ratio(self._load)), np.ones((pixels, pixels, 1)))
        for board in self.boards:
            board.write(record["step"], {tag: value for tag, value in scalars.items() if value is not None}, event, image)


class NoMetrics:
    """The log of a process that keeps none."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's records in the order written, [] if it has none yet; a torn last line is left out.

    Raises UsageError if another line is not a record.
    """
    path = run_dir / FILE_NAME
    return [record for record, _ in _lines(path) if record is not None] if path.exists() else []


def last_record(run_dir: Path) -> dict[str, Any] | None:
    """The newest of the run's records, None if it has none yet. Reads the end of the file alone: the rest may be gigabytes."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = file.read().split(b"\n")
    return next((record for line in reversed(lines) if (record := _record(line)) is not None), None)


def well_formed(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records in the order of their steps, for whoever draws them, without the fields that are not what this file says:
    others may write there too."""
    kept = (_well_formed(record) for record in records if 0 <= record["step"] < 2**53)
    return sorted(kept, key=lambda record: record["step"])


# No value of a run is larger; larger ones overflow where they are drawn.
_LARGEST = 1e30


def _well_formed(record: dict[str, Any]) -> dict[str, Any]:
    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(item is None or number(item) for item in value)

    def matrix(value: Any) -> bool:
        rows = isinstance(value, list) and all(numbers(row) for row in value)
        return rows and len({len(row) for row in value}) == 1 and len(value[0]) > 0

    checks = {
        **dict.fromkeys((*TAGS, "seconds"), number), **dict.fromkeys(("mtp_loss", *LAYER_TAGS), numbers), "load": matrix,
        "load_layers": lambda value: isinstance(value, list) and all(isinstance(layer, int) for layer in value),
        "event": lambda value: isinstance(value, str), "message": lambda value: isinstance(value, str),
        "layer": lambda value: isinstance(value, int),
    }  # fmt: skip
    kept = {key: value for key, value in record.items() if value is not None and checks.get(key, lambda _: True)(value)}
    layers = kept.get("load_layers")
    for key in ("load", *LAYER_TAGS):
        if layers is not None and key in kept and len(kept[key]) != len(layers):
            del kept[key]
    return kept


def folder_gone(run_dir: Path) -> RunError:
    """The error to raise when a run finds its folder, or what it has written there, no longer."""
    return RunError(f"{run_dir}: the run's folder is gone: somebody has removed or renamed it, or files in it, meanwhile")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise folder_gone(path.parent) from None
    except OSError as error:
        raise write_error(f"{path}: cannot be written", error) from error


def _trim(path: Path, resume_step: int, again: Callable[[dict[str, Any]], bool]) -> None:
    """Line by line, twice if need be: the loads of many experts make a file of gigabytes."""

    def stays(record: dict[str, Any] | None) -> bool:
        if record is None:
            return False
        return record["step"] < resume_step or (record["step"] == resume_step and not again(record))

    if not path.exists() or all(stays(record) and line.endswith(b"\n") for record, line in _lines(path)):
        return
    with replacing(path) as file:
        file.writelines(line.rstrip(b"\n") + b"\n" for record, line in _lines(path) if stays(record))


def _lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Each line with its record; the last with None if it is torn: no whole line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _record(line)
            if record is None and file.read(1):
                raise UsageError(f"{path}, line {number}: expected a JSON object with an integer 'step'")
            yield record, line


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a line that holds no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
