from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cadre.kernels import grouped as module
from cadre.kernels.grouped import expert_swiglu, expert_swiglu_reference


def through_torch(**given: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernels_take_rows", lambda *_, **__: False)
        return expert_swiglu(**given)


BACKENDS = [expert_swiglu, through_torch, expert_swiglu_reference]
# Widths in multiples of 16 bytes take the grouped product, the others do not.
WIDTHS = st.sampled_from([1, 3, 4, 7, 8, 12, 16])


def problem(load: list[int], hidden: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype).requires_grad_()

    return {
        "x_RD": matrix(sum(load), hidden),
        "load_E": torch.tensor(load),
        "gate_up_END": matrix(len(load), 2 * width, hidden, std=hidden**-0.5),
        "down_EDF": matrix(len(load), hidden, width, std=width**-0.5),
    }


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in given.items()}


def exact(x_RD: Tensor, load_E: Tensor, gate_up_END: Tensor, down_EDF: Tensor) -> Tensor:
    """Row by row: the expert of a row is the one in whose share of the rows it lies."""
    expert_R = torch.arange(len(load_E)).repeat_interleave(load_E)
    gate, up = torch.einsum("rd,rnd->rn", x_RD, gate_up_END[expert_R]).chunk(2, dim=-1)
    return torch.einsum("rf,rdf->rd", gate * gate.sigmoid() * up, down_EDF[expert_R])


def value_and_gradients(function, arguments: dict[str, Any]) -> list[Tensor]:
    output = function(**arguments)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    leaves = [v for v in arguments.values() if v.requires_grad]
    grads = torch.autograd.grad(output, leaves, direction, allow_unused=True, materialize_grads=True)
    return [output, *grads]


@pytest.mark.parametrize("backend", BACKENDS)
@given(load=st.lists(st.integers(0, 6), min_size=1, max_size=5), hidden=WIDTHS, width=WIDTHS, seed=st.integers(0, 999))
@example(load=[0, 0, 0], hidden=8, width=8, seed=0)  # no rows at all
@example(load=[0, 9, 0, 0], hidden=8, width=4, seed=0)  # everything to one expert
@example(load=[0, 0, 0, 5], hidden=16, width=8, seed=0)  # everything to the last
@example(load=[1], hidden=4, width=4, seed=0)  # one token, one expert
@example(load=[1, 0, 0, 0], hidden=8, width=8, seed=0)
@example(load=[1, 60, 1, 0, 1], hidden=12, width=16, seed=0)  # one expert overloaded
@example(load=[3, 0, 4], hidden=7, width=5, seed=0)  # odd widths
def test_value_and_gradients_equal_float64(backend, load, hidden, width, seed):
    given = problem(load, hidden, width, seed)
    want = value_and_gradients(exact, in_float64(given))
    for ours, truth in zip(value_and_gradients(backend, given), want, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), truth, atol=2e-5, rtol=1e-4)


@given(load=st.lists(st.integers(0, 6), min_size=1, max_size=5), hidden=WIDTHS, width=WIDTHS, seed=st.integers(0, 999))
def test_backends_agree_in_bfloat16(load, hidden, width, seed):
    """Both round at other moments; each must stay within bfloat16's error of the exact result."""
    given = problem(load, hidden, width, seed, torch.bfloat16)
    want = value_and_gradients(exact, in_float64(given))
    for backend in BACKENDS:
        for ours, truth in zip(value_and_gradients(backend, given), want, strict=True):
            assert ours.dtype == torch.bfloat16
            # Terms are of order 1, and a sum whose terms cancel keeps their rounding.
            scale = max(1.0, float(truth.detach().abs().max())) if truth.numel() else 1.0
            assert_close(ours.double(), truth, atol=2**-6 * scale, rtol=2**-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_masters_under_bfloat16_rows(backend):
    given = problem([3, 0, 5, 8], 16, 8)
    given["x_RD"] = given["x_RD"].detach().bfloat16().requires_grad_()
    output, x_grad, *weight_grads = value_and_gradients(backend, given)
    assert output.dtype == x_grad.dtype == torch.bfloat16
    assert {grad.dtype for grad in weight_grads} == {torch.float32}
    for ours, truth in zip([output, x_grad, *weight_grads], value_and_gradients(exact, in_float64(given)), strict=True):
        assert_close(ours.double(), truth, atol=2**-5 * float(truth.detach().abs().max()), rtol=2**-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_rows_get_zero_gradient(backend):
    given = problem([0, 4, 0], 8, 8)
    _, _, gate_up_grad, down_grad = value_and_gradients(backend, given)
    for grad in (gate_up_grad, down_grad):
        assert torch.all(grad[[0, 2]] == 0)
        assert grad[1].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_meet_their_own_expert_only(backend):
    given = problem([2, 3, 4], 8, 8)
    before = backend(**given)
    given["gate_up_END"].data[1] += 1.0
    changed = (backend(**given) - before).abs().amax(dim=1) > 0
    assert changed.tolist() == [False] * 2 + [True] * 3 + [False] * 4


def test_gradcheck():
    given = problem([2, 0, 3], 3, 5, dtype=torch.float64)
    leaves = given["x_RD"], given["gate_up_END"], given["down_EDF"]
    assert torch.autograd.gradcheck(lambda x, g, d: expert_swiglu_reference(x, given["load_E"], g, d), leaves)
