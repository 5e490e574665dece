import pytest
import torch

from cadre.errors import UsageError
from cadre.plan.count import count
from cadre.train.bench import step as module
from cadre.train.bench.step import TrainingStep, bench_train, changed, speed
from cadre.train.recipe import BalanceSection, OptimizerSection
from tests.shapes import small


def test_times_whole_optimizer_steps_after_two_that_warm_up(monkeypatch):
    """Every step computes losses, moves biases and updates weights; the GEMM rate is the larger of before and after."""
    calls, rates = [], iter([3e9, 5e9])
    real = module.losses

    def counted(model, micro, balance, **weights):
        calls.append((tuple(micro.ids_BT.shape), float(model.lm_head.weight.detach().double().sum()),
                      model.sparse_layers()[0][1].gate.e_score_correction_bias.clone()))  # fmt: skip
        return real(model, micro, balance, **weights)

    monkeypatch.setattr(module, "losses", counted)
    monkeypatch.setattr(module, "gemm_flops_per_second", lambda *_: next(rates))
    config = small("deepseek_v3", num_nextn_predict_layers=2)
    result = bench_train(config, batch=3, seq_len=10, steps=4, dtype=torch.float32)
    assert [shape for shape, *_ in calls] == [(3, 13)] * 6
    assert len({total for _, total, _ in calls}) == 6
    assert not torch.equal(calls[0][2], calls[1][2]) and not torch.equal(calls[4][2], calls[5][2])
    assert len(result["step_seconds"]) == 4 and result["gemm_flops_per_second"] == 5e9
    assert (result["batch"], result["seq_len"], result["dtype"], result["device"]) == (3, 10, "float32", "cpu")
    assert result["threads"] == torch.get_num_threads()


def test_a_dense_model_is_timed_the_same_way(monkeypatch):
    monkeypatch.setattr(module, "gemm_flops_per_second", lambda *_: 1e9)
    result = bench_train(small("llama"), batch=1, seq_len=4, steps=1, dtype=torch.bfloat16)
    assert result["dtype"] == "bfloat16" and result["tokens_per_second"] > 0


def test_speed_is_that_of_the_median_step():
    config = small("deepseek_v3")
    found = speed(config, batch=2, seq_len=8, seconds=[4.0, 0.5, 2.0])
    assert found["step_seconds_median"] == 2.0 and found["tokens_per_second"] == 8.0
    flops = count(config, context=8).training_flops_per_token
    assert found["training_flops_per_token"] == flops and found["model_flops_per_second"] == 8.0 * flops


def test_a_step_learns_what_it_sees_again():
    step = TrainingStep(small("deepseek_v3"), batch=2, seq_len=8, dtype=torch.float32, device=torch.device("cpu"))
    ids = step.tokens()
    step.tokens = lambda: ids
    first = step.loss(ids).item()
    for _ in range(20):
        step()
    assert step.loss(ids).item() < 0.9 * first


def test_a_recipe_may_say_what_trains_and_how(monkeypatch):
    """Its optimizer, its balance, the sequences of multi-token prediction; and an update at none of the learning rate."""
    given, real = [], module.losses

    def kept(model, micro, balance, **weights):
        given.append((micro.mtp_rows, weights["mtp_share"]))
        return real(model, micro, balance, **weights)

    monkeypatch.setattr(module, "losses", kept)
    muon, still = OptimizerSection(name="muon", lr=1e-2), BalanceSection(bias_update="none")
    step = TrainingStep(
        small("deepseek_v3", num_nextn_predict_layers=1), batch=4, seq_len=8, dtype=torch.float32, device=torch.device("cpu"),
        optimizer=muon, balance=still, mtp_rows=1,
    )  # fmt: skip
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.run_pass(step.tokens())
    step.update(0.0)
    assert given == [(1, 0.25)] and step.optimizer.lr == 1e-2 and step.balance.section is still
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert step() > 0 and not torch.equal(step.model.lm_head.weight, before["lm_head.weight"])


def test_a_change_is_checked():
    assert changed(small("llama"), vocab_size=7).vocab_size == 7
    with pytest.raises(UsageError, match="num_experts_per_tok is 9"):
        changed(small("deepseek_v3"), num_experts_per_tok=9)


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(UsageError, match="--seq 65: the model's context is 64"):
        bench_train(small("llama"), batch=1, seq_len=65, steps=1, dtype=torch.float32)
