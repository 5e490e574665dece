"""The C++ experts against float64: routed, as sorted rows, and as one dense layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from cadre.kernels.grouped import expert_swiglu_reference
from cadre.kernels.native.library import own_products_faster, training_kernels_take, training_library, why_missing
from cadre.kernels.permute import sort_choices
from cadre.kernels.routed import dense_swiglu, routed_swiglu, rows_swiglu


def test_the_kernels_are_had_here() -> None:
    assert training_library() is not None, why_missing()
    assert training_kernels_take(torch.zeros(1))


@pytest.mark.parametrize("other", [torch.zeros(1).double(), torch.zeros(1).bfloat16(), torch.zeros(1, device="meta")])
def test_what_is_not_float32_on_a_cpu_is_left_to_torch(other: Tensor) -> None:
    assert not training_kernels_take(other) and not training_kernels_take(torch.zeros(1), other)


def test_autocast_is_left_to_torch() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not training_kernels_take(torch.zeros(1))


@dataclass
class Problem:
    x_TD: Tensor
    weight_TK: Tensor
    row_TK: Tensor
    token_R: Tensor
    load_E: Tensor
    gate_up_END: Tensor
    down_EDF: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.weight_TK, self.gate_up_END, self.down_EDF]

    def run(self) -> Tensor:
        return routed_swiglu(*vars(self).values())

    def exact(self) -> list[Tensor]:
        """Value and gradients in float64."""
        x, weight, gate_up, down = (leaf.detach().double().requires_grad_() for leaf in self.leaves())
        rows = expert_swiglu_reference(x[self.token_R], self.load_E, gate_up, down)
        y = (rows[self.row_TK] * weight[..., None]).sum(dim=1)
        return [y, *torch.autograd.grad(y, (x, weight, gate_up, down), direction(y))]


def direction(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32).to(y.dtype)


def problem(tokens: int, choices: int, experts: int, hidden: int, width: int, seed: int = 0, crowd: float = 0.0) -> Problem:
    """crowd: how much more than the others expert 0 is wanted."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).requires_grad_()

    score_TE = torch.rand(tokens, experts, generator=generator)
    score_TE[:, 0] += crowd
    routing = sort_choices(score_TE.topk(choices, dim=1).indices, experts)
    return Problem(
        matrix(tokens, hidden), matrix(tokens, choices), *routing,
        matrix(experts, 2 * width, hidden, std=hidden**-0.5), matrix(experts, hidden, width, std=width**-0.5),
    )  # fmt: skip


def value_and_gradients(given: Problem) -> list[Tensor]:
    y = given.run()
    return [y, *torch.autograd.grad(y, given.leaves(), direction(y))]


def near(ours: list[Tensor], exact: list[Tensor]) -> None:
    for one, truth in zip(ours, exact, strict=True):
        assert one.dtype == torch.float32
        assert_close(one.double(), truth, atol=3e-5, rtol=1e-4)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    experts = draw(st.integers(1, 9))
    sizes = draw(st.integers(1, 40)), draw(st.integers(1, min(8, experts))), experts, draw(st.integers(1, 40))
    return problem(*sizes, draw(st.integers(1, 40)), draw(st.integers(0, 999)), draw(st.sampled_from([0.0, 2.0])))


@given(problems())
@example(problem(1, 1, 1, 1, 1))
@example(problem(3, 8, 8, 16, 16))  # every token at every expert
@example(problem(2, 1, 64, 17, 15))  # most experts without a row
def test_routed_equals_float64(given: Problem) -> None:
    near(value_and_gradients(given), given.exact())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("crowd", [0.0, 2.0])
def test_rows_of_many_blocks_and_slices_equal_float64(threads: int, crowd: float) -> None:
    """More rows than a block holds, and with `crowd` an expert with so many that threads share its gradient."""
    given = problem(1500, 2, 4, 20, 18, crowd=crowd)
    assert given.load_E.max() > (1400 if crowd else 600)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        once, again = value_and_gradients(given), value_and_gradients(given)
    finally:
        torch.set_num_threads(before)
    exact = given.exact()
    for one, other, truth in zip(once, again, exact, strict=True):
        assert torch.equal(one, other)
        assert_close(one.double(), truth, atol=1e-5 * float(truth.detach().abs().max()), rtol=1e-4)


