import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.train.muon import Muon, orthogonalize


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.floats(0.2, 1), st.floats(1e-6, 1e6), st.integers(0, 999))
def test_singular_values_come_near_one(batch, rows, columns, least, size, seed):
    u, _, v = torch.linalg.svd(random(batch, rows, columns, seed=seed), full_matrices=False)
    values = torch.linspace(1, least, min(rows, columns)).expand(batch, -1)
    got = torch.linalg.svdvals(orthogonalize(size * (u * values[:, None, :]) @ v))
    assert got.min() > 0.6 and got.max() < 1.3


def test_keeps_the_directions():
    g = random(1, 6, 9)
    u, _, v = torch.linalg.svd(g[0], full_matrices=False)
    turned = u.T @ orthogonalize(g)[0] @ v.T
    off = turned - torch.diag(turned.diagonal())
    assert off.abs().max() < 1e-4 and turned.diagonal().min() > 0.3


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_a_batch_equals_one_by_one(shape):
    g = random(4, *shape)
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in g])
    torch.testing.assert_close(orthogonalize(g), alone, rtol=1e-5, atol=1e-6)


def test_a_zero_gradient_gives_a_zero_update():
    assert (orthogonalize(torch.zeros(2, 4, 5)) == 0).all()


def test_experts_are_separate_matrices():
    whole = random(3, 4, 6)
    parts = [matrix.clone() for matrix in whole]
    fused, separate = Muon([{"params": [whole]}], lr=0.1), Muon([{"params": parts}], lr=0.1)
    for step in range(3):
        whole.grad = random(3, 4, 6, seed=step + 1) * torch.tensor([1.0, 50.0, 0.01])[:, None, None]
        for part, gradient in zip(parts, whole.grad, strict=True):
            part.grad = gradient
        fused.step()
        separate.step()
    torch.testing.assert_close(whole, torch.stack(parts), rtol=1e-5, atol=1e-6)


def test_fused_matrices_step_as_separate_ones():
    whole = random(3, 8, 6)
    parts = [half.clone() for half in (whole[:, :4], whole[:, 4:])]
    fused = Muon([{"params": [whole], "fused": 2, "iterations": 3}], lr=0.1)
    separate = Muon([{"params": parts, "iterations": 3}], lr=0.1)
    whole.grad = random(3, 8, 6, seed=1) * torch.tensor([1.0] * 4 + [50.0] * 4)[None, :, None]
    for part, gradient in zip(parts, whole.grad.split(4, dim=1), strict=True):
        part.grad = gradient
    fused.step()
    separate.step()
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-6)


def test_one_step_by_hand():
    weight, gradient = random(4, 9), random(4, 9, seed=1)
    expected = weight * (1 - 0.1 * 0.5)
    momentum = 0.1 * gradient  # the first step's: zero, moved towards the gradient by 1 - 0.9
    nesterov = 0.1 * gradient + 0.9 * momentum
    expected -= 0.1 * 0.2 * 9**0.5 * orthogonalize(nesterov[None])[0]
    weight.grad = gradient
    Muon([{"params": [weight]}], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    torch.testing.assert_close(weight, expected)


def test_updates_have_the_size_of_adamws():
    for shape in [(32, 32), (64, 16), (3, 16, 64)]:
        weight = torch.zeros(shape)
        weight.grad = random(*shape)
        Muon([{"params": [weight]}], lr=1.0, weight_decay=0).step()
        assert 0.12 < weight.square().mean().sqrt() < 0.28


def test_parameters_without_gradient_stay():
    still, moving = random(3, 3), random(3, 3, seed=1)
    before = still.clone()
    moving.grad = random(3, 3, seed=2)
    optimizer = Muon([{"params": [still, moving]}], lr=0.1)
    optimizer.step()
    assert torch.equal(still, before) and list(optimizer.state) == [moving]


def test_in_place_and_in_batches_are_one_step(monkeypatch):
    shapes = [(6, 9), (9, 6), (6, 9), (3, 8, 5), (2, 8, 5)]
    results = []
    for in_place in (True, False):
        if not in_place:
            monkeypatch.setattr("cadre.train.muon.muon_in_place", lambda steps, narrow: False)
        parameters = [random(*shape, seed=index) for index, shape in enumerate(shapes)]
        groups = [{"params": parameters[:3]}, {"params": parameters[3:], "fused": 2, "iterations": 3, "lr": 0.05}]
        optimizer = Muon(groups, lr=0.1)
        for step in range(3):
            for index, parameter in enumerate(parameters):
                parameter.grad = random(*parameter.shape, seed=10 * step + index)
            optimizer.step()
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
