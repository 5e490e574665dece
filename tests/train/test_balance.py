import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.model.experts import Routes
from cadre.model.transformer import Transformer
from cadre.train.balance import Balance, max_violation, sequence_balance_loss
from tests.shapes import small


def random_routes(tokens: int, experts: int, choices: int, seed: int) -> Routes:
    score_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    weight_TK, expert_TK = score_TE.detach().topk(choices)
    return Routes(expert_TK, weight_TK, score_TE)


def written_out(routes: Routes, sequences: int) -> torch.Tensor:
    """V3 report, equations 17 to 20, one sum at a time."""
    (tokens, experts), choices = routes.score_TE.shape, routes.expert_TK.shape[1]
    length = tokens // sequences
    total = torch.zeros(())
    for sequence in range(sequences):
        for i in range(experts):
            f, p = 0.0, torch.zeros(())
            for t in range(sequence * length, (sequence + 1) * length):
                f += experts / (choices * length) * (i in routes.expert_TK[t].tolist())
                p = p + routes.score_TE[t, i] / routes.score_TE[t].sum() / length
            total = total + f * p / sequences
    return total


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6), st.integers(1, 2), st.integers(0, 999))
def test_sequence_wise_loss_is_the_reports_formula(sequences, length, experts, choices, seed):
    routes = random_routes(sequences * length, experts, choices, seed)
    fast, slow = sequence_balance_loss(routes, sequences), written_out(routes, sequences)
    torch.testing.assert_close(fast, slow)
    gradients = [torch.autograd.grad(value, routes.score_TE)[0] for value in (fast, slow)]
    torch.testing.assert_close(*gradients)


def test_sequence_wise_loss_is_one_at_balance_and_more_beyond_it():
    even = Routes(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), torch.full((2, 4), 0.3))
    assert sequence_balance_loss(even, 1) == pytest.approx(1)
    # Balanced over the batch, but not within its two sequences.
    score = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]])
    split = Routes(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), score)
    assert sequence_balance_loss(split, 2) == pytest.approx(1.8)
    assert sequence_balance_loss(split, 1) == pytest.approx(1)


@pytest.mark.parametrize("load, violation", [([5, 5, 5], 0), ([9, 0, 0], 2), ([4, 2, 3, 3], 1 / 3), ([0, 0], -1)])
def test_max_violation_is_the_excess_of_the_busiest_over_the_mean(load, violation):
    assert max_violation(torch.tensor(load)) == pytest.approx(violation)


@pytest.fixture
def model() -> Transformer:
    return Transformer(small("deepseek_v3", num_nextn_predict_layers=1)).initialize(0).train()


def forward(model: Transformer, seed: int) -> None:
    ids = torch.randint(model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    model.further_hidden(model.hidden(ids), ids, 0)


def test_loads_add_up_over_micro_batches(model):
    balance = Balance(model, speed=0.1)
    assert [layer for layer, _ in balance.layers] == [1, 2]  # the second is the multi-token prediction block's
    expected = [torch.zeros(6, dtype=torch.int64) for _ in range(2)]
    for seed in range(3):
        forward(model, seed)
        routes = balance.read()
        for load, taken in zip(expected, routes, strict=True):
            for expert in taken.expert_TK.flatten().tolist():
                load[expert] += 1
    assert [load.tolist() for load in balance.load_LE] == [load.tolist() for load in expected]
    assert all(load.sum() == 3 * 2 * 7 * 2 for load in balance.load_LE)
    metrics = balance.metrics()
    assert metrics["load_layers"] == [1, 2]
    for share, vio, load in zip(metrics["load"], metrics["max_vio"], expected, strict=True):
        assert sum(share) == pytest.approx(1, abs=1e-4)
        assert share == pytest.approx((load / 84).tolist(), abs=1e-5)
        assert vio == pytest.approx(6 * max(share) - 1, abs=1e-3)
    balance.reset()
    assert all((load == 0).all() for load in balance.load_LE)


def test_routes_are_taken_once(model):
    balance = Balance(model, speed=0.1)
    forward(model, 0)
    balance.read()
    counted = [load.clone() for load in balance.load_LE]
    assert balance.read() == []
    assert all(torch.equal(a, b) for a, b in zip(counted, balance.load_LE, strict=True))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_bias_moves_once_a_step_towards_the_idle(model, micro_batches):
    balance = Balance(model, speed=0.25)
    before = [layer.gate.e_score_correction_bias.clone() for _, layer in balance.layers]
    for seed in range(micro_batches):
        forward(model, seed)
        balance.read()
    for load, wanted in zip(balance.load_LE, ([9, 1, 4, 4, 6, 0], [2, 2, 2, 2, 2, 2]), strict=True):
        load.copy_(torch.tensor(wanted))
    balance.update()
    moves = [layer.gate.e_score_correction_bias - old for (_, layer), old in zip(balance.layers, before, strict=True)]
    assert moves[0].tolist() == [-0.25, 0.25, 0, 0, -0.25, 0.25]  # the mean is 4
    assert moves[1].tolist() == [0] * 6


def test_speed_zero_and_routers_without_bias_stay_as_they_are(model):
    still = Balance(model, speed=0)
    forward(model, 0)
    still.read()
    still.update()
    assert all((layer.gate.e_score_correction_bias == 0).all() for _, layer in still.layers)
    softmax = Transformer(small("deepseek_v2")).initialize(0).train()
    balance = Balance(softmax, speed=1)
    softmax.hidden(torch.zeros(1, 3, dtype=torch.int64))
    balance.read()
    balance.update()
    assert balance.load_LE[0].sum() == 6


def test_a_dense_model_has_nothing_to_balance():
    balance = Balance(Transformer(small("llama")).initialize(0), speed=1)
    assert (balance.read(), balance.metrics()) == ([], {})


def test_biases_even_out_a_skewed_router():
    model = Transformer(small("deepseek_v3", hidden_size=24)).initialize(0).train()
    (_, layer), = model.sparse_layers()
    torch.manual_seed(0)
    with torch.no_grad():
        layer.gate.weight.normal_(std=0.1)
    x = torch.randn(512, 24)
    x += 6 * layer.gate.weight[0] / layer.gate.weight[0].norm()  # all tokens lean towards expert 0
    balance = Balance(model, speed=0.01)
    violations = []
    for _ in range(60):
        balance.reset()
        layer(x[None])
        balance.read()
        violations.append(max_violation(balance.load_LE[0]))
        balance.update()
    assert violations[0] > 1.5
    assert max(violations[-5:]) < 0.3
