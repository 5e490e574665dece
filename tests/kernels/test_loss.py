"""The chunked loss against its plain reference, and against what it must never hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cadre.kernels import loss as module
from cadre.kernels.loss import linear_cross_entropy, linear_cross_entropy_reference


def problem(positions: int, hidden: int, words: int, seed: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(positions, hidden, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(words, hidden, generator=generator).requires_grad_()
    target = torch.randint(words, (positions,), generator=generator)
    weight = torch.rand(positions, generator=generator) * (torch.rand(positions, generator=generator) > 0.3)
    return h, w, target, weight


def through_torch(h, w, target, weight):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_kernels_take", lambda *_: False)
        return linear_cross_entropy(h, w, target, weight)


BACKENDS = [linear_cross_entropy, through_torch]


def value_and_gradients(function, h, w, target, weight):
    total = function(h, w, target, weight)
    return total.detach(), *torch.autograd.grad(total * 1.7, (h, w))


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.integers(1, 300), st.integers(1, 24), st.integers(2, 90), st.integers(0, 2**32), st.sampled_from([1, 5000]))
def test_equals_the_reference_in_value_and_gradient(backend, positions, hidden, words, seed, elements):
    inputs = problem(positions, hidden, words, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", elements)  # 1: chunks of the fewest rows
        got = value_and_gradients(backend, *inputs)
    for mine, plain in zip(got, value_and_gradients(linear_cross_entropy_reference, *inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_of_weight_zero_count_for_nothing(backend):
    h, w, target, weight = problem(50, 8, 20, seed=1)
    counted = weight > 0
    assert 0 < counted.sum() < len(weight)
    total, grad_h, grad_w = value_and_gradients(backend, h, w, target, weight)
    only = value_and_gradients(linear_cross_entropy_reference, h[counted], w, target[counted], weight[counted])
    torch.testing.assert_close(total, only[0])
    torch.testing.assert_close(grad_w, only[2], rtol=1e-4, atol=1e-5)
    assert (grad_h[~counted] == 0).all()
    nothing = value_and_gradients(backend, h, w, target, torch.zeros_like(weight))
    assert all((part == 0).all() for part in nothing)


def test_bfloat16_activations_stay_close_to_float32():
    h, w, target, weight = problem(200, 32, 100, seed=2, dtype=torch.bfloat16)
    got = value_and_gradients(linear_cross_entropy, h, w, target, weight)
    assert [part.dtype for part in got] == [torch.float32, torch.bfloat16, torch.float32]
    exact = value_and_gradients(linear_cross_entropy_reference, h.float().detach().requires_grad_(), w, target, weight)
    for mine, plain in zip(got, exact, strict=True):
        assert (mine.float() - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing_else(frozen):
    h, w, target, weight = problem(70, 8, 20, seed=3)
    expected = torch.autograd.grad(linear_cross_entropy(h, w, target, weight), (h, w))
    h, w = h.detach().requires_grad_(frozen == "head"), w.detach().requires_grad_(frozen == "hidden")
    total = linear_cross_entropy(h, w, target, weight)
    assert total.requires_grad == (frozen != "both")
    if frozen != "both":
        total.backward()
        side, wanted = (w, expected[1]) if frozen == "hidden" else (h, expected[0])
        torch.testing.assert_close(side.grad, wanted)


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation puts out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_never_holds_the_logits_of_all_positions(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    h, w, target, weight = problem(1024, 4, 300, seed=4)
    with _Largest() as largest:
        value_and_gradients(linear_cross_entropy, h, w, target, weight)
    assert largest.elements <= 64 * 300
    with _Largest() as largest:
        value_and_gradients(linear_cross_entropy_reference, h, w, target, weight)
    assert largest.elements >= 1024 * 300  # so the measure sees logits where there are some


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_without_gradients_the_loss_is_the_same_and_steep_logits_stay_finite(backend, scale):
    h, w, target, weight = problem(40, 8, 37, seed=5)
    h = (h.detach() * scale).requires_grad_()
    total, *gradients = value_and_gradients(backend, h, w, target, weight)
    torch.testing.assert_close(total, linear_cross_entropy_reference(h, w, target, weight).detach())
    assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        assert torch.equal(backend(h.detach(), w.detach(), target, weight), total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_reaches_the_loss(backend):
    h, w, target, _ = problem(4, 8, 37, seed=6)
    h = h.detach().index_fill(0, torch.tensor([2]), torch.nan)
    assert backend(h, w, target, torch.ones(4)).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 20])
def test_a_target_outside_the_vocabulary_is_refused(backend, wrong):
    h, w, target, weight = problem(4, 8, 20, seed=7)
    target[1] = wrong
    with pytest.raises((IndexError, RuntimeError)):
        backend(h, w, target, weight)
