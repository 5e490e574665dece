"""What reaches C++ through addresses must be what it seems: everything else is refused or goes through torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from cadre.kernels.attention import causal_attention, causal_attention_reference
from cadre.kernels.loss import linear_cross_entropy, linear_cross_entropy_reference
from cadre.kernels.native.library import is_plain
from cadre.kernels.norm import rms_norm, rms_norm_reference
from cadre.kernels.permute import sort_choices
from cadre.kernels.routed import dense_swiglu, routed_swiglu
from cadre.kernels.routing import RoutingRule, balance_terms, choose_experts, top_experts
from cadre.model.layers import Linear, RMSNorm, SwiGLU
from cadre.model.transformer import Transformer
from tests.shapes import small


def model_of(kind: str) -> Transformer:
    return Transformer(small(kind)).initialize(0)


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_gradients_do_not_take_the_default_dtype(kind, default):
    model, ids = model_of(kind), torch.arange(12).view(2, 6)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    torch.set_default_dtype(default)
    try:
        got = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, other in zip(got, want, strict=True):
        assert_close(ours, other)


def test_single_positions_with_odd_strides():
    q, k, v = (torch.randn(1, 3, 2, width).transpose(0, 1) for width in (8, 8, 4))
    assert_close(causal_attention(q, k, v, 0.3), causal_attention_reference(q, k, v, 0.3))


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    for wrong in ((q, k[:, :4], v), (q, k[:, :4], v[:, :4]), (q[:1], k, v), (q[:, :, :3], k, v), (q, k[..., :6], v)):
        with pytest.raises(ValueError):
            causal_attention(*wrong, 0.3)
    mlp = SwiGLU(16, 32)
    for part in mlp.parameters():
        nn.init.normal_(part)
    for width in (8, 32):
        with pytest.raises(ValueError):
            mlp(torch.randn(4, width))
    with pytest.raises(ValueError):
        RMSNorm(8, 1e-6)(torch.randn(2, 64))
    with pytest.raises(ValueError):
        sort_choices(torch.tensor([[0, 9]]), 4)


def test_one_weight_for_all_positions_and_one_document_for_all_sequences():
    hidden, head, target = torch.randn(6, 8), torch.randn(10, 8), torch.arange(6)
    want = linear_cross_entropy_reference(hidden, head, target, torch.ones(6))
    assert_close(linear_cross_entropy(hidden, head, target, torch.ones(1)), want)
    q, k, v = (torch.randn(2, 6, 1, 4) for _ in range(3))
    document = torch.tensor([[0, 0, 1, 1, 1, 2]])
    assert_close(causal_attention(q, k, v, 0.5, document), causal_attention_reference(q, k, v, 0.5, document))


def test_views_that_negate_and_modes_that_watch_go_through_torch():
    negated = torch._neg_view(torch.ones(2, 4))
    assert_close(rms_norm(negated, torch.ones(4), 1e-6), rms_norm_reference(-torch.ones(2, 4), torch.ones(4), 1e-6))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not is_plain(torch.ones(2))
        assert causal_attention(*(torch.ones(1, 3, 1, 4) for _ in range(3)), 1.0).shape == (1, 3, 1, 4)
    assert is_plain(torch.ones(2))


def test_gradients_that_negate_are_those_of_what_they_are():
    """Their elements lie in memory with the other sign."""
    torch.manual_seed(0)
    rule = RoutingRule(2, 1, 1, True, True, 1.0)
    cases = [
        (dense_swiglu, [torch.randn(shape) for shape in ((5, 8), (12, 8), (12, 8), (8, 12))]),
        (lambda logit: choose_experts(logit, None, rule)[1], [torch.randn(5, 6)]),
        (lambda score: balance_terms(score, torch.rand(1, 6)), [torch.rand(5, 6)]),
    ]
    for function, leaves in cases:
        y = function(*(leaf.requires_grad_() for leaf in leaves))
        grad = torch.randn_like(y)
        plainly = torch.autograd.grad(y, leaves, -grad, retain_graph=True)
        for one, other in zip(torch.autograd.grad(y, leaves, torch._neg_view(grad)), plainly, strict=True):
            assert_close(one, other)


def test_what_would_be_written_elsewhere_is_refused():
    with pytest.raises(RuntimeError):
        top_experts(torch.randn(2, 3), 5)
    x, weight, row, token = torch.randn(2, 8), torch.rand(2, 1), torch.tensor([[0], [1]]), torch.tensor([0, 1])
    matrices = torch.randn(2, 24, 8), torch.randn(2, 8, 12)
    for load in ([1, 2], [3, -1]):
        with pytest.raises(ValueError):
            routed_swiglu(x, weight, row, token, torch.tensor(load), *matrices)


def test_parts_that_are_adapted_or_watched_are_called():
    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mlp, x, heard = SwiGLU(8, 12), torch.randn(3, 8), []
    for part in mlp.parameters():
        nn.init.normal_(part)
    plainly = mlp(x)
    mlp.down_proj.register_forward_hook(lambda *_: heard.append(1))
    assert_close(mlp(x), plainly)
    assert heard
    adapted = Doubled(8, 12)
    adapted.weight = mlp.up_proj.weight
    mlp.up_proj = adapted
    assert_close(mlp(x), 2 * plainly)


def test_a_router_that_is_not_finite_shows_in_the_loss():
    model = model_of("deepseek_v3")
    with torch.no_grad():
        model.sparse_layers()[0][1].gate.weight[1, 2] = float("nan")
    assert not torch.isfinite(model(torch.arange(6).view(1, 6))).all()


def test_the_greatest_of_saturated_affinities():
    assert top_experts(torch.tensor([[20.0, 30.0, -5.0]]), 1).tolist() == [[1]]


def test_diverging_activations_stay_small_where_silu_is_zero():
    mlp = SwiGLU(1, 1)
    for part in mlp.parameters():
        nn.init.ones_(part)
    x = torch.tensor([[-1e30]], requires_grad=True)
    out = mlp(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert float(out.detach()) == 0 and float(gradient) == 0


def test_evaluation_computes_no_gradients():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, head, torch.arange(4), torch.ones(4))
    assert not loss.requires_grad


def test_a_model_in_training_can_be_copied():
    model = model_of("deepseek_v3").train()
    model(torch.arange(6).view(1, 6))
    twin = copy.deepcopy(model)
    assert_close(twin(torch.arange(6).view(1, 6)), model(torch.arange(6).view(1, 6)))
