"""The training loop: what is learnt, what is written, and that no way of ending a run loses or changes anything."""

import errno
import math
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from cadre.errors import RunError
from cadre.hub.load import load
from cadre.train import checkpoint as checkpoint_module
from cadre.train import collapse, objective
from cadre.train import trainer as module
from cadre.train.checkpoint import checkpoints, read_state
from cadre.train.metrics import read_metrics
from cadre.train.trainer import Trainer
from tests.train.conftest import Watcher, interrupt

TIMING = {"seconds", "wall_seconds", "cpu_seconds", "seconds_per_step", "tokens_per_second", "mfu", "eval_seconds"}


def content(path, *, finals: bool = True) -> list:
    """All that a run is, but its timing and events: every tensor of its newest checkpoint, the rest of its state, its
    metrics, and its model's bytes."""
    newest = checkpoints(path)[-1]
    files = [load_file(newest / name) for name in ("weights.safetensors", "optimizer.safetensors")]
    tensors = [
        (name, tensor.dtype, tensor.flatten().view(torch.uint8).numpy().tobytes())
        for file in files
        for name, tensor in sorted(file.items())
    ]
    state = {key: value for key, value in read_state(newest).items() if key not in {*TIMING, "length"}}
    records = [{k: v for k, v in record.items() if k not in TIMING} for record in read_metrics(path) if "event" not in record]
    if not finals:
        records = [record for record in records if not record.get("final")]
    return [tensors, state, records, (path / "model" / "model.safetensors").read_bytes()]


# ------------------------------------------------------------------------------------------------- a run from end to end


def test_a_run_learns_and_leaves_all_it_promises(lab):
    run = lab.start("run", "train.steps=60", "optimizer.lr=0.01", "train.log_every=10", "eval.every=30", "checkpoint.every=25")
    result, watcher = lab.train(run)
    records = read_metrics(run.path)
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [10, 20, 30, 40, 50, 60]
    assert training[0]["loss"] > 4.5 and training[-1]["loss"] < 0.7 * training[0]["loss"]
    assert training[-1]["mtp_loss"][0] < 0.8 * training[0]["mtp_loss"][0]
    keys = {"step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu",
            "seconds", "seconds_per_step", "load", "load_layers", "max_vio", "max_vio_window", "load_entropy",
            "dead_experts", "bias_range", "logit_scale"}  # fmt: skip
    for record in training:
        assert set(record) == keys
        assert record["tokens"] == record["step"] * 4 * 16
        assert record["load_layers"] == [1, 2] and [len(row) for row in record["load"]] == [4, 4]
        assert record["tokens_per_second"] * record["seconds_per_step"] == pytest.approx(64)
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * _flops(run) / 1e11)
    scores = [record for record in records if "bits_per_byte" in record]
    assert [(record["step"], record["final"]) for record in scores] == [(30, False), (60, True)]
    assert records[-1]["event"] == "finished"
    assert [path.name for path in checkpoints(run.path)] == ["step-00000050", "step-00000060"]
    assert (result.steps, result.tokens, result.stopped) == (60, 60 * 64, None)
    assert result.bits_per_byte == scores[-1]["bits_per_byte"] < scores[0]["bits_per_byte"] < 8
    assert result.total_flops == 60 * 64 * _flops(run)
    assert result.loss == training[-1]["loss"]
    assert len(watcher.records) == len(training) + len(scores) and set(watcher.totals) == {60}
    assert any((run.path / "tensorboard").iterdir())


def _flops(run) -> float:
    from cadre.plan.count import count

    return count(run.config, context=16).training_flops_per_token


def test_the_model_loads_in_transformers_and_here(lab):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = lab.start("run", "train.steps=3")
    lab.train(run)
    theirs = AutoModelForCausalLM.from_pretrained(run.path / "model", dtype=torch.float32)
    ours, tokenizer = load(run.path)
    ids = torch.tensor([tokenizer.encode("the people of a nation").ids])
    assert AutoTokenizer.from_pretrained(run.path / "model")("the people of a nation").input_ids == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.model.eval()(ids), ours(ids))


