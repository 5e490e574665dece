import errno
import io
import json
import math
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cadre.errors import RunError, UsageError
from cadre.train.metrics import LAYER_TAGS, MetricsLog, last_record, read_metrics


def training(step: int) -> dict:
    return {
        "step": step, "tokens": 2048 * step, "loss": 9.0 - step / 7, "mtp_loss": [9.5, 9.75], "grad_norm": 1.5,
        "learning_rate": 1e-3, "tokens_per_second": 4000.0, "mfu": None, "seconds": 0.5 * step,
        "load": [[0.25, 0.75], [0.5, 0.5]], "load_layers": [1, 2], "max_vio": [0.5, 0.0], "max_vio_window": [0.25, 0.0],
        "load_entropy": [0.5, 1.0], "dead_experts": [0, 1], "bias_range": [0.125, None], "logit_scale": [0.75, 1.5],
    }  # fmt: skip


def run_steps(run_dir: Path, first: int, last: int, resume_step: int = -1) -> None:
    log = MetricsLog(run_dir, resume_step=resume_step)
    for step in range(first, last + 1):
        log.write(training(step))
        if step % 4 == 0:
            log.write({"step": step, "bits_per_byte": 2.0 - step / 50, "eval_seconds": 1.0, "tokens": 2048 * step})
    log.close()


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_records_round_trip_in_order(tmp_path: Path) -> None:
    records = [
        training(1),
        {"step": 1, "bits_per_byte": 1.9, "eval_seconds": 2.0, "tokens": 2048},
        {"step": 2, "event": "stopped", "message": 'disk "quota" \u00e9puis\u00e9\n'},
    ]
    log = MetricsLog(tmp_path)
    for number, record in enumerate(records, start=1):
        log.write(record)
        assert read_metrics(tmp_path) == records[:number]  # flushed per line
    log.close()


def test_non_finite_numbers_become_null_and_keep_their_key(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    losses = {"loss": math.nan, "grad_norm": math.inf, "mtp_loss": [1.0, -math.inf]}
    log.write({"step": 3, **losses, "load": [[math.nan, 1.0]]})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "step": 3, "loss": None, "grad_norm": None, "mtp_loss": [1.0, None], "load": [[None, 1.0]],
    }  # fmt: skip


def test_a_record_without_a_step_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match="step"):
        log.write({"loss": 1.0})
    log.close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("killed_at", [8, 10, 11, 13])
def test_resuming_leaves_the_file_of_an_uninterrupted_run(tmp_path: Path, killed_at: int) -> None:
    run_steps(tmp_path / "whole", 1, 16)
    run_steps(tmp_path / "cut", 1, killed_at)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')
    run_steps(tmp_path / "cut", 9, 16, resume_step=8)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert cut == whole
    assert [step for step, _ in scalars(tmp_path / "cut", "loss/train")] == list(range(1, 17))
    assert scalars(tmp_path / "cut", "load/max_vio/layer_1") == [(step, 0.5) for step in range(1, 17)]


@settings(deadline=None)  # the disk sets the pace
@given(cut=st.integers(min_value=0), steps=st.integers(1, 5))
def test_a_line_torn_at_any_byte_is_left_out(tmp_path_factory: pytest.TempPathFactory, cut: int, steps: int) -> None:
    run_dir = tmp_path_factory.mktemp("torn")
    lines = [json.dumps(training(step)) + "\n" for step in range(1, steps + 1)]
    whole, last = "".join(lines[:-1]), lines[-1]
    kept = cut % len(last)
    (run_dir / "metrics.jsonl").write_text(whole + last[:kept])
    complete = steps if kept == len(last) - 1 else steps - 1  # only the newline is missing
    assert read_metrics(run_dir) == [training(step) for step in range(1, complete + 1)]


def test_a_damaged_line_is_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UsageError, match="line 2"):
        MetricsLog(tmp_path, resume_step=3)
    assert "not json" in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_without_metrics_reads_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)

    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log, "_file", FullDisk())
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: the disk is full"):
        log.write({"step": 1})


def test_a_file_of_many_loads_is_trimmed_in_little_memory(tmp_path: Path) -> None:
    record = training(0) | {"load": [[0.123456] * 500] * 4, "load_layers": [1, 2, 3, 4]}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(record | {"step": step}) + "\n" for step in range(600))
    MetricsLog(tmp_path / "elsewhere").close()  # which imports what it needs
    tracemalloc.start()
    log = MetricsLog(tmp_path, resume_step=300)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    log.close()
    assert most < (tmp_path / "metrics.jsonl").stat().st_size / 4
    assert last_record(tmp_path) == read_metrics(tmp_path)[-1] and read_metrics(tmp_path)[-1]["step"] == 300


def test_tensorboard_shows_scalars_and_the_expert_map(tmp_path: Path) -> None:
    run_steps(tmp_path, 1, 4)
    assert scalars(tmp_path, "loss/mtp_2") == [(step, 9.75) for step in range(1, 5)]
    assert scalars(tmp_path, "eval/bits_per_byte") == [(4, pytest.approx(1.92))]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [image.step for image in board.Images("load/expert_map")] == [4]
    tags = board.Tags()["scalars"]
    assert "speed/mfu" not in tags and "router/bias_range/layer_2" not in tags  # null is no number
    for key, tag in LAYER_TAGS.items():
        assert scalars(tmp_path, f"{tag}/layer_1") == [(step, training(step)[key][0]) for step in range(1, 5)]
