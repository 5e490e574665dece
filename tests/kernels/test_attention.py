from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.testing import assert_close

from cadre.kernels.attention import (
    attention_mask,
    causal_attention,
    causal_attention_reference,
    latent_attention,
    latent_attention_reference,
)

BACKENDS = [causal_attention, causal_attention_reference]


@dataclass
class Problem:
    batch: int
    length: int
    groups: int
    heads_per_group: int
    qk_width: int
    v_width: int
    documents: tuple[int, ...] | None = None
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.groups * self.heads_per_group
        widths = ((heads, self.qk_width), (self.groups, self.qk_width), (self.groups, self.v_width))
        shapes = [(self.batch, self.length, *rest) for rest in widths]
        q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
        return q, k, v

    def document_ids(self) -> Tensor | None:
        if self.documents is None:
            return None
        row = torch.tensor([n for n, length in enumerate(self.documents) for _ in range(length)])
        # The rows of a batch are cut at different places.
        return torch.stack([row.flip(0) if b % 2 else row for b in range(self.batch)])


@st.composite
def problems(draw: DrawFn) -> Problem:
    documents = draw(st.none() | st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple))
    length = draw(st.integers(1, 19)) if documents is None else sum(documents)
    size = st.integers(1, 11)
    return Problem(
        draw(st.integers(1, 2)), length, draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(size), draw(size), documents,
        draw(st.integers(0, 999)),
    )  # fmt: skip


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, document: Tensor | None) -> Tensor:
    """Position by position, head by head, over exactly the positions that may be seen."""
    batch, length, heads, _ = q.shape
    per_group = heads // k.shape[2]
    rows = []
    for b in range(batch):
        for t in range(length):
            seen = [s for s in range(t + 1) if document is None or document[b, s] == document[b, t]]
            for h in range(heads):
                weight = torch.softmax(scale * k[b, seen, h // per_group] @ q[b, t, h], dim=0)
                rows.append(weight @ v[b, seen, h // per_group])
    return torch.stack(rows).view(batch, length, heads, v.shape[-1])


def value_and_gradients(function, tensors: tuple[Tensor, ...], scale: float, document: Tensor | None) -> list[Tensor]:
    output = function(*tensors, scale, document)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, direction)]


def in_float64(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() for x in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@example(problem=Problem(1, 1, 1, 1, 1, 1))  # one token
@example(problem=Problem(2, 5, 1, 3, 6, 4))  # narrow values, MQA
@example(problem=Problem(2, 5, 3, 1, 4, 9))  # wide values, MHA
@example(problem=Problem(1, 13, 2, 2, 8, 8))  # equal widths, GQA
@example(problem=Problem(2, 9, 2, 2, 12, 8, documents=(4, 1, 4)))
@example(problem=Problem(1, 6, 1, 2, 3, 5, documents=(1, 1, 1, 1, 1, 1)))  # nobody sees anyone else
def test_value_and_gradients_equal_float64(backend, problem: Problem):
    tensors, document, scale = problem.tensors(), problem.document_ids(), problem.qk_width**-0.5
    want = value_and_gradients(exact, in_float64(tensors), scale, document)
    assert want[0].shape == (problem.batch, problem.length, problem.groups * problem.heads_per_group, problem.v_width)
    for ours, truth in zip(value_and_gradients(backend, tensors, scale, document), want, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
def test_bfloat16_stays_near_float64(backend, problem: Problem):
    tensors, document, scale = problem.tensors(torch.bfloat16), problem.document_ids(), problem.qk_width**-0.5
    want = value_and_gradients(exact, in_float64(tensors), scale, document)
    for ours, truth in zip(value_and_gradients(backend, tensors, scale, document), want, strict=True):
        assert ours.dtype == torch.bfloat16
        assert_close(ours.double(), truth, atol=2**-5 * max(1.0, float(truth.detach().abs().max())), rtol=2**-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [97, 130])
@pytest.mark.parametrize("documents", [False, True])
def test_lengths_beyond_one_tile(backend, length, documents):
    """Fused kernels work in tiles; these lengths end within one."""
    problem = Problem(1, length, 2, 2, 24, 16, documents=(length - 50, 41, 9) if documents else None)
    tensors, document = problem.tensors(), problem.document_ids()
    want = value_and_gradients(causal_attention_reference, in_float64(tensors), 0.2, document)
    for ours, truth in zip(value_and_gradients(backend, tensors, 0.2, document), want, strict=True):
        assert_close(ours.double(), truth, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_is_the_one_given(backend):
    tensors = Problem(1, 6, 1, 1, 4, 4).tensors()
    for scale in (0.01, 1.0, 3.0):
        assert_close(backend(*tensors, scale), exact(*tensors, scale, None), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v = Problem(1, 5, 1, 1, 4, 4).tensors()
    got = backend(q * 1e3, k * 1e3, v, 1.0)
    assert torch.isfinite(got).all()
    assert_close(got[0, 0], v[0, 0])


@pytest.mark.parametrize("widths", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("documents", [None, (3, 1)])
def test_gradcheck(widths, documents):
    """The fused one only: the reference's float32 softmax is too coarse for finite differences."""
    problem = Problem(1, 4, 1, 2, *widths, documents=documents)
    document = problem.document_ids()
    tensors = problem.tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.5, document), tensors)


def test_mask_by_hand():
    mask = attention_mask(4, 4, torch.tensor([[0, 0, 1, 1]]), torch.device("cpu"))
    assert mask[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert attention_mask(2, 2, None, torch.device("cpu")).int().tolist() == [[[1, 0], [1, 1]]]


@dataclass
class Latents:
    """Operands of latent attention: the last `queries` of `length` positions ask."""

    batch: int
    length: int
    queries: int
    heads: int
    nope: int
    rotary: int
    value: int
    turned: bool = False
    interleaved: bool = True
    documents: tuple[int, ...] | None = None
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.batch, self.queries, self.heads, self.nope + self.rotary),
            (self.batch, self.length, self.heads, self.nope + self.value),
            (self.batch, self.length, self.rotary),
        )
        q, kv, k = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
        return q, kv, k

    def rest(self) -> tuple[Tensor | None, float, bool, Tensor | None]:
        angle = torch.outer(torch.arange(self.length), torch.linspace(1, 0.1, self.rotary // 2))
        turn = None if self.turned else torch.polar(torch.full_like(angle, 1.1), angle)
        row = torch.tensor([n for n, length in enumerate(self.documents or ()) for _ in range(length)])
        document = None if self.documents is None else row.expand(self.batch, -1)
        return turn, (self.nope + self.rotary) ** -0.5, self.interleaved, document


def check_latents(function, problem: Latents) -> None:
    def run(function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        output = function(*tensors, *problem.rest())
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
        return [output, *torch.autograd.grad(output, tensors, direction)]

    tensors = problem.tensors()
    want = run(latent_attention_reference, in_float64(tensors))
    for ours, truth in zip(run(function, tensors), want, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), truth, atol=2e-5, rtol=1e-4)


@st.composite
def latents(draw: DrawFn) -> Latents:
    documents = draw(st.none() | st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple))
    length = draw(st.integers(1, 140)) if documents is None else sum(documents)
    queries = length if draw(st.booleans()) else draw(st.integers(1, length))
    return Latents(
        draw(st.integers(1, 2)), length, queries, draw(st.integers(1, 3)), draw(st.integers(1, 40)),
        2 * draw(st.integers(1, 12)), draw(st.integers(1, 40)), draw(st.booleans()), draw(st.booleans()), documents,
        draw(st.integers(0, 999)),
    )  # fmt: skip


@given(problem=latents())
@example(problem=Latents(1, 300, 300, 2, 64, 32, 64))
@example(problem=Latents(1, 300, 1, 1, 16, 8, 16, turned=True))
@example(problem=Latents(1, 300, 130, 1, 16, 8, 16, turned=True))
@example(problem=Latents(1, 400, 400, 1, 16, 36, 20, documents=(130, 1, 200, 69)))
@example(problem=Latents(2, 400, 150, 1, 16, 36, 20, documents=(130, 1, 200, 69)))
def test_latent_attention_equals_float64(problem: Latents):
    check_latents(latent_attention, problem)


@pytest.mark.parametrize("documents", [None, (20, 30)])
@pytest.mark.parametrize("queries", [50, 35])
@pytest.mark.parametrize("interleaved", [True, False])
def test_latent_attention_without_the_kernel(monkeypatch, documents, queries, interleaved):
    monkeypatch.setattr("cadre.kernels.attention.attention_kernel_takes", lambda *tensors: False)
    check_latents(latent_attention, Latents(2, 50, queries, 2, 12, 8, 10, interleaved=interleaved, documents=documents))


@pytest.mark.parametrize("native", [True, False])
def test_grouped_queries_of_the_last_positions(monkeypatch, native):
    if not native:
        monkeypatch.setattr("cadre.kernels.attention.attention_kernel_takes", lambda *tensors: False)
    q, k, v = Problem(2, 150, 2, 2, 24, 16).tensors()
    whole, last = causal_attention(q, k, v, 0.2), causal_attention(q[:, 60:], k, v, 0.2)
    assert_close(last, whole[:, 60:], atol=1e-5, rtol=1e-4)


def test_the_kernel_reads_slices_and_copies_what_it_cannot():
    q, k, v = Problem(2, 20, 2, 1, 12, 8).tensors()
    joined = torch.cat((k, v), dim=-1).detach()
    outputs = [
        causal_attention(q, joined[..., :12], joined[..., 12:], 0.3),
        causal_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, 0.3),
        causal_attention(torch.cat((q, q), dim=1)[:, :20], k, v, 0.3),
    ]
    for output in outputs:
        assert_close(output, causal_attention_reference(q, k, v, 0.3), atol=1e-5, rtol=1e-4)


def test_equal_bits_each_time():
    problem = Latents(3, 200, 200, 2, 16, 8, 16)
    tensors = problem.tensors()
    outputs = [latent_attention(*tensors, *problem.rest()) for _ in range(2)]
    gradients = [torch.autograd.grad(output.square().sum(), tensors) for output in outputs]
    assert torch.equal(*outputs)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
