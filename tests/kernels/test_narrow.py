"""Kernels whose products are of factors rounded to bfloat16, against float64: what rounding costs, and nothing more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cadre.kernels.attention import causal_attention, causal_attention_reference, latent_attention, latent_attention_reference
from cadre.kernels.grouped import expert_swiglu, expert_swiglu_reference
from cadre.kernels.limits import training_dtype
from cadre.kernels.loss import linear_cross_entropy, linear_cross_entropy_reference
from cadre.kernels.native.library import kernels_take_rows, own_products_faster, training_library
from cadre.kernels.permute import sort_choices
from cadre.kernels.quantized import dequantize, quantize
from cadre.kernels.routed import dense_swiglu, routed_swiglu, routed_swiglu_quantized

pytestmark = pytest.mark.skipif(not own_products_faster(narrow=True), reason="the processor has no products of bfloat16")

# Where few positions are seen, scores have next to no gradient: differences of numbers near one that were rounded.
FEW, NEAR_ZERO = 20, 0.3
# A factor is off by at most 2^-9 of itself, about 0.17% in the mean square; a result has come through a few of them.
OFF = 0.01


def random(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).requires_grad_()


def check(ours: Callable[..., Tensor], exact: Callable[..., Tensor], *operands: Tensor, floor: float = 1e-3) -> None:
    """Value and gradients are off by a share of their size; of what is nearly zero, elements below `floor`, of that."""
    y = ours(*operands)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    wide = [x.detach().double().requires_grad_() for x in operands]
    truth = exact(*wide)
    got = [y, *torch.autograd.grad(y, operands, direction)]
    want = [truth, *torch.autograd.grad(truth, wide, direction.double())]
    pairs = [(one.detach(), other.detach()) for one, other in zip(got, want, strict=True)]
    off = [float((one - other).norm() / (other.norm() + floor * other.numel() ** 0.5)) for one, other in pairs]
    assert max(off) < OFF, off


def floor(positions: int, documents: bool = False) -> float:
    return NEAR_ZERO if positions < FEW or documents else 1e-3


def test_this_is_what_training_computes_in_where_float32_is_slower(monkeypatch) -> None:
    monkeypatch.setattr("cadre.kernels.limits.gemm_flops_per_second", lambda *_: 1.0)
    assert training_dtype(torch.device("cpu")) == torch.bfloat16


def test_without_kernels_it_is_what_torch_multiplies_faster(monkeypatch) -> None:
    monkeypatch.setattr("cadre.kernels.limits.training_library", lambda: None)
    monkeypatch.setattr("cadre.kernels.limits.best_dtype", lambda device: torch.float16)
    assert training_dtype(torch.device("cpu")) == torch.float16
    monkeypatch.setattr("cadre.kernels.limits.training_library", training_library)
    monkeypatch.setattr("cadre.kernels.limits.own_products_faster", lambda narrow: False)
    assert training_dtype(torch.device("cpu")) == torch.float32


def test_it_is_not_where_products_of_float32_are_as_fast(monkeypatch) -> None:
    monkeypatch.setattr("cadre.kernels.limits.gemm_flops_per_second", lambda *_: 1e15)
    assert training_dtype(torch.device("cpu")) == torch.float32


@given(
    tokens=st.integers(1, 300),
    hidden=st.integers(1, 70),
    width=st.integers(1, 70),
    experts=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@example(tokens=900, hidden=80, width=32, experts=2, seed=0)
@example(tokens=3, hidden=17, width=15, experts=9, seed=0)
def test_routed_experts(tokens: int, hidden: int, width: int, experts: int, seed: int) -> None:
    choices = min(3, experts)
    expert_TK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(choices, dim=1).indices
    row_TK, token_R, load_E = sort_choices(expert_TK, experts)

    def routed(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return routed_swiglu(x, weight, row_TK, token_R, load_E, gate_up, down, narrow=True)

    def exact(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = expert_swiglu_reference(x[token_R], load_E, gate_up, down)
        return (rows[row_TK] * weight[..., None]).sum(dim=1)

    x, weight = random(tokens, hidden, seed=seed), random(tokens, choices, seed=seed + 1)
    gate_up = random(experts, 2 * width, hidden, seed=seed + 2, std=hidden**-0.5)
    check(routed, exact, x, weight, gate_up, random(experts, hidden, width, seed=seed + 3, std=width**-0.5))


def test_sorted_rows_and_dense_layers() -> None:
    load_E = torch.tensor([40, 0, 290, 7])
    x, gate_up, down = random(337, 48, seed=0), random(4, 64, 48, seed=1, std=0.15), random(4, 48, 32, seed=2, std=0.15)
    check(
        lambda x, g, d: expert_swiglu(x, load_E, g, d, narrow=True), lambda x, g, d: expert_swiglu_reference(x, load_E, g, d),
        x, gate_up, down,
    )  # fmt: skip
    gate, up = (gate_up[0].detach()[part].contiguous().requires_grad_() for part in (slice(32), slice(32, 64)))
    check(
        lambda *of: dense_swiglu(*of, narrow=True),
        lambda x, g, u, d: (torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T,
        x, gate, up, down[0].detach().contiguous().requires_grad_(),
    )  # fmt: skip


@given(
    tokens=st.integers(1, 300),
    hidden=st.integers(1, 70),
    width=st.integers(1, 70),
    experts=st.integers(1, 9),
    bits=st.sampled_from([8, 4]),
    seed=st.integers(0, 99),
)
@example(tokens=900, hidden=80, width=32, experts=2, bits=4, seed=0)  # blocks and tasks of one expert
@torch.no_grad()
def test_quantized_experts_are_those_that_their_bits_stand_for(
    tokens: int, hidden: int, width: int, experts: int, bits: int, seed: int
) -> None:
    choices = min(3, experts)
    expert_TK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(choices, dim=1).indices
    routes = sort_choices(expert_TK, experts)
    x, weight = random(tokens, hidden, seed=seed), random(tokens, choices, seed=seed + 1)
    gate_up = quantize(random(experts * 2 * width, hidden, seed=seed + 2), bits)
    down = quantize(random(experts * hidden, width, seed=seed + 3), bits)
    wide = (
        dequantize(gate_up, torch.bfloat16).view(experts, -1, hidden),
        dequantize(down, torch.bfloat16).view(experts, -1, width),
    )
    got = routed_swiglu_quantized(x, weight, *routes, gate_up, down)
    assert torch.equal(got, routed_swiglu(x, weight, *routes, *wide, narrow=True))


@torch.no_grad()
def test_quantized_experts_that_do_not_fit_are_refused() -> None:
    routes = sort_choices(torch.zeros(4, 1, dtype=torch.int64), 2)
    x, weight, gate_up, down = (
        torch.zeros(4, 8),
        torch.ones(4, 1),
        quantize(torch.ones(2 * 6, 8), 8),
        quantize(torch.ones(16, 3), 8),
    )
    assert routed_swiglu_quantized(x, weight, *routes, gate_up, down).shape == (4, 8)
    for wrong in ((gate_up, quantize(torch.ones(16, 4), 8)), (quantize(torch.ones(11, 8), 8), down), (down, gate_up)):
        with pytest.raises(ValueError, match="do not fit"):
            routed_swiglu_quantized(x, weight, *routes, *wrong)
    with pytest.raises(ValueError, match="do not fit"):
        routed_swiglu_quantized(x, weight[:3], *routes, gate_up, down)


@given(
    tokens=st.integers(1, 300), hidden=st.integers(1, 70), width=st.integers(1, 70), experts=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
@example(tokens=900, hidden=80, width=32, experts=2, seed=0)
@example(tokens=3, hidden=17, width=15, experts=9, seed=0)
@example(tokens=50, hidden=1040, width=530, experts=3, seed=0)  # more than is packed at a time, in rows and in depth
@example(tokens=96, hidden=1040, width=531, experts=3, seed=0)
@example(tokens=97, hidden=18, width=16, experts=3, seed=0)
def test_matrices_of_bfloat16(tokens: int, hidden: int, width: int, experts: int, seed: int) -> None:
    """Without gradients they are taken as they are, to the same numbers as if they were widened first."""
    choices = min(3, experts)
    weight_TK = torch.rand(tokens, choices, generator=torch.Generator().manual_seed(seed))
    expert_TK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(choices, dim=1).indices
    row_TK, token_R, load_E = sort_choices(expert_TK, experts)
    x = random(tokens, hidden, seed=seed).detach()
    halves = [
        random(*shape, seed=seed + number, std=0.2).detach().bfloat16()
        for number, shape in enumerate(((experts, 2 * width, hidden), (experts, hidden, width)), 1)
    ]
    gate_up, down = halves
    alone = [gate_up[0, :width].contiguous(), gate_up[0, width:].contiguous(), down[0].contiguous()]
    assert not kernels_take_rows(x, *halves, narrow=True)
    with torch.no_grad():
        assert kernels_take_rows(x, *halves, narrow=True) and not kernels_take_rows(x, *halves, narrow=False)
        assert not kernels_take_rows(x.bfloat16(), *halves, narrow=True)
        assert not kernels_take_rows(x, gate_up, down.float(), narrow=True)
        with pytest.raises(ValueError, match="do not fit"):
            routed_swiglu(x, weight_TK, row_TK, token_R, load_E, *halves)
        got = routed_swiglu(x, weight_TK, row_TK, token_R, load_E, *halves, narrow=True)
        want = routed_swiglu(x, weight_TK, row_TK, token_R, load_E, gate_up.float(), down.float(), narrow=True)
        assert torch.equal(got, want)
        got = routed_swiglu(x, weight_TK, row_TK, token_R, load_E, *halves, narrow=True, shared=tuple(alone))
        assert torch.equal(got, want + dense_swiglu(x, *alone, narrow=True))
        assert torch.equal(
            dense_swiglu(x, *alone, narrow=True), dense_swiglu(x, *(part.float() for part in alone), narrow=True)
        )
        rows = x[token_R]
        assert torch.equal(
            expert_swiglu(rows, load_E, *halves, narrow=True),
            expert_swiglu(rows, load_E, gate_up.float(), down.float(), narrow=True),
        )


@given(
    length=st.integers(1, 150), past=st.sampled_from((0, 0, 3, 90)), groups=st.integers(1, 3), per_group=st.integers(1, 3),
    width=st.integers(1, 40), value=st.integers(1, 40), documents=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example(length=500, past=0, groups=2, per_group=1, width=48, value=32, documents=True, seed=0)
@example(length=97, past=301, groups=1, per_group=2, width=17, value=33, documents=False, seed=0)
def test_grouped_attention(
    length: int, past: int, groups: int, per_group: int, width: int, value: int, documents: bool, seed: int
) -> None:
    whole = past + length
    document = (torch.arange(whole) // 37).expand(2, -1) if documents else None

    def run(way: Callable[..., Tensor], **options: bool) -> Callable[..., Tensor]:
        return lambda q, k, v: way(q, k, v, width**-0.5, document, **options)

    q = random(2, length, groups * per_group, width, seed=seed)
    k, v = random(2, whole, groups, width, seed=seed + 1), random(2, whole, groups, value, seed=seed + 2)
    check(run(causal_attention, narrow=True), run(causal_attention_reference), q, k, v, floor=floor(whole, documents))


@given(
    length=st.integers(1, 200), nope=st.integers(1, 33), rotary=st.sampled_from((2, 6, 16)), value=st.integers(1, 33),
    interleaved=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example(length=512, nope=32, rotary=16, value=32, interleaved=True, seed=0)
def test_latent_attention(length: int, nope: int, rotary: int, value: int, interleaved: bool, seed: int) -> None:
    angle = torch.rand(length, rotary // 2, generator=torch.Generator().manual_seed(seed)) * 6
    turn, scale = torch.polar(torch.ones_like(angle), angle), (nope + rotary) ** -0.5
    q, kv = random(2, length, 3, nope + rotary, seed=seed), random(2, length, 3, nope + value, seed=seed + 1)
    check(
        lambda *of: latent_attention(*of, turn, scale, interleaved, narrow=True),
        lambda *of: latent_attention_reference(*of, turn.to(torch.complex128), scale, interleaved),
        q, kv, random(2, length, rotary, seed=seed + 2), floor=floor(length),
    )  # fmt: skip


def test_head_and_loss() -> None:
    target, weight = torch.arange(200) % 91, torch.rand(200, generator=torch.Generator().manual_seed(0))
    check(
        lambda h, w: linear_cross_entropy(h, w, target, weight, narrow=True),
        lambda h, w: linear_cross_entropy_reference(h, w, target, weight.double()),
        random(200, 40, seed=0), random(91, 40, seed=1, std=0.3),
    )  # fmt: skip
