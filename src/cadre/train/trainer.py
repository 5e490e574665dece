"""The training loop: batches in, steps, evaluations, checkpoints, and a clean end however it comes."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch

from cadre.data.batches import REPEATED, Batch
from cadre.errors import DivergedError
from cadre.kernels.limits import gemm_flops_per_second, peak_memory_bytes, synchronize
from cadre.kernels.total_norm import total_norm
from cadre.plan.count import count
from cadre.train.balance import Balance
from cadre.train.boards import WeightsAndBiases
from cadre.train.checkpoint import Tensors, checkpoints, read_state
from cadre.train.collapse import CollapseAlarm
from cadre.train.evaluation import Evaluation
from cadre.train.metrics import MetricsLog, NoMetrics
from cadre.train.objective import MicroBatch, Step
from cadre.train.optimizer import Optimizer
from cadre.train.qk_clip import QKClip
from cadre.train.run import BEGUN_WITH, Run, only_writer
from cadre.train.saving import Saver
from cadre.train.schedule import rate

# A step whose loss or gradient is not finite is skipped; this many in a row end the run.
_SKIPS_ALLOWED = 5

# Held-out loss so far above its lowest is no noise of an evaluation.
_RISEN = 1.01

# Events that follow the checkpoint of a run's last step.
_LAST_WORDS = ("in part", "finished")

# `Result.stopped` of a process that got no signal itself: another process of the run did, or has ended.
OTHERS = "the end of another process"


class Observer(Protocol):
    """Whoever watches a run: the command line's progress line."""

    def record(self, record: dict[str, Any], total_steps: int) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """Watches a process that leaves the talking to the main one."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def record(self, record: dict[str, Any], total_steps: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass
class Progress:
    """Where a run stands; every checkpoint holds all of it.

    `seconds`: of the run so far by the clock, evaluations and saves included; `wall_seconds`, `cpu_seconds`: of its optimizer
    steps alone, by the clock and by the processors of all processes. `window`: for each step since the last logged one its
    losses: the main head's, one of each multi-token prediction module, and the balance losses that `columns` names. `balance`,
    `alarm`: the state of both, filled in when a checkpoint is saved. `lowest`: the lowest held-out bits per byte of an
    evaluation on the way, and its step. `risen`: the causes to which a rise above that has been put down so far."""

    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    skipped_in_row: int = 0
    columns: list[str] = field(default_factory=list)
    window: list[list[float]] = field(default_factory=list)
    batches: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    alarm: dict[str, Any] = field(default_factory=dict)
    lowest: list[float] = field(default_factory=list)
    risen: list[str] = field(default_factory=list)


@dataclass
class Result:
    """How a run ended. `stopped`: None after its last step, else the name of the signal that ended it early, or `OTHERS`.
    `read_share`: the share of the held-out text that the last evaluation has read. `best_step`: the step of the model that was
    kept as the best, if the recipe asks for one."""

    steps: int
    tokens: int
    seconds: float
    loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float
    mfu: float
    gemm_flops_per_second: float
    peak_memory_bytes: int
    total_flops: float
    stopped: str | None
    read_share: float = 1.0
    best_step: int | None = None


class Trainer:
    """Trains a `Run` to its last step, or until SIGINT, SIGTERM or SIGHUP, and leaves checkpoint and model on disk.

    `compared`: whether it is a run of a study. Then its last step is scored like those on the way, as the end of its curve, and
    training waits for every save, so that writing takes no time from the steps. `whole`: whether a run ends with an evaluation
    of all held-out text."""

    def __init__(self, run: Run, observer: Observer, *, compared: bool = False, whole: bool = True) -> None:
        self.run, self.observer, self.parallel = run, observer, run.parallel
        self.compared, self.whole = compared, whole
        self.recipe, self.model = run.recipe, run.model
        self.device = self.model.device
        self.model.compute_in(run.dtype, self.recipe.train.fp8_experts)
        self.optimizer = Optimizer(self.model, self.recipe.optimizer, self.parallel, narrow=run.dtype == torch.bfloat16)
        self.balance = Balance(self.model, self.recipe.balance, self.parallel)
        self.qk_clip = QKClip.of(self.model, self.recipe.optimizer.qk_clip, self.parallel)
        layers = [index for index, _ in self.balance.layers]
        self.alarm = CollapseAlarm(layers, self.recipe.balance, self.recipe.optimizer.router_lr_scale)
        seq_len = self.recipe.data.seq_len
        self.tokens_per_step = self.recipe.train.batch * seq_len
        self.own_T = self.parallel.own(seq_len)
        mine = self.recipe.train.batch // self.parallel.layout.readers
        self.micro_batch = min(self.recipe.train.micro_batch or mine, mine)
        cost = count(run.config, context=seq_len)
        self.mtp_rows, self.mtp_share = self.recipe.train.mtp_rows, self.recipe.train.mtp_rows_share
        self.flops_per_token = cost.training_flops(self.mtp_share)
        columns = [loss.key for loss in self.balance.losses]
        self.progress = Progress(total_steps=run.total_steps, columns=columns)
        self.metrics: MetricsLog | NoMetrics = NoMetrics()  # until `train` opens the log of the run
        self.began = time.perf_counter()  # the clock when `progress.seconds` was 0
        self.step_seconds: deque[float] = deque(maxlen=50)
        self.cpu_seconds = 0.0  # this process's, of the steps since the last save
        self.last_loss: float | None = None
        self.bits_per_byte: float | None = None
        self.evaluation = Evaluation(run)
        self.identity = run.identity()
        self.read_share = 1.0
        self.saver = Saver(observer.note, self.parallel.anyone)
        if run.checkpoint is not None:
            self._restore()

    # ------------------------------------------------------------------------------------------------- the loop

    def train(self) -> Result:
        """Run to the end. Raises `RunError` if the disk is full or the loss stays non-finite."""
        recipe, progress = self.recipe, self.progress
        resumed = progress.step if self.run.checkpoint is not None else None
        # Of several processes of a run the main one alone keeps others away.
        with only_writer(self.run.path) if self.parallel.main else nullcontext(), _StopSignals() as stop:
            if self.parallel.main:
                self.metrics = self._metrics(resumed)
            try:
                self.gemm_rate = self._gemm_rate()
                if resumed is not None:
                    self._event("resumed", f"from the checkpoint of step {resumed}")
                self.began = time.perf_counter() - progress.seconds
                if recipe.checkpoint.best and self._lacks_best():
                    progress.lowest = []  # of a model that nobody kept
                if resumed is None and self.run.source is not None:
                    self.evaluate(final=False)  # what training finds
                self._step_on(stop)
                stopped = (stop.signal or OTHERS) if progress.step < progress.total_steps else None
                self._end(stopped)
            except BaseException:
                with suppress(Exception):  # a process that is lost to this loop is lost to the saver too, which may say less
                    self.saver.wait()  # what is being written is sound
                raise
            finally:
                self.metrics.close()
        return self._result(stopped)

    def _step_on(self, stop: _StopSignals) -> None:
        """Steps, and after each what is due: to the last one, or until a signal."""
        recipe, progress, first = self.recipe, self.progress, self.progress.step + 1
        while progress.step < progress.total_steps and not self._stopping(stop):
            record = self.step(next(self.run.batches))
            if progress.step == first:  # the optimizer has its state now
                self.saver.prepare(self.parallel.tensors(self.model, self.optimizer))
            progress.batches = self.run.batches.state()
            self._fit_the_minutes()
            if progress.step % recipe.train.log_every == 0 or progress.step >= progress.total_steps:
                self._log(record)
            if progress.step >= progress.total_steps:
                break
            if progress.step % recipe.eval.every == 0:
                self.evaluate(final=False)
            # Only the newest checkpoints are kept: weights that give no finite loss must not push out those that did.
            if progress.step % recipe.checkpoint.every == 0 and not progress.skipped_in_row:
                self.save()

    def _end(self, stopped: str | None) -> None:
        """The last checkpoint and what is said beside it. `stopped`: by what, if the run is not done."""
        step = self.progress.step
        if stopped:
            self.saver.wait()  # what it was stopped for, if a checkpoint could not be written
            self._event("stopped", f"by {stopped} after step {step}")
        elif self.parallel.anyone(self.scores_excerpts_last()):
            self.evaluate(final=False)  # of the same text as those before; the checkpoint knows of it
        if not self.save() and not stopped:
            raise DivergedError(f"{self.run.path}: the weights are not finite after the last step; {self.remedy()}")
        self.saver.wait()
        if not stopped:
            if self.whole:
                self.evaluate(final=True)
            self._event("finished", f"{step} steps")

    def _metrics(self, resumed: int | None) -> MetricsLog:
        """The log of a run that goes on from step `resumed`, or begins: without what it will write again."""
        ends_here = self.progress.step >= self.progress.total_steps
        both = self.scores_excerpts_last()

        def again(record: dict[str, Any]) -> bool:
            # Everything else about the step of a checkpoint was written before it, and will not be written again.
            at_last = record.get("final") or (both and "bits_per_byte" in record) or record.get("event") in _LAST_WORDS
            return ends_here and bool(at_last)

        log = MetricsLog(self.run.path, resume_step=-1 if resumed is None else resumed, again=again)
        if self.recipe.train.wandb:
            settings = self.recipe.model_dump()
            log.boards.append(WeightsAndBiases(self.run.path, self.recipe.train.wandb, settings, self.observer.note))
        return log

    def scores_excerpts_last(self) -> bool:
        """Whether the last step is also scored on the text that evaluations on the way read: to find the lowest of them, or
        to show what training has made of the model that the run began with, or how it compares. (The score of all held-out text
        shows none of these: beginnings of documents are harder.)"""
        return self.compared or self.recipe.checkpoint.best or (self.run.path / BEGUN_WITH).is_file()

    def _stopping(self, stop: _StopSignals) -> bool:
        return self.parallel.anyone(stop.signal is not None or self.parallel.abandoned or self.saver.failed)

    def step(self, batch: Batch) -> dict[str, Any]:
        """One optimizer step over all micro-batches: losses, gradients, balance, update. Returns its record."""
        recipe, progress = self.recipe.train, self.progress
        start, cpu = time.perf_counter(), time.process_time()
        self.model.train()
        self.optimizer.zero_grad()
        self.balance.reset()
        if self.qk_clip is not None:
            self.qk_clip.reset()
        work = Step(
            list(self._micro_batches(batch)), self.balance, self.micro_batch / recipe.batch / self.parallel.layout.context,
            self._mtp_weight(), self.mtp_share,
        )  # fmt: skip
        if self.balance.globals and work.share < 1:
            self.parallel.collect_loads(self.model, work)
            self.parallel.add(*self.balance.collected_loads())
        totals = self.parallel.backward(self.model, work)
        self.parallel.add(totals, *self.balance.counters())
        sums = totals.tolist()
        norm = self.optimizer.clip(recipe.clip)
        factor = rate(self.recipe.schedule, progress.step, progress.total_steps)
        more: dict[str, float] = {}
        finite = math.isfinite(norm) and all(math.isfinite(value) for value in sums)
        if finite:
            self.balance.update(factor)
            self.optimizer.step(factor)
            if self.qk_clip is not None:
                more["attention_logit"] = self.qk_clip.clip()
            progress.skipped_in_row = 0
            progress.window.append(sums)
        progress.step += 1
        progress.tokens += self.tokens_per_step
        synchronize(self.device)
        self.step_seconds.append(time.perf_counter() - start)
        self.cpu_seconds += time.process_time() - cpu
        progress.wall_seconds += self.step_seconds[-1]
        progress.seconds = time.perf_counter() - self.began
        if not finite:
            self._skipped(sums)
        return {"grad_norm": norm, "learning_rate": self.optimizer.lr * factor, **more}

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        """On the device; the multi-token prediction modules are joined where they train any process's sequences."""
        micro, (reader, readers) = self.micro_batch, self.parallel.batch_part
        weights = self._weights(batch)
        dealt = [len(range(one, self.mtp_rows, readers)) for one in (reader, 0)]  # the first has as many as any
        for first in range(0, len(batch.ids), micro):
            rows = slice(first, first + micro)
            ids = torch.from_numpy(batch.ids[rows]).to(self.device)
            documents = None if batch.documents is None else torch.from_numpy(batch.documents[rows]).to(self.device)
            here, most = (min(max(count - first, 0), micro) for count in dealt)
            weight = None if weights is None else weights[rows].to(self.device)
            yield MicroBatch(ids, documents, here, most > 0, self.own_T, weight)

    def _weights(self, batch: Batch) -> torch.Tensor | None:
        """`MicroBatch.weight_BT` of the whole batch: tokens that are to be learned count alike, whoever reads them."""
        if batch.learned is None:
            return None
        learned_BT = torch.from_numpy(batch.learned)
        targets_BT = learned_BT[:, 1 : self.recipe.data.seq_len + 1]
        counts = torch.tensor([targets_BT.numel(), int(targets_BT.sum())], dtype=torch.float64)
        self.parallel.add(counts)
        every, counted = counts.tolist()
        return learned_BT.float() * (every / max(1.0, counted))

    def _skipped(self, sums: list[float]) -> None:
        progress = self.progress
        progress.skipped_in_row += 1
        what = "loss" if not all(math.isfinite(value) for value in sums) else "gradient"
        self._event("skipped", f"step {progress.step} skipped: its {what} is not finite")
        if progress.skipped_in_row >= _SKIPS_ALLOWED:
            raise DivergedError(
                f"{self.run.path}: the {what} was not finite in {_SKIPS_ALLOWED} steps in a row, last at step {progress.step}; "
                f"{self.remedy()}"
            )

    def remedy(self, ended: bool = False) -> str:
        """What to do about a run that has diverged; `ended`: to its last step, so that there is nothing to resume."""
        begun = not ended and (self.run.checkpoint is not None or checkpoints(self.run.path))
        how, lower = ("resume from the last checkpoint", 2) if begun else ("begin anew", 10)
        rate = f"--set optimizer.lr={self.optimizer.lr / lower:g}"
        return f"{how} with a lower rate ({rate}), unless another unusual setting is the cause"

    def _mtp_weight(self) -> float:
        """V3's schedule: the first weight for two thirds of the run (10T of 14.8T tokens), then the final one."""
        train = self.recipe.train
        late = self.progress.step >= self.progress.total_steps * 2 / 3
        return train.mtp_weight_final if late and train.mtp_weight_final is not None else train.mtp_weight

    def _gemm_rate(self) -> float:
        """Of all processes, measured at once, for they may share a machine."""
        self.parallel.anyone(False)  # a barrier
        return self._summed(gemm_flops_per_second(self.run.dtype, self.device))

    def _summed(self, value: float) -> float:
        """Over all processes."""
        total = torch.tensor(value, dtype=torch.float64)
        self.parallel.add(total)
        return float(total)

    # ------------------------------------------------------------------------------------------------- what is seen of it

    def _log(self, step_record: dict[str, Any]) -> None:
        progress = self.progress
        seconds = statistics.median(self.step_seconds)
        speed = self.tokens_per_step / seconds
        record: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        if progress.window:
            means = [statistics.fmean(column) for column in zip(*progress.window, strict=True)]
            self.last_loss, modules = means[0], len(self.model.mtp)
            record["loss"] = means[0]
            if modules:
                record["mtp_loss"] = means[1 : 1 + modules]
            record |= zip(progress.columns, means[1 + modules :], strict=True)
        record |= step_record
        record |= {
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / self.gemm_rate,
            "seconds": progress.seconds,
            "seconds_per_step": seconds,
        }
        record |= self.balance.metrics()
        progress.window = []
        self.metrics.write(record)
        self.observer.record(record, progress.total_steps)
        if self.balance.window_steps:
            load_LE = self.balance.window_LE.cpu()
            for event in self.alarm.check(
                progress.step, self.balance.window_steps, load_LE, record["bias_range"], record["logit_scale"]
            ):
                self._event(**event)
            self.balance.close_window()

    def evaluate(self, final: bool) -> None:
        """Bits per byte of held-out text, on the way or at last."""
        progress = self.progress
        if final:
            most, whole = self.evaluation.most_tokens(self._seconds_per_token()), self.evaluation.held_out["tokens"]
            if most < whole:
                self._event("in part", f"the last evaluation reads {most:,} of {whole:,} held-out tokens")
            done = self.evaluation.last(most)
        else:
            done = self.evaluation.on_the_way()
        if done is None:
            return
        self.bits_per_byte = bits_per_byte = done.score.bits_per_byte
        progress.seconds = time.perf_counter() - self.began
        record = {
            "step": progress.step, "tokens": progress.tokens, "bits_per_byte": bits_per_byte,
            "eval_seconds": done.seconds, "seconds": progress.seconds, "final": final,
        }  # fmt: skip
        if final and done.read_share < 1:
            record["part"] = self.read_share = done.read_share
        self.metrics.write(record)
        self.observer.record(record, progress.total_steps)
        if not final and math.isfinite(bits_per_byte):
            if not progress.lowest or bits_per_byte < progress.lowest[0]:
                progress.lowest = [bits_per_byte, progress.step]
                if self.recipe.checkpoint.best:
                    self._save_best()
            self._watch_for_rise(bits_per_byte)

    def _watch_for_rise(self, bits_per_byte: float) -> None:
        """Say it, once for each cause, when held-out loss is above the lowest of this run."""
        progress = self.progress
        lowest, step = progress.lowest
        passes = progress.tokens / len(self.run.data.train)
        cause = "text" if passes > REPEATED else "rate"
        if bits_per_byte > _RISEN * lowest and cause not in progress.risen:
            progress.risen.append(cause)
            why = {
                "text": f"the text, read {passes:,.1f} times, is being learned by heart; fewer steps or more text end lower",
                "rate": f"the learning rate may be too high; {self.remedy()}",
            }[cause]
            self._event("risen", f"held-out loss is {bits_per_byte:.4f} and was {lowest:.4f} at step {step:.0f}: {why}")

    def _seconds_per_token(self) -> float:
        """Of a training step; 0 before any has been timed."""
        return statistics.median(self.step_seconds) / self.tokens_per_step if self.step_seconds else 0.0

    def _event(self, event: str, message: str, **more: Any) -> None:
        self.metrics.write({"step": self.progress.step, "event": event, "message": message, **more})
        self.observer.note(message if event == "skipped" else f"{event} {message}")

    def _fit_the_minutes(self) -> None:
        """Give up the steps that the clock has no room for, or take them back, so that the schedule ends in time."""
        if self.recipe.train.minutes is not None:
            self.progress.total_steps = round(self.parallel.agree(self._steps_within(self.recipe.train.minutes)))

    def _steps_within(self, minutes: float) -> int:
        progress = self.progress
        if len(self.step_seconds) < 10 and progress.seconds < minutes * 30:
            return progress.total_steps  # the first steps are slow and say little, unless half the time is gone
        step_seconds = statistics.median(self.step_seconds)
        left = minutes * 60 - progress.seconds - self.evaluation.last_seconds(minutes, self._seconds_per_token())
        possible = progress.step + max(0, int(left / step_seconds))
        return max(progress.step, min(possible, self.recipe.train.most_steps))

    # ------------------------------------------------------------------------------------------------- what is kept of it

    def save(self) -> bool:
        """Checkpoint, then the model in the Hugging Face layout, written while training goes on. Raises `RunError` when the
        save before this one failed, as for a full disk. False: nothing is written, for weights that are not finite must not
        push out those that are."""
        train = self.recipe.train
        # One value that is not finite makes the norm so, in one pass over memory; and so do values whose squares are not.
        held = [value.detach() for value in self.parallel.held(self.model).values()]
        sound = math.isfinite(total_norm(held)) or all(value.isfinite().all() for value in held)
        if self.parallel.anyone(not sound):
            self._event("unsaved", f"step {self.progress.step}: its weights are not finite")
            return False
        self.progress.balance, self.progress.alarm = self.balance.state(), self.alarm.state()
        self.progress.cpu_seconds += self._summed(self.cpu_seconds)
        self.cpu_seconds = 0.0
        state = {**asdict(self.progress), "length": [train.steps, train.minutes], "identity": self.identity}
        tensors = self.parallel.tensors(self.model, self.optimizer)
        self.saver.save(tensors, partial(self._write, tensors, state))
        if self.compared:
            self.saver.wait()
        return True

    def _lacks_best(self) -> bool:
        return self.parallel.anyone(self.parallel.main and not (self.run.path / "best").is_dir())

    def _save_best(self) -> None:
        """The model, but no checkpoint: nothing goes on from here."""
        weights = self.parallel.tensors(self.model, self.optimizer).weights
        self.saver.save(Tensors(weights, {}), lambda copies: self._write_model("best", copies))

    def _write(self, tensors: Tensors, state: dict[str, Any], copies: Tensors) -> None:
        self.parallel.save_checkpoint(self.run.path, tensors, copies, state, self.recipe.checkpoint.keep)
        self._write_model("model", copies)

    def _write_model(self, folder: str, copies: Tensors) -> None:
        run = self.run
        path, tokenizer = run.path / folder, run.data.tokenizer
        template = run.data.chat_template
        self.parallel.save_model(self.model, copies.weights, path, tokenizer, run.dtype, run.like(), template)

    def _restore(self) -> None:
        assert self.run.checkpoint is not None
        state = read_state(self.run.checkpoint)
        self.parallel.load_checkpoint(self.run.checkpoint, self.model, self.optimizer)
        parts = {part.name: state[part.name] for part in fields(Progress) if part.name in state}
        columns = self.progress.columns
        self.progress = Progress(**{**parts, "total_steps": self.run.total_steps})
        if self.progress.columns != columns:  # other balance losses from here on
            self.progress.columns, self.progress.window = columns, []
        if self.progress.batches:
            self.run.batches.restore(self.progress.batches)
        if self.progress.balance:
            self.balance.restore(self.progress.balance)
            self.alarm.restore(self.progress.alarm)

    def _result(self, stopped: str | None) -> Result:
        progress = self.progress
        speed = self.tokens_per_step / statistics.median(self.step_seconds) if self.step_seconds else 0.0
        return Result(
            steps=progress.step,
            tokens=progress.tokens,
            seconds=progress.seconds,
            loss=self.last_loss,
            bits_per_byte=self.bits_per_byte,
            tokens_per_second=speed,
            mfu=speed * self.flops_per_token / self.gemm_rate,
            gemm_flops_per_second=self.gemm_rate,
            peak_memory_bytes=peak_memory_bytes(self.device),
            total_flops=progress.tokens * self.flops_per_token,
            stopped=stopped,
            read_share=self.read_share,
            best_step=int(progress.lowest[1]) if self.recipe.checkpoint.best and progress.lowest else None,
        )


class _StopSignals:
    """Within it, the first SIGINT, SIGTERM or SIGHUP (its terminal was closed) only leaves its name in `signal`; a second
    SIGINT interrupts at once. A SIGHUP that is ignored, as under nohup, stays so."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
