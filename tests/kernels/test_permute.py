from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.testing import assert_close

from cadre.kernels.permute import (
    gather_rows,
    gather_rows_reference,
    sort_choices,
    sort_choices_by_digits,
    sort_choices_reference,
    sum_choices,
    sum_choices_reference,
)

SORT = [sort_choices, sort_choices_reference, sort_choices_by_digits]
GATHER = [gather_rows, gather_rows_reference]
SUM = [sum_choices, sum_choices_reference]


@dataclass
class Routing:
    """T tokens with K distinct experts each, rows sorted by expert."""

    experts: int
    expert_TK: Tensor
    row_TK: Tensor
    token_R: Tensor


def routing(tokens: int, choices: int, experts: int, seed: int, crowded: bool = False) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(tokens, experts, generator=generator)
    if crowded:
        score_TE[:, :choices] += 1  # everyone wants the same experts
    expert_TK = score_TE.topk(choices, dim=1).indices
    order_R = expert_TK.flatten().argsort(stable=True)
    row_TK = order_R.argsort().view(tokens, choices)
    return Routing(experts, expert_TK, row_TK, order_R // choices)


@st.composite
def routings(draw: DrawFn) -> Routing:
    experts = draw(st.integers(1, 7))
    choices = draw(st.integers(1, experts))
    return routing(draw(st.integers(1, 9)), choices, experts, draw(st.integers(0, 999)), draw(st.booleans()))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@given(routings())
def test_choices_are_sorted_by_expert_tokens_in_order(routing: Routing):
    for sort in SORT:
        row_TK, token_R, load_E = sort(routing.expert_TK, routing.experts)
        assert torch.equal(row_TK, routing.row_TK) and torch.equal(token_R, routing.token_R)
        assert torch.equal(load_E, torch.bincount(routing.expert_TK.flatten(), minlength=routing.experts))


@pytest.mark.parametrize("sort", SORT)
def test_sorting_by_hand(sort):
    """Choices that lie strided, and an expert that nobody wants."""
    expert_TK = torch.tensor([[3, 0], [0, 1]]).T.contiguous().T
    row_TK, token_R, load_E = sort(expert_TK, 5)
    assert (row_TK.tolist(), token_R.tolist(), load_E.tolist()) == ([[3, 0], [1, 2]], [0, 1, 1, 0], [2, 1, 0, 1, 0])


@pytest.mark.parametrize("experts", [256, 257, 2**15 - 1])
def test_sorting_among_many_experts(experts):
    expert_TK = torch.randint(experts, (500, 4), generator=torch.Generator().manual_seed(0))
    expert_TK[0] = experts - 1
    for one, other in zip(sort_choices_by_digits(expert_TK, experts), sort_choices_reference(expert_TK, experts), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.int64


@pytest.mark.parametrize("sort", SORT)
def test_sorting_no_tokens(sort):
    row_TK, token_R, load_E = sort(torch.empty(0, 2, dtype=torch.int64), 3)
    assert (row_TK.shape, token_R.shape, load_E.tolist()) == ((0, 2), (0,), [0, 0, 0])


@given(routings(), st.integers(1, 9))
def test_gather_rows_equals_its_reference_in_value_and_gradient(routing: Routing, hidden):
    x = random(len(routing.row_TK), hidden)
    outputs = [gather(x, routing.token_R, routing.row_TK) for gather in GATHER]
    assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    direction = random(*outputs[0].shape, seed=1).detach()
    ours, reference = (torch.autograd.grad(output, x, direction)[0] for output in outputs)
    assert_close(ours, reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gather", GATHER)
def test_gather_rows_by_hand(gather):
    """Token 0 goes to experts 0 and 2, token 1 to 0 and 1: rows 0, 1 of expert 0, row 2 of 1, row 3 of 2."""
    x = torch.tensor([[1.0], [10.0]], requires_grad=True)
    rows = gather(x, torch.tensor([0, 1, 1, 0]), torch.tensor([[0, 3], [1, 2]]))
    assert rows.flatten().tolist() == [1, 10, 10, 1]
    rows.backward(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert x.grad.flatten().tolist() == [1 + 4, 2 + 3]


@given(routings(), st.integers(1, 9))
def test_sum_choices_equals_its_reference_in_value_and_gradient(routing: Routing, hidden):
    y, weight = random(routing.row_TK.numel(), hidden), random(*routing.row_TK.shape, seed=2)
    outputs = [combine(y, weight, routing.row_TK, routing.token_R) for combine in SUM]
    assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    direction = random(*outputs[0].shape, seed=1).detach()
    ours, reference = (torch.autograd.grad(output, (y, weight), direction) for output in outputs)
    for got, want in zip(ours, reference, strict=True):
        assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("combine", SUM)
def test_sum_choices_by_hand(combine):
    y = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    weight = torch.tensor([[0.5, 0.25], [2.0, 3.0]], requires_grad=True)
    total = combine(y, weight, torch.tensor([[0, 3], [1, 2]]), torch.tensor([0, 1, 1, 0]))
    assert total.flatten().tolist() == [0.5 * 1 + 0.25 * 4, 2 * 2 + 3 * 3]
    total.backward(torch.tensor([[1.0], [10.0]]))
    assert y.grad.flatten().tolist() == [0.5, 20.0, 30.0, 0.25]
    assert weight.grad.tolist() == [[1.0, 4.0], [20.0, 30.0]]


@pytest.mark.parametrize("combine", SUM)
@given(routing=routings(), hidden=st.integers(1, 9))
def test_sum_choices_in_bfloat16_stays_near_float64(combine, routing: Routing, hidden):
    y = random(routing.row_TK.numel(), hidden, dtype=torch.bfloat16)
    weight = torch.rand(routing.row_TK.shape).requires_grad_()
    total = combine(y, weight, routing.row_TK, routing.token_R)
    assert total.dtype == torch.bfloat16
    y64, weight64 = (x.detach().double().requires_grad_() for x in (y, weight))
    want = sum_choices_reference(y64, weight64, routing.row_TK, routing.token_R)
    # Weights, products and sums each round to 8 bits, at most K times at the size of the largest term.
    slack = 2**-7 * (1 + routing.row_TK.shape[1]) * 3
    assert_close(total.double(), want, atol=slack, rtol=2**-6)
    direction = torch.randn(total.shape).bfloat16()
    y_grad, weight_grad = torch.autograd.grad(total, (y, weight), direction)
    y_want, weight_want = torch.autograd.grad(want, (y64, weight64), direction.double())
    assert (y_grad.dtype, weight_grad.dtype) == (torch.bfloat16, torch.float32)
    assert_close(y_grad.double(), y_want, atol=2**-6, rtol=2**-6)
    assert_close(weight_grad.double(), weight_want, atol=2**-5 * hidden**0.5, rtol=2**-5)


def test_gradcheck():
    routed = routing(3, 2, 4, seed=5)
    x, weight = random(3, 2, dtype=torch.float64), random(3, 2, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, routed.token_R, routed.row_TK), x)
    y = random(6, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y, w: sum_choices(y, w, routed.row_TK, routed.token_R), (y, weight))


@pytest.mark.parametrize("combine", SUM)
def test_incoming_gradient_is_left_alone(combine):
    """Backward may not write into the gradient it is given: others read it too."""
    routed = routing(4, 2, 5, seed=3)
    y, weight = random(8, 3), random(4, 2, seed=1)
    direction = random(4, 3, seed=2).detach()
    kept = direction.clone()
    combine(y, weight, routed.row_TK, routed.token_R).backward(direction)
    assert_close(direction, kept, rtol=0, atol=0)