def test_bfloat16_compute_keeps_float32_masters(lab):
    run = lab.start("run", "train.dtype=bfloat16", "train.steps=20", "optimizer.lr=0.01")
    lab.train(run)
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    state = load_file(checkpoints(run.path)[-1] / "weights.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    saved = load_file(run.path / "model" / "model.safetensors")
    biases = {tensor.dtype for name, tensor in saved.items() if name.endswith("e_score_correction_bias")}
    rest = {tensor.dtype for name, tensor in saved.items() if not name.endswith("e_score_correction_bias")}
    assert (biases, rest) == ({torch.float32}, {torch.bfloat16})
    losses = [record["loss"] for record in read_metrics(run.path) if "loss" in record]
    assert losses[-1] < losses[0]


def test_experts_in_fp8_learn_what_others_do(lab):
    losses = []
    for name, fp8 in (("plain", "false"), ("fp8", "true")):
        result, _ = lab.train(lab.start(name, f"train.fp8_experts={fp8}", "train.steps=30"))
        losses.append(result.loss)
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_gradient_accumulation_is_the_same_training(lab, rule):
    """One batch of 16 and four micro-batches of 4, with every loss that asks the same of both."""
    options = ["train.batch=16", "train.steps=6", "train.log_every=1", "eval.every=100", "train.mtp_share=0.4",
               f"balance.bias_update={rule}", "balance.global_weight=0.1", "balance.z_weight=0.1",
               "balance.sequence_weight=0.1", "balance.bias_speed=0.01"]  # fmt: skip
    for name, more in (("whole", []), ("micro", ["train.micro_batch=4"])):
        lab.train(lab.start(name, *options, *more))
    whole, micro = (read_metrics(lab.folder / name) for name in ("whole", "micro"))
    for a, b in zip(whole, micro, strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "global_balance_loss", "router_z_loss", "grad_norm", "logit_scale"):
            if "loss" in a:
                assert b[key] == pytest.approx(a[key], rel=1e-3), key
        for key in ("load", "max_vio", "max_vio_window", "load_entropy", "dead_experts", "bias_range"):
            assert a.get(key) == b.get(key)
    weights = [load_file(checkpoints(lab.folder / name)[-1] / "weights.safetensors") for name in ("whole", "micro")]
    for name in weights[0]:
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(weights[0][name], weights[1][name])  # moved once a step, by all micro-batches' loads
            assert weights[0][name].abs().max() > 0
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-4)


def test_biases_move_once_a_step_as_far_as_the_rate_has_risen(lab):
    warm = ("schedule.kind=constant", "schedule.warmup_steps=2")  # half of the peak rate, then all of it
    run = lab.start("run", "train.steps=3", "train.micro_batch=1", "balance.bias_speed=0.5", *warm)
    lab.train(run)
    possible = {0.25 * first + 0.5 * then for first in (-1, 0, 1) for then in (-2, -1, 0, 1, 2)}
    moved = {move for _, layer in run.model.sparse_layers() for move in layer.gate.e_score_correction_bias.tolist()}
    assert moved <= possible and any(move % 0.5 for move in moved)


def test_nothing_balances_when_all_is_switched_off(lab):
    off = ["use_bias=false", "bias_update=none", "sequence_weight=0"]
    lab.train(lab.start("off", "train.steps=4", *(f"balance.{switch}" for switch in off)))
    lab.train(lab.start("still", "train.steps=4", "balance.bias_speed=0", "balance.sequence_weight=0"))
    assert content(lab.folder / "off")[0] == content(lab.folder / "still")[0]
    records = [record for record in read_metrics(lab.folder / "off") if "loss" in record]
    assert records[-1]["bias_range"] == [0, 0] and "balance_loss" not in records[-1]


def starve(run, layer=0):
    """A router that sends nothing to its first expert."""
    gate = run.model.sparse_layers()[layer][1].gate
    gate.e_score_correction_bias[0] = -1e9


