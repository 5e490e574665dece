import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from cadre.model.transformer import Transformer
from cadre.train.balance import Balance, bias_step
from cadre.train.loads import max_violation
from cadre.train.recipe import BalanceSection
from tests.shapes import small


def section(**changes) -> BalanceSection:
    return BalanceSection(**{"bias_speed": 0.1, "sequence_weight": 0.0, **changes})


@pytest.fixture
def model() -> Transformer:
    return Transformer(small("deepseek_v3", num_nextn_predict_layers=1)).initialize(0).train()


def test_the_loop_in_the_docs_trains(capsys):
    lines = (Path(__file__).parents[2] / "docs" / "balance.md").read_text(encoding="utf-8").splitlines()
    start, stop = lines.index("    import cadre, torch"), next(i for i, line in enumerate(lines) if "cadre.save(" in line)
    config = small("deepseek_v3")
    batches = [torch.arange(34).view(2, 17) % config.vocab_size] * 30
    names = {"config": config, "batches": batches}
    exec("\n".join(line.removeprefix("    ") for line in lines[start:stop]), names)
    assert names["loss"] < 0.9 * math.log(config.vocab_size)
    assert names["model"].layers[-1].mlp.gate.e_score_correction_bias.any()


def forward(model: Transformer, balance: Balance, seed: int, *, module: bool = True) -> list:
    """One micro-batch of 2 x 7 tokens, counted."""
    ids = torch.randint(model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    balance.record()
    hidden = model.hidden(ids)
    if module:
        model.mtp_hidden(hidden, ids, 0)
    recorded = balance.recorded(7)
    balance.count(recorded)
    return recorded


def biases(balance: Balance) -> list[torch.Tensor]:
    return [layer.gate.e_score_correction_bias.clone() for _, layer in balance.layers]


def test_loads_add_up_over_micro_batches(model):
    balance = Balance(model, section())
    assert [layer for layer, _ in balance.layers] == [1, 2]  # the second is the multi-token prediction block's
    expected, squares = np.zeros((2, 6)), [0.0, 0.0]
    for seed in range(3):
        for one in forward(model, balance, seed):
            assert one.sequences == 2
            for expert in one.routes.expert_TK.flatten().tolist():
                expected[one.layer, expert] += 1
            squares[one.layer] += float(one.routes.logit_TE.detach().square().sum())
    assert balance.load_LE.tolist() == expected.tolist()
    assert (balance.load_LE.sum(dim=1) == 3 * 2 * 7 * 2).all()
    balance.update()
    metrics = balance.metrics()
    assert metrics["load_layers"] == [1, 2]
    assert metrics["load"] == [pytest.approx(row) for row in expected / 84]
    assert metrics["max_vio"] == metrics["max_vio_window"] == [pytest.approx(6 * max(r) / 84 - 1, abs=1e-4) for r in expected]
    assert metrics["logit_scale"] == [pytest.approx((s / (3 * 14 * 6)) ** 0.5, rel=1e-2) for s in squares]
    assert all(0 < evenness < 1 for evenness in metrics["load_entropy"])
    assert metrics["bias_range"] == [pytest.approx(0.2)] * 2  # some up, some down
    balance.reset()
    assert (balance.load_LE == 0).all()


def test_the_window_is_all_steps_since_it_was_closed_and_survives_in_the_state(model):
    balance = Balance(model, section())
    total = torch.zeros(2, 6, dtype=torch.int64)
    for seed in range(3):
        balance.reset()
        forward(model, balance, seed)
        balance.update()
        total += balance.load_LE
    assert torch.equal(balance.window_LE, total) and balance.window_steps == 3
    assert balance.metrics()["max_vio_window"] == pytest.approx(max_violation(total), abs=1e-4)
    other = Balance(model, section())
    other.restore(balance.state())
    assert torch.equal(other.window_LE, total) and other.window_steps == 3
    balance.close_window()
    assert (balance.window_LE == 0).all() and balance.window_steps == 0


def test_dead_experts_are_counted_over_the_window(model):
    balance = Balance(model, section(bias_speed=0.0))
    for busy in range(3):
        balance.load_LE.zero_()
        balance.load_LE[:, busy] = 50
        balance.update()
    assert balance.metrics()["dead_experts"] == [3, 3]


def test_routes_are_heard_once(model):
    balance = Balance(model, section())
    assert len(forward(model, balance, 0)) == 2
    assert balance.recorded(7) == []
    model.hidden(torch.zeros(1, 7, dtype=torch.int64))  # not recorded
    assert balance.recorded(7) == []


def step(model: Transformer, balance: Balance) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Loads, gradients and biases of a step of two micro-batches, of which the second does not train the module."""
    model.zero_grad()
    balance.reset()
    for seed in range(2):
        recorded = forward(model, balance, seed, module=seed == 0)
        sum(weight * value for _, weight, value in balance.weighted_losses(recorded)).backward()
    balance.update()
    return balance.load_LE.clone(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, biases(balance)


def test_what_a_backward_pass_computes_again_is_not_counted_again(model):
    weights = dict(sequence_weight=0.3, batch_weight=0.2, global_weight=0.1, z_weight=0.1)
    plain = step(model, Balance(model, section(**weights)))
    again = Transformer(model.config).initialize(0).train()
    computed = []
    for block in [*again.layers, again.mtp[0].block]:

        def recompute(*arguments, block=block, forward=block.forward):
            return checkpoint(lambda *a: (computed.append(block.index), forward(*a))[1], *arguments, use_reentrant=False)

        block.forward = recompute
    balance = Balance(again, section(**weights))
    recomputed = step(again, balance)
    assert (computed.count(1), computed.count(2)) == (4, 2)  # layer 1 in two micro-batches, the module in one, all twice
    assert torch.equal(recomputed[0], plain[0])
    assert recomputed[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(recomputed[1][name], gradient, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(recomputed[2], plain[2], strict=True))
    assert all(layer.routes is None for _, layer in balance.layers)  # nor does it keep memory


# ------------------------------------------------------------------------------------------------- biases


@given(st.lists(st.integers(0, 40), min_size=2, max_size=9).filter(any))
def test_bias_rules_are_their_formulas(load):
    mean = sum(load) / len(load)
    sign = [(x < mean) - (x > mean) for x in load]
    assert bias_step("sign", torch.tensor([load]))[0].tolist() == sign
    proportional = bias_step("proportional", torch.tensor([load]))[0]
    assert proportional.tolist() == pytest.approx([(mean - x) / max(mean, 1) for x in load], abs=1e-6)
    assert float(proportional.sum()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("rule, moves", [
    ("sign", [-0.25, 0.25, 0, 0, -0.25, 0.25]),
    ("proportional", [-0.3125, 0.1875, 0, 0, -0.125, 0.25]),
    ("none", [0] * 6),
])  # fmt: skip
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_bias_moves_once_a_step_towards_the_idle(model, micro_batches, rule, moves):
    balance = Balance(model, section(bias_speed=0.25, bias_update=rule))
    before = biases(balance)
    for seed in range(micro_batches):
        forward(model, balance, seed)
    balance.load_LE.copy_(torch.tensor([[9, 1, 4, 4, 6, 0], [2, 2, 2, 2, 2, 2]]))
    balance.update()
    after = [new - old for new, old in zip(biases(balance), before, strict=True)]
    assert after[0].tolist() == pytest.approx(moves)  # the mean is 4
    assert after[1].tolist() == [0] * 6


def test_biases_slow_down_with_the_learning_rate(model):
    moved = []
    for factor in (1.0, 0.25):
        balance = Balance(model, section(bias_speed=0.25))
        before = biases(balance)
        balance.load_LE.copy_(torch.tensor([[9, 1, 4, 4, 6, 0], [2, 2, 2, 2, 2, 2]]))
        balance.update(factor)
        moved.append((biases(balance)[0] - before[0]).tolist())
    assert moved[0] != [0] * 6 and moved[1] == pytest.approx([step / 4 for step in moved[0]], abs=1e-6)


def test_speed_zero_and_routers_without_bias_stay_as_they_are(model):
    still = Balance(model, section(bias_speed=0.0))
    forward(model, still, 0)
    still.update()
    assert all((bias == 0).all() for bias in biases(still))
    softmax = Transformer(small("deepseek_v2")).initialize(0).train()
    balance = Balance(softmax, section())
    balance.record()
    softmax.hidden(torch.zeros(1, 3, dtype=torch.int64))
    balance.count(balance.recorded(3))
    balance.update()
    assert balance.load_LE[0].sum() == 6
    assert balance.metrics()["bias_range"] == [None]


def test_a_bias_that_is_not_used_is_zero_in_the_model(model):
    for _, layer in model.sparse_layers():
        layer.gate.e_score_correction_bias.normal_()
    balance = Balance(model, section(use_bias=False, bias_update="none"))
    balance.reset()
    (recorded, *_) = forward(model, balance, 0)
    bare = recorded.routes.score_TE.topk(2).indices.sort(dim=1).values
    assert torch.equal(recorded.routes.expert_TK.sort(dim=1).values, bare)
    balance.update()
    assert all((bias == 0).all() for bias in biases(balance))


def test_a_dense_model_has_nothing_to_balance():
    model = Transformer(small("llama")).initialize(0)
    balance = Balance(model, BalanceSection())
    balance.reset()
    balance.record()
    balance.update()
    assert (balance.recorded(7), balance.weighted_losses([]), balance.metrics(), balance.window_steps) == ([], [], {}, 0)
    balance.restore(balance.state())


@pytest.mark.parametrize("rule, speed", [("sign", 0.01), ("proportional", 0.02)])
def test_biases_even_out_a_skewed_router(rule, speed):
    model = Transformer(small("deepseek_v3", hidden_size=24)).initialize(0).train()
    ((_, layer),) = model.sparse_layers()
    torch.manual_seed(0)
    with torch.no_grad():
        layer.gate.weight.normal_(std=0.1)
    x = torch.randn(512, 24)
    x += 6 * layer.gate.weight[0] / layer.gate.weight[0].norm()  # all tokens lean towards expert 0
    balance = Balance(model, section(bias_speed=speed, bias_update=rule))
    violations = []
    for _ in range(60):
        balance.reset()
        balance.record()
        layer(x[None])
        balance.count(balance.recorded(512))
        violations.append(float(max_violation(balance.load_LE[0])))
        balance.update()
    assert violations[0] > 1.5
    assert max(violations[-5:]) < 0.3