def shared_experts(hidden: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    gate, up, down = (
        (torch.randn(shape, generator=generator) * 0.2).requires_grad_()
        for shape in ((width, hidden), (width, hidden), (hidden, width))
    )
    return gate, up, down


@given(problems(), st.integers(1, 40), st.booleans(), st.sets(st.integers(0, 6), max_size=6), st.booleans())
@example(problem(700, 2, 4, 20, 18), 30, False, set(), False)
@example(problem(40, 2, 4, 20, 18), 30, False, {0, 1, 2, 3}, True)
def test_shared_experts_join_in_as_if_added_afterwards(
    given: Problem, width: int, narrow: bool, frozen: set[int], fewer: bool
) -> None:
    """To the last bit, whichever leaves want a gradient, and if the last expert's rows are nobody's."""
    narrow = narrow and own_products_faster(narrow=True)
    shared = shared_experts(given.x_TD.shape[1], width)
    leaves = [*given.leaves(), *shared]
    for number in frozen:
        leaves[number].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    operands = list(vars(given).values())
    if fewer and len(given.load_E) > 1:
        operands[4:] = [of[:-1] for of in operands[4:]]
    joined = routed_swiglu(*operands, narrow=narrow, shared=shared)
    apart = routed_swiglu(*operands, narrow=narrow) + dense_swiglu(given.x_TD, *shared, narrow=narrow)
    assert torch.equal(joined, apart)
    ours, truth = (torch.autograd.grad(y, wanted, direction(y)) for y in (joined, apart))
    assert all(torch.equal(one, other) for one, other in zip(ours, truth, strict=True))


def test_joined_experts_recomputed_in_backward_are_the_same() -> None:
    given, shared = problem(30, 2, 4, 12, 8), shared_experts(12, 9)
    leaves = [*given.leaves(), *shared]
    once = routed_swiglu(*vars(given).values(), shared=shared)
    again = checkpoint(lambda: routed_swiglu(*vars(given).values(), shared=shared), use_reentrant=False)
    want, got = (torch.autograd.grad(y, leaves, direction(y)) for y in (once, again))
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_shared_experts_of_another_size_are_refused() -> None:
    given = problem(3, 1, 2, 8, 4)
    for shapes in (((4, 8), (4, 8), (4, 8)), ((4, 8), (5, 8), (8, 4)), ((4, 9), (4, 9), (9, 4))):
        with pytest.raises(ValueError, match="do not fit"):
            routed_swiglu(*vars(given).values(), shared=tuple(torch.zeros(shape) for shape in shapes))


def test_matrices_wider_than_the_cache_equal_float64() -> None:
    """They take larger blocks of rows, backward."""
    given = problem(450, 1, 1, 640, 600)
    for one, truth in zip(value_and_gradients(given), given.exact(), strict=True):
        assert_close(one.double(), truth, atol=1e-5 * float(truth.detach().abs().max()), rtol=1e-3)


def test_no_tokens() -> None:
    y, *gradients = value_and_gradients(problem(0, 2, 3, 8, 8))
    assert y.shape == (0, 8)
    assert all((gradient == 0).all() for gradient in gradients)


@given(
    load=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    hidden=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 999),
)  # fmt: skip
def test_sorted_rows_equal_float64(load: list[int], hidden: int, width: int, seed: int) -> None:
    given, load_E = problem(sum(load), 1, len(load), hidden, width, seed), torch.tensor(load)
    leaves = given.x_TD, given.gate_up_END, given.down_EDF
    y = rows_swiglu(leaves[0], load_E, *leaves[1:])
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = expert_swiglu_reference(wide[0], load_E, *wide[1:])
    near(
        [y, *torch.autograd.grad(y, leaves, direction(y))],
        [exact, *torch.autograd.grad(exact, wide, direction(exact))],
    )