def test_a_collapse_is_said_once_with_layer_and_remedy_and_so_is_recovery(lab, monkeypatch):
    monkeypatch.setattr(collapse, "LASTING", 10)
    run = lab.start("run", "train.steps=18", "train.log_every=2", "balance.bias_update=none", "train.batch=2")
    starve(run)
    gate = run.model.sparse_layers()[0][1].gate
    _, watcher = lab.train(run, at={14: lambda: gate.e_score_correction_bias.zero_()})
    events = [r for r in read_metrics(run.path) if r.get("event") in ("collapse", "recovered")]
    assert [(r["step"], r["event"], r["layer"]) for r in events] == [(10, "collapse", 1), (16, "recovered", 1)]
    message = events[0]["message"]
    assert message.startswith("layer 1: 1 of 4 experts dead (MaxVio ")
    assert message.endswith(" for 10 steps: resume with --set balance.bias_update=sign")
    assert f"collapse {message}" in watcher.notes
    assert [r["dead_experts"] for r in read_metrics(run.path) if "loss" in r][:7] == [[1, 0]] * 7


def test_an_alarm_counts_on_over_an_interruption(lab, monkeypatch):
    monkeypatch.setattr(collapse, "LASTING", 10)
    options = ["train.log_every=3", "balance.bias_update=none", "train.batch=2", "train.steps=15"]
    for name, stop in (("whole", {}), ("parts", {6: interrupt()})):
        run = lab.start(name, *options)
        starve(run)
        lab.train(run, at=stop)
    lab.train(lab.resume("parts"))
    found = [[r for r in read_metrics(lab.folder / n) if r.get("event") == "collapse"] for n in ("whole", "parts")]
    assert found[0] == found[1] and [r["step"] for r in found[0]] == [12]


def test_the_balance_may_change_on_resume_also_between_logged_steps(lab, monkeypatch):
    real, calls = objective.losses, []
    with monkeypatch.context() as patch:
        patch.setattr(
            objective, "losses", lambda *a, **k: (calls.append(1), len(calls) == 5 and interrupt()(), real(*a, **k))[2]
        )
        lab.train(lab.start("run", "train.steps=9", "train.log_every=3"))
    assert read_state(checkpoints(lab.folder / "run")[-1])["window"]
    lab.train(lab.resume("run", "balance.sequence_weight=0", "balance.z_weight=0.01", "balance.bias_update=proportional"))
    records = [r for r in read_metrics(lab.folder / "run") if "loss" in r]
    assert [r["step"] for r in records] == [3, 6, 9]
    assert ["balance_loss" in r for r in records] == [True, False, False]
    assert ["router_z_loss" in r for r in records] == [False, True, True]


def test_the_last_third_has_its_own_multi_token_weight(lab, monkeypatch):
    seen = []
    real = objective.losses
    monkeypatch.setattr(objective, "losses", lambda *a, **k: (seen.append(k["mtp_weight"]), real(*a, **k))[1])
    lab.train(lab.start("run", "train.steps=6", "train.mtp_weight=0.3", "train.mtp_weight_final=0.1"))
    assert seen == [0.3] * 4 + [0.1] * 2


def test_nothing_held_out_means_no_score(lab):
    result, _ = lab.train(lab.start("run", "data.held_out=0", "train.steps=7"))
    assert result.bits_per_byte is None
    assert not any("bits_per_byte" in record for record in read_metrics(lab.folder / "run"))


# ------------------------------------------------------------------------------------------------- going on

EVERYTHING = ["train.steps=14", "train.log_every=1", "eval.every=4", "checkpoint.every=100"]


@pytest.mark.parametrize("more", [
    [], ["optimizer.name=muon"], ["data.separate_documents=true", "train.micro_batch=2", "schedule.kind=cosine"],
    ["balance.bias_update=proportional", "balance.global_weight=0.1", "balance.z_weight=0.1", "train.micro_batch=2"],
    ["train.batch=180", "train.steps=7"],  # more than two epochs
], ids=["adamw", "muon", "documents", "balance", "epochs"])  # fmt: skip
def test_interrupted_twice_equals_uninterrupted_bit_for_bit(lab, more):
    options = [*EVERYTHING, *more]
    whole, _ = lab.train(lab.start("whole", *options))
    stops = (2, 5) if whole.steps == 7 else (3, 8)
    result, _ = lab.train(lab.start("parts", *options), at={stops[0]: interrupt()})
    assert (result.steps, result.stopped) == (stops[0], "SIGTERM")
    result, _ = lab.train(lab.resume("parts"), at={stops[1]: interrupt(signal.SIGINT)})
    assert (result.steps, result.stopped) == (stops[1], "SIGINT")
    last, _ = lab.train(lab.resume("parts"))
    assert content(lab.folder / "parts") == content(lab.folder / "whole")
    assert (last.steps, last.loss, last.bits_per_byte) == (whole.steps, whole.loss, whole.bits_per_byte)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16", "muon"])
