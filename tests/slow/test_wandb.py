"""Weights & Biases' own client, offline: what it keeps of a run is what `metrics.jsonl` says."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb.proto.wandb_internal_pb2 import Record

from cadre.train.metrics import TAGS, read_metrics
from tests.runs import write_recipe

# Its files are logs of LevelDB's format behind 7 bytes of their own: blocks of 32 KB, parts with checksum, length, kind.
BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CADRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, train={"wandb": "a-team/small"})


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "cadre.cli.main", "train", *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def records(file: Path) -> Iterator[Any]:
    data, at, record = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            found = Record()
            found.ParseFromString(record)
            yield found
            record = b""


def kept(run: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """What each start of the run said of itself, and the rows of all of them."""
    starts, rows = [], []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.HasField("run"):
                starts.append(record.run)
            elif record.HasField("history"):
                pairs = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                rows.append(pairs)
    return starts, rows


def test_it_keeps_what_the_metrics_say_under_one_id_however_often_the_run_is_resumed(recipe):
    for arguments in ([recipe, "--out", "run"], ["--resume", "run", "--steps", 18]):
        process = start(*arguments)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert "wandb:" not in said  # its lines would tear the progress line
    run = Path("run")
    starts, rows = kept(run)
    assert {(each.entity, each.project, each.display_name) for each in starts} == {("a-team", "small", "run")}
    assert {each.run_id for each in starts} == {(run / "wandb.txt").read_text().strip()}
    assert any(update.key == "optimizer" for update in starts[0].config.update)
    metrics = [record for record in read_metrics(run) if "event" not in record]
    assert metrics and [row["step"] for row in rows if "events" not in row] == [record["step"] for record in metrics]
    shown = [row for row in rows if "events" not in row]
    for row, record in zip(shown, metrics, strict=True):
        assert {key: row[tag] for key, tag in TAGS.items() if tag in row} == {
            key: record[key] for key in TAGS if record.get(key) is not None
        }
    assert any("load/expert_map/_type" in row or "load/expert_map" in row for row in shown)
    assert [row["events"].partition(":")[0] for row in rows if "events" in row] == ["finished", "resumed", "finished"]


def test_ctrl_c_ends_a_run_that_it_watches_as_any_other(recipe):
    process = start(recipe, "--out", "run", "--steps", 10**6)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 30/"))
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130, said
    assert "continue with: cadre train --resume run" in said
    assert kept(Path("run"))[1][-1]["events"].startswith("stopped: by SIGINT")


def test_a_run_goes_on_when_its_process_dies(recipe):
    process = start(recipe, "--out", "run", "--steps", 400)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 30/"):
            for child in psutil.Process(process.pid).children(recursive=True):
                if "wandb" in child.name():
                    child.kill()
    said = "".join(lines)
    assert process.wait() == 0, said
    assert said.count("it shows no more of this run") == 1
    assert "step 400/400" in said and read_metrics(Path("run"))[-1]["event"] == "finished"
