import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cadre.kernels.linear import linear, product, product_reference, rounded
from cadre.kernels.native import library

# Sums of up to 1,100 products of numbers near one, in float32.
SUMS = {"rtol": 1e-5, "atol": 1e-4}
narrow_ones = pytest.mark.skipif(not library.own_products_faster(narrow=True), reason="no products of bfloat16 here")


def wide(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(draw, rows: int, cols: int, seed: int) -> Tensor:
    """Float32 [rows, cols] as it lies, as a transposed view, within a wider matrix, or a row that is repeated."""
    lies = draw(st.sampled_from(("rows", "columns", "part", "part of columns", "repeated")))
    x = wide(rows + 3, cols + 5, seed=seed).float()
    if lies == "rows":
        return x[:rows, :cols].contiguous()
    if lies == "columns":
        return x[:rows, :cols].t().contiguous().t()
    if lies == "part":
        return x[3:, 5:]
    if lies == "part of columns":
        return x.t().contiguous().t()[3:, 5:]
    return x[:1, :cols].expand(rows, cols)


@st.composite
def operands(draw):
    M, N = draw(st.integers(1, 300)), draw(st.integers(1, 600))
    K = draw(st.one_of(st.integers(1, 70), st.sampled_from((255, 256, 257, 511, 512, 513, 1030))))
    return matrix(draw, M, K, 0), matrix(draw, K, N, 1)


@settings(max_examples=150, deadline=None)
@given(operands(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_products_are_those_of_float64(factors, narrow, add, threads):
    narrow = narrow and library.own_products_faster(narrow=True)
    a, b = factors
    out = wide(a.shape[0], b.shape[1] + 2, seed=2).float()
    before, exact = out.clone(), a.double() @ b.double()
    if narrow:
        exact = rounded(a).double() @ rounded(b).double()
    if add:
        exact = exact + out[:, 1:-1].double()
    at_first = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = product(a, b, out[:, 1:-1], add=add, narrow=narrow)
    finally:
        torch.set_num_threads(at_first)
    torch.testing.assert_close(made, exact.float(), **SUMS)
    assert made.data_ptr() == out[:, 1:-1].data_ptr()
    torch.testing.assert_close(out[:, (0, -1)], before[:, (0, -1)], rtol=0, atol=0)
    torch.testing.assert_close(product_reference(a, b, narrow=narrow), product(a, b, narrow=narrow), **SUMS)


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=narrow_ones)])
def test_a_sum_does_not_depend_on_what_is_computed_beside_it(narrow):
    a, b = wide(300, 700).float(), wide(700, 90, seed=1).float()
    whole = product(a, b, narrow=narrow)
    if library.own_products_faster(narrow):
        assert torch.equal(whole[100:130], product(a[100:130], b, narrow=narrow))
        assert torch.equal(whole[:, 32:64], product(a, b[:, 32:64], narrow=narrow))


@narrow_ones
def test_rounding_is_that_of_torch():
    """To the nearest, to the even one of two; what is not finite stays so."""
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3e38, float("inf"), float("nan")])
    a = torch.zeros(16, 8)
    a[:8] = torch.diag(torch.where(x.isfinite(), x, 1.0))
    one = product(a, torch.eye(8), narrow=True)
    torch.testing.assert_close(one[:6], rounded(a)[:6], rtol=0, atol=0)
    a[6, 6], a[7, 7] = float("inf"), float("nan")
    one = product(a, torch.ones(8, 1), narrow=True)
    assert one[6, 0] == float("inf") and one[7, 0].isnan() and one[:6].isfinite().all()


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=narrow_ones)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 40, 33), (64, 33), (3, 33), (0, 33)])
def test_linear_and_its_gradients(shape, bias, narrow):
    def run(x: Tensor, weight: Tensor, b: Tensor | None, grad: Tensor, way) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, weight) + (() if b is None else (b,))]
        y = way(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    x, weight = wide(*shape), wide(50, 33, seed=1)
    b, grad = wide(50, seed=2) if bias else None, wide(*shape[:-1], 50, seed=3)
    exact = run(x, weight, b, grad, torch.nn.functional.linear)
    ours = run(
        x.float(), weight.float(), None if b is None else b.float(), grad.float(), lambda *of: linear(*of, narrow=narrow)
    )
    near = {"rtol": 2e-2, "atol": 0.15} if narrow else SUMS
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other.float(), **near)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises((ValueError, RuntimeError)):
        product(torch.ones(20, 4), torch.ones(5, 6))
    with pytest.raises((ValueError, RuntimeError)):
        product(torch.ones(20, 4), torch.ones(4, 6), torch.ones(20, 7), add=True)


@narrow_ones
@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(0, 9))
def test_a_weight_of_bfloat16_is_taken_as_it_is(rows, out, into, biased, seed):
    x, weight = wide(rows, into, seed=seed).float(), wide(out, into, seed=seed + 1).bfloat16()
    off = {"rtol": 0.02, "atol": 0.02 * into**0.5}
    bias = wide(out, seed=seed + 2).bfloat16() if biased else None
    with torch.no_grad():
        made = linear(x, weight, bias, narrow=True)
        want = linear(x, weight.float(), None if bias is None else bias.float(), narrow=True)
        exact = linear(x, weight, bias)
        # As they lie in no order that the kernel reads: of every other column, and all rows the same one.
        thin, alike = wide(out, 2 * into, seed=seed).bfloat16()[:, ::2], weight[:1].expand(out, into)
        torch.testing.assert_close(linear(x, thin, narrow=True), linear(x, thin.float()), **off)
        torch.testing.assert_close(linear(x, alike, narrow=True), linear(x, alike.float()), **off)
    if rows < 16 or into == 1:  # a product in torch, of x as it is
        torch.testing.assert_close(made, want, **off)
    else:
        assert torch.equal(made, want)
    torch.testing.assert_close(exact, torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float()))
    x.requires_grad_()
    torch.testing.assert_close(linear(x, weight, bias, narrow=True), made, **off)  # with a gradient: in torch


@narrow_ones
def test_only_the_products_of_gradients_may_be_narrow():
    x, weight = (wide(*shape, seed=seed).float().requires_grad_() for seed, shape in enumerate(((40, 70), (30, 70))))
    direction = wide(40, 30, seed=2).float()
    y = linear(x, weight, narrow_back=True)
    assert torch.equal(y, linear(x, weight))
    for got, want in zip(
        torch.autograd.grad(y, (x, weight), direction),
        (rounded(direction) @ rounded(weight), rounded(direction).t() @ rounded(x)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want, **SUMS)
