import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.model import attention, experts, layers, transformer
from cadre.model.experts import Routes
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from cadre.train import objective
from cadre.train.bench import profile as module
from cadre.train.bench.profile import (
    ATTENTION,
    DENSE,
    DISPATCH,
    EXPERTS,
    HEAD,
    NORMS,
    OPTIMIZER,
    OTHER,
    PARTS,
    ROUTER,
    bench_profile,
    counted,
    profiled_step,
    watched,
)
from cadre.train.bench.step import TrainingStep
from tests.shapes import configs, small

CPU = torch.device("cpu")
FULL = small("deepseek_v3", num_nextn_predict_layers=1)


def training(config=FULL, dtype=torch.float32):
    return TrainingStep(config, batch=2, seq_len=6, dtype=dtype, device=CPU)


class Clock:
    """Stands still but for what `slow` makes of it."""

    now = 0.0
    calls = 0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def slow(function, clock):
    """The function as it is, its results a second later and their gradients ten."""

    class Wait(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            clock.now += 10
            return grad

    @functools.wraps(function)
    def run(*arguments, **named):
        output = function(*arguments, **named)
        clock.now += 1
        clock.calls += 1
        if isinstance(output, Routes):
            output.weight_TK = Wait.apply(output.weight_TK)
            return output
        return Wait.apply(output)

    return run


@pytest.mark.parametrize("owner, name, part, calls", [
    (attention.LatentAttention, "forward", ATTENTION, 3),
    (experts.Router, "forward", ROUTER, 2),
    (experts.MixtureOfExperts, "forward", DISPATCH, 2),
    (experts.Experts, "forward", EXPERTS, 2),
    (layers.SwiGLU, "forward", DENSE, 3),
    (transformer.Block, "forward", NORMS, 3),
    (transformer.MultiTokenPredictor, "forward", NORMS, 1),
    (transformer.Transformer, "embed", HEAD, 2),
    (objective, "linear_cross_entropy", HEAD, 2),
])  # fmt: skip
def test_time_spent_in_a_part_is_charged_to_it_forward_and_backward(monkeypatch, clock, owner, name, part, calls):
    """Two blocks, the first one dense, and a predictor's block with experts."""
    step = training()
    monkeypatch.setattr(owner, name, slow(getattr(owner, name), clock))
    seconds = profiled_step(step)
    assert clock.calls == calls
    assert seconds == {**dict.fromkeys(PARTS, 0.0), part: 11.0 * calls}


def test_rows_that_no_kernel_moves_are_dispatch_and_combine(monkeypatch, clock):
    step = training()
    monkeypatch.setattr(experts.Experts, "moves_rows", lambda *_: False)
    monkeypatch.setattr(experts, "combine", slow(experts.combine, clock))
    assert profiled_step(step) == {**dict.fromkeys(PARTS, 0.0), DISPATCH: 22.0}


def test_bytes_of_rows_count_only_where_no_kernel_moves_them(monkeypatch):
    model = Transformer(FULL)
    for moves in (True, False):
        monkeypatch.setattr(experts.Experts, "moves_rows", lambda *_, moves=moves: moves)
        assert (DISPATCH in counted(model, 2, 5)) != moves


def test_gradients_in_bfloat16_pass_through_casts_and_stay_with_their_part(monkeypatch, clock):
    step = training(dtype=torch.bfloat16)
    monkeypatch.setattr(experts.Experts, "forward", slow(experts.Experts.forward, clock))
    assert profiled_step(step)[EXPERTS] == 22.0


@pytest.mark.parametrize("family", ["glm4_moe", "llama"])
def test_grouped_attention_is_attention_too(monkeypatch, clock, family):
    step = training(small(family))
    monkeypatch.setattr(attention.GroupedQueryAttention, "forward", slow(attention.GroupedQueryAttention.forward, clock))
    assert profiled_step(step) == {**dict.fromkeys(PARTS, 0.0), ATTENTION: 22.0}


def test_what_surrounds_the_model_is_optimizer_or_other(monkeypatch, clock):
    step = training()
    for name, method, seconds in (("update", step.update, 5), ("loss", step.loss, 3)):

        def later(*arguments, method=method, seconds=seconds):
            clock.now += seconds
            return method(*arguments)

        monkeypatch.setattr(step, name, later)
    assert profiled_step(step) == {**dict.fromkeys(PARTS, 0.0), OPTIMIZER: 5.0, OTHER: 3.0}


def test_the_parts_are_the_whole_step():
    step = training()
    profiled_step(step)
    start = module.time.perf_counter()
    seconds = profiled_step(step)
    elapsed = module.time.perf_counter() - start
    assert all(value > 0 for value in seconds.values())
    assert 0.5 * elapsed < sum(seconds.values()) < elapsed  # the rest makes the tokens and takes the hooks away


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_watching_changes_nothing_and_leaves_nothing_behind():
    plain, seen = training(), training()
    function, ids = objective.linear_cross_entropy, plain.tokens()
    for step in (plain, seen):
        step.tokens = lambda: ids
    for _ in range(2):
        plain()
        profiled_step(seen)
    for (name, one), other in zip(plain.model.named_parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert hooks(seen.model) == 0 and objective.linear_cross_entropy is function and "embed" not in vars(seen.model)


def test_what_fails_while_watched_leaves_nothing_behind():
    step, function = training(), objective.linear_cross_entropy
    with pytest.raises(RuntimeError, match="broken"), watched(step.model, module.Ledger(CPU)):
        assert hooks(step.model) > 0 and objective.linear_cross_entropy is not function
        raise RuntimeError("broken")
    assert hooks(step.model) == 0 and objective.linear_cross_entropy is function and "embed" not in vars(step.model)


@given(configs(), st.integers(1, 3), st.integers(2, 8))
def test_the_flops_of_the_parts_are_those_counted(config, batch, seq_len):
    """Vectors count in `cadre.count` as what each token passes, but no part is about them."""
    with torch.device("meta"):
        model = Transformer(config)
    work = counted(model, batch, seq_len)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    vectors += sum(layer.gate.weight.shape[0] for _, layer in model.sparse_layers() if config.scoring_func == "sigmoid")
    total = sum(amount for unit, amount in work.values() if unit == "flops")
    expected = count(config, context=seq_len).training_flops_per_token - 6 * vectors
    assert total == pytest.approx(batch * seq_len * expected, rel=1e-9)
    assert (EXPERTS in work) == (ROUTER in work) == (DISPATCH in work) == config.has_experts


def test_bytes_are_those_of_one_pass_over_each_operand():
    config = small("deepseek_v3", num_hidden_layers=3)
    model = Transformer(config)
    model.compute_dtype = torch.bfloat16
    work = counted(model, 2, 5)
    row = 24 * 2
    # Gathering reads 10 tokens and writes 20 rows; adding up the reverse; backward the same, with the outputs once more.
    assert work[DISPATCH] == ("bytes", 2 * ((10 + 20) + (20 + 10) + (10 + 20 + 20) + (20 + 10)) * row)
    assert work[NORMS] == ("bytes", 10 * row * (3 * (2 * 5 + 2 * 6) + 5))
    parameters = sum(p.numel() for p in Transformer(config).parameters())
    assert work[OPTIMIZER] == ("bytes", 4 * parameters * 10)


def test_a_profile_holds_each_part_against_its_limit(monkeypatch):
    flops, moved = iter([1e9, 2e9]), iter([4e9, 3e9])
    monkeypatch.setattr(module, "gemm_flops_per_second", lambda *_: next(flops))
    monkeypatch.setattr(module, "memory_bytes_per_second", lambda *_: next(moved))
    scripted = iter([dict.fromkeys(PARTS, 1.0), dict.fromkeys(PARTS, 3.0), {**dict.fromkeys(PARTS, 2.0), OTHER: 4.0}])
    monkeypatch.setattr(module, "profiled_step", lambda step: next(scripted))
    plain = iter([9.0, 9.0, 19.0, 18.0, 20.0])
    monkeypatch.setattr(TrainingStep, "__call__", lambda step: next(plain))
    notes = []
    found = bench_profile(FULL, batch=2, seq_len=6, steps=3, dtype=torch.float32, note=notes.append)
    parts = {part["part"]: part for part in found["parts"]}
    assert list(parts) == list(PARTS)
    assert found["watched_seconds"] == 20.0 and found["step_seconds_median"] == 19.0  # the median ones
    assert found["difference"] == pytest.approx(1 / 19) and found["distorted"] is True
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert parts[OTHER] == {"part": OTHER, "seconds": 4.0, "share": 0.2}
    work = counted(Transformer(FULL), 2, 6)
    for name, unit, limit in ((EXPERTS, "flops", 2e9), (OPTIMIZER, "bytes", 4e9)):
        rate = work[name][1] / 2.0
        assert parts[name] == {"part": name, "seconds": 2.0, "share": 0.1, "unit": unit, "achieved_per_second": rate,
                               "limit_per_second": limit, "of_limit": rate / limit}  # fmt: skip
    assert len(notes) == 3