def test_n_and_n_steps_equal_2n(lab, optimizer):
    options = [f"optimizer.name={optimizer}", "schedule.kind=constant", "train.log_every=2", "eval.every=100"]
    lab.train(lab.start("whole", *options, "train.steps=12"))
    lab.train(lab.start("halves", *options, "train.steps=6"))
    lab.train(lab.resume("halves", "train.steps=12"))
    assert content(lab.folder / "halves", finals=False) == content(lab.folder / "whole", finals=False)


def test_an_interrupt_between_logged_steps_loses_no_loss(lab, monkeypatch):
    """The losses since the last logged step are part of the checkpoint."""
    options = ["train.steps=9", "train.log_every=9", "eval.every=100"]
    lab.train(lab.start("whole", *options))
    real, calls = objective.losses, []

    def stops_in_the_fifth(*arguments, **settings):
        calls.append(1)
        if len(calls) == 5:
            interrupt()()
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(objective, "losses", stops_in_the_fifth)
        result, _ = lab.train(lab.start("parts", *options))
    assert (result.steps, result.loss) == (5, None)
    lab.train(lab.resume("parts"))
    assert content(lab.folder / "parts") == content(lab.folder / "whole")


def test_events_say_what_happened(lab):
    lab.train(lab.start("run", "train.log_every=1"), at={2: interrupt()})
    _, watcher = lab.train(lab.resume("run"))
    events = [(record["step"], record["event"]) for record in read_metrics(lab.folder / "run") if "event" in record]
    assert events == [(2, "stopped"), (2, "resumed"), (12, "finished")]
    assert watcher.notes == ["resumed from the checkpoint of step 2", "finished 12 steps"]


def test_an_interrupt_in_the_last_step_lets_the_run_end(lab):
    result, _ = lab.train(lab.start("run", "train.log_every=1"), at={12: interrupt()})
    assert (result.steps, result.stopped) == (12, None) and result.bits_per_byte is not None