def test_loads_that_are_not_the_rows_are_refused() -> None:
    given = problem(6, 1, 2, 8, 8)
    with pytest.raises(ValueError, match="load_E sums to 5, but there are 6 rows"):
        rows_swiglu(given.x_TD, torch.tensor([2, 3]), given.gate_up_END, given.down_EDF)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    hidden=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 999),
)  # fmt: skip
@example(shape=[700], hidden=16, width=24, seed=0)
def test_a_dense_layer_equals_float64(shape: list[int], hidden: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = (*shape, hidden), (width, hidden), (width, hidden), (hidden, width)
    leaves = [(torch.randn(size, generator=generator) * size[-1] ** -0.5).requires_grad_() for size in sizes]
    y = dense_swiglu(*leaves)
    x, gate, up, down = wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    near(
        [y, *torch.autograd.grad(y, leaves, direction(y))],
        [exact, *torch.autograd.grad(exact, wide, direction(exact))],
    )


def test_frozen_operands_get_no_gradient_and_change_none() -> None:
    given = problem(30, 2, 4, 12, 8)
    want = dict(zip(("x_TD", "weight_TK", "gate_up_END", "down_EDF"), value_and_gradients(given)[1:], strict=True))
    for frozen in want:
        part = Problem(**{name: value.detach() if name == frozen else value for name, value in vars(given).items()})
        y = part.run()
        for (name, expected), leaf in zip(want.items(), part.leaves(), strict=True):
            if name != frozen:
                assert torch.equal(torch.autograd.grad(y, leaf, direction(y), retain_graph=True)[0], expected)


def test_twice_in_one_graph_adds_up() -> None:
    given = problem(30, 2, 4, 12, 8)
    y, *once = value_and_gradients(given)
    twice = torch.autograd.grad(given.run() + given.run(), given.leaves(), direction(y))
    for one, two in zip(once, twice, strict=True):
        assert_close(two, 2 * one)


def test_recomputed_in_backward_it_is_the_same() -> None:
    given = problem(30, 2, 4, 12, 8)
    y, *want = value_and_gradients(given)
    again = checkpoint(routed_swiglu, *vars(given).values(), use_reentrant=False)
    assert torch.equal(again, y)
    for one, other in zip(torch.autograd.grad(again, given.leaves(), direction(y)), want, strict=True):
        assert torch.equal(one, other)


def test_strided_operands_and_gradients() -> None:
    given = problem(30, 2, 4, 12, 8)
    want = value_and_gradients(given)
    spread: dict[str, Any] = {
        name: torch.stack((value.detach(), torch.zeros_like(value)), dim=-1)[..., 0] for name, value in vars(given).items()
    }
    strided = Problem(**{name: value.requires_grad_(value.is_floating_point()) for name, value in spread.items()})
    assert not strided.x_TD.is_contiguous()
    y = strided.run()
    slanted = direction(y).T.contiguous().T
    for one, other in zip([y, *torch.autograd.grad(y, strided.leaves(), slanted)], want, strict=True):
        assert torch.equal(one, other)


def test_without_gradients_nothing_is_kept() -> None:
    given = problem(30, 2, 4, 12, 8)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        want = given.run()
        assert any(tensor.shape == (60, 16) for tensor in kept)
        kept.clear()
        with torch.no_grad():
            assert torch.equal(given.run(), want)
    assert not kept


def test_a_second_derivative_is_refused() -> None:
    given = problem(5, 2, 4, 12, 8)
    (gradient,) = torch.autograd.grad(given.run().square().sum(), given.x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_incoming_gradient_is_left_alone() -> None:
    given = problem(30, 2, 4, 12, 8)
    y = given.run()
    incoming = direction(y)
    torch.autograd.grad(y, given.leaves(), incoming)
    assert torch.equal(incoming, direction(y))


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_beyond_the_loads_are_nobodys(threads: int) -> None:
    """Choices of an expert that is not here: they add nothing, and neither they nor its weights get a gradient."""
    whole, held = problem(400, 3, 6, 20, 16), 4
    matrices = (whole.gate_up_END[:held], whole.down_EDF[:held])
    mine_TK = whole.row_TK < whole.load_E[:held].sum()
    assert 0 < mine_TK.sum() < mine_TK.numel()

    def part(weight_TK: Tensor, *experts: Tensor) -> Tensor:
        return routed_swiglu(whole.x_TD, weight_TK, whole.row_TK, whole.token_R, whole.load_E[:held], *experts)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = part(whole.weight_TK, *matrices)
        want = routed_swiglu(whole.x_TD, whole.weight_TK * mine_TK, *list(vars(whole).values())[2:])
        leaves = whole.leaves()
        for one, other in zip((y, *torch.autograd.grad(y, leaves, direction(y))),
                              (want, *torch.autograd.grad(want, leaves, direction(want))), strict=True):  # fmt: skip
            assert_close(one, other, atol=2e-5, rtol=1e-4)
    finally:
        torch.set_num_threads(before)
