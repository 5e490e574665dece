"""Experts on other ranks give what experts on one rank give: outputs, and gradients of tokens, router and experts."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cadre.model.experts import MixtureOfExperts
from cadre.train.parallel.dispatch import ExpertGroup, ExpertParallelMixture
from cadre.train.parallel.shared_memory import SharedMemory
from tests.shapes import small
from tests.train.parallel.world import world

CONFIG = small("deepseek_v3", n_routed_experts=8, num_experts_per_tok=3)
WIDTH = CONFIG.hidden_size


def mixture(experts: int = 8) -> MixtureOfExperts:
    generator = torch.Generator().manual_seed(0)
    made = MixtureOfExperts(CONFIG.model_copy(update={"n_routed_experts": experts}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def tokens(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def run(layer: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    layer.train()
    y = layer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {name: parameter.grad for name, parameter in layer.named_parameters()}


def parallel_run(
    ranks, counts: list[int], dtype: torch.dtype, experts: int = 8, fp8: bool = False, in_memory: bool = False
) -> dict:
    shared = SharedMemory.open(dist.group.WORLD, torch.device("cpu"), timedelta(minutes=1)) if in_memory else None
    group = ExpertGroup(dist.group.WORLD, fp8, shared)
    layer = ExpertParallelMixture(mixture(experts), group)
    messages = []
    send = dist.all_to_all_single
    dist.all_to_all_single = lambda *given, **options: messages.append(0) or send(*given, **options)
    x = tokens(counts[ranks.rank], ranks.rank, dtype)
    with torch.no_grad():
        layer(x)
    forward_bytes, group.sent_bytes = group.sent_bytes, 0
    y, x_grad, grads = run(layer, x)
    visits = sum(len(set(token)) for token in (layer.routes.expert_TK // (experts // ranks.size)).tolist())
    return {"y": y, "x": x_grad, "grads": grads, "forward": forward_bytes, "both": group.sent_bytes,
            "routed": len(layer.routes.expert_TK), "visits": visits, "messages": len(messages)}  # fmt: skip


# Bytes of what goes with a token: of each choice an expert and a weight, of the gradients a weight's.
CHOICES, CHOICES_BACK = CONFIG.num_experts_per_tok * (4 + 4), CONFIG.num_experts_per_tok * 4


def sent(answers: list[dict], dispatch: int, combine: int) -> None:
    """k' x hidden x (dispatch + combine bytes) a token and layer, k' the ranks that it goes to (shared/FIGURES.md has it for
    nodes), and what goes with it; the gradients take as many back."""
    visits = sum(answer["visits"] for answer in answers)
    assert sum(answer["forward"] for answer in answers) == visits * (dispatch + combine + CHOICES)
    assert sum(answer["both"] for answer in answers) == visits * (2 * (dispatch + combine) + CHOICES + CHOICES_BACK)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("counts", [[5, 9], [6, 0], [4, 7, 1, 11]], ids=str)
def test_experts_on_other_ranks_compute_the_same(counts, in_memory):
    answers = world(len(counts), parallel_run, counts, torch.float32, 8, False, in_memory)
    one_rank, summed = mixture(), {}
    for rank, answer in enumerate(answers):
        y, x_grad, grads = run(one_rank, tokens(counts[rank], rank))
        torch.testing.assert_close(answer["y"], y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer["x"], x_grad, rtol=1e-5, atol=1e-5)
        assert answer["routed"] == counts[rank]
        summed = grads  # `backward` has added them up over the ranks' tokens
    for name, whole in summed.items():
        theirs = [answer["grads"][name] for answer in answers]
        got = torch.cat(theirs) if name.startswith("experts.") else sum(theirs)
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_in_8_bits_are_near_and_so_are_their_gradients(in_memory):
    counts = [5, 9]
    answers = world(2, parallel_run, counts, torch.float32, 8, True, in_memory)
    one_rank, summed = mixture(), {}
    for rank, answer in enumerate(answers):
        y, x_grad, summed = run(one_rank, tokens(counts[rank], rank))
        assert 0 < (answer["y"] - y).norm() < 0.06 * y.norm()
        assert 0 < (answer["x"] - x_grad).norm() < 0.12 * x_grad.norm()  # of the square's gradient: two roundings
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        got = torch.cat([answer["grads"][name] for answer in answers])
        assert 0 < (got - summed[name]).norm() < 0.12 * summed[name].norm(), name


@pytest.mark.parametrize("counts", [[1, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("choices, fp8", [(1, False), (3, True)], ids=["one choice", "8 bits"])
def test_a_single_row_and_none_are_sent_as_many_are(monkeypatch, counts, choices, fp8):
    """As where the others still score and this process has no more text. Of 25 bytes, what goes with a token lies anywhere."""
    monkeypatch.setitem(globals(), "CONFIG", CONFIG.model_copy(update={"num_experts_per_tok": choices}))
    answers = world(2, parallel_run, counts, torch.float32, 8, fp8)
    for rank, answer in enumerate(answers):
        y, _, _ = run(mixture(), tokens(counts[rank], rank))
        assert answer["y"].shape == y.shape and (answer["y"] - y).norm() <= 0.06 * y.norm() + 1e-5


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_bytes_of_rows_in_8_bits(in_memory):
    """A byte an element and one for each run of 128 in dispatch, the compute dtype in combine."""
    counts = [5, 9]
    answers = world(2, parallel_run, counts, torch.bfloat16, 8, True, in_memory)
    sent(answers, WIDTH + -(-WIDTH // 128), 2 * WIDTH)
    assert all(answer["visits"] <= 2 * answer["routed"] for answer in answers)  # two ranks, three choices


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_bytes_sent_are_those_of_the_formula(dtype, size, in_memory):
    sent(world(2, parallel_run, [5, 9], dtype, 8, False, in_memory), size * WIDTH, size * WIDTH)


@pytest.mark.parametrize("size", [8, 16])
def test_a_process_sends_no_more_however_many_there_are(size):
    """Weak scaling of the dispatch: as many tokens each, so as many bytes each, to ever more processes. Twice forward, with the
    counts, dispatch and combine, and once backward the two in reverse: one message to every other process each time."""
    answers = world(size, parallel_run, [6] * size, torch.float32, size)
    sent(answers, 4 * WIDTH, 4 * WIDTH)
    assert all(answer["visits"] == 6 * CONFIG.num_experts_per_tok for answer in answers)  # one expert a rank
    assert [answer["messages"] for answer in answers] == [2 * 3 + 2] * size