def test_an_interrupt_before_the_first_step_leaves_a_run_that_can_go_on(lab, monkeypatch):
    lab.train(lab.start("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "gemm_flops_per_second", lambda *_: interrupt()() or 1e11)
        result, _ = lab.train(lab.start("run"))
    assert (result.steps, result.stopped) == (0, "SIGTERM")
    lab.train(lab.resume("run"))
    assert content(lab.folder / "run") == content(lab.folder / "whole")


class _Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("best", ["false", "true"])
def test_killed_after_its_last_step_a_run_writes_nothing_twice(lab, monkeypatch, best):
    """Its last evaluations follow its last checkpoint, and are made again."""
    options = [*EVERYTHING, "train.steps=12", f"checkpoint.best={best}"]  # evaluated at 4, 8 and, as the last, at 12
    lab.train(lab.start("whole", *options))
    lab.train(lab.start("run", *options), at={8: interrupt()})
    for event in ("finished", "resumed", "finished"):  # the second time before, the others after the last evaluation

        def dies(self, name, message, event=event, real=Trainer._event, **more):
            if name == event:
                raise _Killed
            real(self, name, message, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_event", dies)
            with pytest.raises(_Killed):
                lab.train(lab.resume("run"))
    lab.train(lab.resume("run"))
    lab.train(lab.resume("run"))  # it had no report yet
    assert content(lab.folder / "run") == content(lab.folder / "whole")
    assert [record["step"] for record in read_metrics(lab.folder / "run") if record.get("event") == "finished"] == [12]


def test_a_second_ctrl_c_ends_at_once_and_handlers_come_back(lab):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        lab.train(lab.start("run", "train.log_every=1"), at={2: lambda: [interrupt(signal.SIGINT)() for _ in range(2)]})
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    lab.train(lab.resume("run"))


# ------------------------------------------------------------------------------------------------- what goes wrong


def broken(monkeypatch, steps: set[int], part: str):
    """Makes the loss or the gradient of the given steps (from 1) not a number."""
    real, calls = objective.losses, []

    def losses(*arguments, **settings):
        calls.append(1)
        found = real(*arguments, **settings)
        if len(calls) in steps:
            if part == "loss":
                found.main = found.main * math.nan
            else:
                found.total = found.total * math.inf
        return found

    monkeypatch.setattr(objective, "losses", losses)


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_reported(lab, monkeypatch, part):
    broken(monkeypatch, {3, 4, 7}, part)
    run = lab.start("run", "train.log_every=1", "train.steps=8", "balance.bias_speed=0.5")
    weights, biases = {}, {}

    def keep(step):
        def call():
            weights[step] = run.model.lm_head.weight.detach().clone()
            biases[step] = run.model.sparse_layers()[0][1].gate.e_score_correction_bias.clone()

        return call

    watcher_at = {step: keep(step) for step in range(1, 9)}
    trainer = Trainer(run, _Every(watcher_at))
    result = trainer.train()
    assert torch.equal(weights[4], weights[2]) and torch.equal(biases[4], biases[2])
    assert not torch.equal(weights[5], weights[4]) and torch.equal(weights[7], weights[6])
    records = read_metrics(run.path)
    skipped = [(record["step"], record["message"]) for record in records if record.get("event") == "skipped"]
    assert skipped == [(step, f"step {step} skipped: its {part} is not finite") for step in (3, 4, 7)]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 5, 6, 8]
    assert (result.steps, trainer.progress.skipped_in_row) == (8, 0)
    assert math.isfinite(result.bits_per_byte)


class _Every:
    """Calls `at[step]` for every logged step, whether it had a loss or not."""

    def __init__(self, at):
        self.at = at

    def record(self, record, total_steps):
        if "grad_norm" in record:
            self.at[record["step"]]()

    def note(self, text):
        pass


def test_weights_that_blew_up_end_the_run_with_advice_and_harm_nothing_saved(lab):
    options = ["train.log_every=1", "checkpoint.every=2", "schedule.warmup_steps=0"]
    lab.train(lab.start("run", *options), at={4: interrupt()})
    before = content(lab.folder / "run")[:2], (lab.folder / "run" / "model" / "model.safetensors").read_bytes()
    run = lab.resume("run", "train.steps=40", "checkpoint.every=1")
    with torch.no_grad():  # as if a bad block of memory had done it
        trainer = Trainer(run, _Every({step: lambda: None for step in range(99)}))
        run.model.lm_head.weight[3, 3] = math.nan
    advice = r"loss was not finite in 5 steps in a row, last at step 9; resume .*optimizer\.lr=0\.0015"
    with pytest.raises(RunError, match=advice):
        trainer.train()
    assert (content(lab.folder / "run")[:2], (lab.folder / "run" / "model" / "model.safetensors").read_bytes()) == before
    assert sum(record.get("event") == "skipped" for record in read_metrics(run.path)) == 5
    lab.train(lab.resume("run", "optimizer.lr=0.0015"))


def test_an_absurd_weight_decay_ends_the_run(lab):
    with pytest.raises(RunError, match=r"not finite in 5 steps in a row, .*; begin anew with a lower rate .*, unless another"):
        lab.train(lab.start("run", "optimizer.weight_decay=1e22", "schedule.warmup_steps=0", "train.steps=50"))
    assert not (lab.folder / "run" / "model").exists() and checkpoints(lab.folder / "run") == []


def test_what_ends_a_run_is_told_not_what_its_saver_met_of_the_same(lab, monkeypatch):
    trainer = Trainer(lab.start("run"), Watcher())

    def failing(message):
        def fail(*_):
            raise RuntimeError(message)

        return fail

    monkeypatch.setattr(trainer, "step", failing("the others are gone"))
    monkeypatch.setattr(trainer.saver, "wait", failing("pair closure"))
    with pytest.raises(RuntimeError, match="the others are gone"):
        trainer.train()


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(lab, monkeypatch):
    lab.train(lab.start("whole", "checkpoint.every=3"))
    real, calls = checkpoint_module.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 4:  # the second checkpoint's second file
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(RunError, match=r"step-00000006: checkpoint not written, .*: the disk is full"):
            lab.train(lab.start("run", "checkpoint.every=3"))
    assert [path.name for path in (lab.folder / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    load(lab.folder / "run")
    lab.train(lab.resume("run"))
    assert content(lab.folder / "run") == content(lab.folder / "whole")


@pytest.mark.parametrize("how", ["removed", "renamed", "removed before the first step"])
def test_a_folder_that_is_gone_is_one_error(lab, monkeypatch, how):
    """TensorBoard's thread, which meets it too, has nothing to add."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    hook = threading.excepthook
    run = lab.start("run", "train.log_every=1", "checkpoint.every=100", "eval.every=100")

    def go() -> None:
        elsewhere = run.path.rename(lab.folder / "elsewhere")
        if how != "renamed":  # only now: TensorBoard's thread may open its file while a folder is emptied
            shutil.rmtree(elsewhere)

    if how == "removed before the first step":
        go()
    with pytest.raises(RunError, match=r"run: the run's folder is gone"):
        # TensorBoard writes when it will: the sleep lets it.
        Trainer(run, Watcher({3: go, 6: lambda: time.sleep(0.3)})).train()
    assert failed == [] and threading.excepthook is hook


def test_whatever_ends_a_run_a_checkpoint_on_its_way_is_completed(lab, monkeypatch):
    real, held = checkpoint_module.save_file, threading.Event()

    def slow(tensors, path, **options):
        assert held.wait(60)
        real(tensors, path, **options)

    def fail(self, batch):
        if self.progress.step == 4:
            threading.Timer(0.2, held.set).start()
            raise MemoryError
        return step(self, batch)

    step = Trainer.step
    monkeypatch.setattr(checkpoint_module, "save_file", slow)
    monkeypatch.setattr(Trainer, "step", fail)
    with pytest.raises(MemoryError):
        lab.train(lab.start("run", "checkpoint.every=3"))
    assert [path.name for path in (lab.folder / "run" / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("how", ["a checkpoint is due", "the run ends", "it is stopped"])
def test_weights_that_are_not_finite_push_out_none_that_are(lab, how):
    run = lab.start("run", "train.log_every=1", "checkpoint.every=4", "eval.every=100")

    def break_it() -> None:
        with torch.no_grad():
            trainer.model.norm.weight[0] = float("inf")
        if how == "it is stopped":
            os.kill(os.getpid(), signal.SIGTERM)

    step = {"a checkpoint is due": 8, "the run ends": 12, "it is stopped": 6}[how]
    trainer = Trainer(run, Watcher({step: break_it}))
    if how == "it is stopped":
        assert trainer.train().stopped == "SIGTERM"
    else:
        with pytest.raises(RunError, match=r"(are not finite after the last step|was not finite in 5 steps).*optimizer\.lr="):
            trainer.train()
    good = {8: 4, 12: 8, 6: 4}[step]
    assert [path.name for path in checkpoints(run.path)][-1] == f"step-{good:08}"
    assert load(run.path)[0].norm.weight.isfinite().all()
    assert any(record.get("event") == "unsaved" for record in read_metrics(run.path))


@pytest.mark.parametrize("how", ["the run ends", "it is stopped"])
def test_a_step_that_is_skipped_at_the_end_loses_nothing(lab, monkeypatch, how):
    """It has left the weights as they were."""
    last = 12 if how == "the run ends" else 7
    real, calls = objective.losses, []

    def once(*arguments, **options):
        calls.append(1)
        found = real(*arguments, **options)
        if len(calls) == last:
            found.main = found.main * math.nan
            if how == "it is stopped":
                os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(objective, "losses", once)
    run = lab.start("run", "train.log_every=1", "checkpoint.every=100")
    result, _ = lab.train(run)
    assert [record["step"] for record in read_metrics(run.path) if record.get("event") == "skipped"] == [last]
    assert [path.name for path in checkpoints(run.path)] == [f"step-{result.steps:08}"] and result.steps == last
    assert load(run.path)[0].norm.weight.isfinite().all()
