"""A sequence split over ranks is the sequence: attention and its gradients, the bytes sent, a whole training."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cadre.model.attention import GroupedQueryAttention, LatentAttention
from cadre.model.config import ModelConfig
from cadre.model.rope import RotaryTable
from cadre.train.parallel.context import ContextGroup, ContextParallelGroupedQueryAttention, ContextParallelLatentAttention
from cadre.train.parallel.group import Parallel
from tests.shapes import small
from tests.train.parallel.test_equal import EVERYTHING, assert_same_run, recipe, several, train
from tests.train.parallel.world import world

__all__ = ["recipe"]
CONFIGS = [
    small("deepseek_v3"),
    small("deepseek_v2", rope_interleave=False),
    small("llama", attention_bias=True),
    small("glm4_moe"),
    small("qwen3_moe"),
    small("olmoe"),
]
BATCH = 2
Problem = tuple[int, int, bool, int]  # which config, length of a chunk, with documents, seed


def tokens(config: ModelConfig, length: int, seed: int) -> Tensor:
    return torch.randn(BATCH, length, config.hidden_size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def rest(config: ModelConfig, length: int, documents: bool, seed: int) -> tuple[Tensor, None, Tensor | None]:
    begins = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    return RotaryTable(config)(length, torch.device("cpu")), None, begins.cumsum(dim=1) if documents else None


def run(layer: torch.nn.Module, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, and gradients of input and parameters of half the sum of its squares."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    y = layer(x, *others)
    gradients = torch.autograd.grad(y.square().sum() / 2, (x, *layer.parameters()))
    return y.detach(), gradients[0], list(gradients[1:])


def parallel_runs(ranks: Parallel, problems: list[Problem]) -> list[tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    group = ContextGroup(dist.group.WORLD)
    answers = []
    for which, chunk, documents, seed in problems:
        config, length = CONFIGS[which], 2 * ranks.size * chunk
        kind = ContextParallelLatentAttention if config.attention == "latent" else ContextParallelGroupedQueryAttention
        own_T = group.own(length, torch.device("cpu"))
        x = tokens(config, length, seed).detach()[:, own_T].requires_grad_()
        answers.append((own_T, *run(kind(config, group), x, *rest(config, length, documents, seed))))
    return answers


problems = st.tuples(st.integers(0, len(CONFIGS) - 1), st.integers(1, 40), st.booleans(), st.integers(0, 999))


@pytest.mark.parametrize("size", [2, 4])
@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # many problems in each of a few worlds
@given(drawn=st.lists(problems, min_size=8, max_size=8))
def test_attention_of_a_split_sequence_is_that_of_the_whole(size, drawn):
    answers = world(size, parallel_runs, drawn)
    for (which, chunk, documents, seed), parts in zip(drawn, zip(*answers, strict=True), strict=True):
        config, length = CONFIGS[which], 2 * size * chunk
        kind = LatentAttention if config.attention == "latent" else GroupedQueryAttention
        y, x_grad, grads = run(kind(config), tokens(config, length, seed), *rest(config, length, documents, seed))
        own = torch.cat([own_T for own_T, *_ in parts])
        assert sorted(own.tolist()) == list(range(length))
        torch.testing.assert_close(torch.cat([y for _, y, _, _ in parts], dim=1), y[:, own], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat([x for _, _, x, _ in parts], dim=1), x_grad[:, own], rtol=1e-4, atol=1e-4)
        for gradient, *shares in zip(grads, *(its for *_, its in parts), strict=True):
            torch.testing.assert_close(torch.stack(shares).sum(dim=0), gradient, rtol=1e-4, atol=1e-3)


V3 = {"num_attention_heads": 128, "hidden_size": 8}
KEPT = {  # elements of a position: of DeepSeek-V3's attention, of multi-head attention as wide, of 8 groups of it
    512 + 64: small("deepseek_v3", **V3, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    2 * 128 * 128: small("llama", **V3, num_key_value_heads=128, head_dim=128),
    2 * 8 * 128: small("llama", **V3, num_key_value_heads=8, head_dim=128),
}
LENGTH = 16


def sent(ranks: Parallel) -> list[tuple[int, int]]:
    group, answers = ContextGroup(dist.group.WORLD), []
    for config in KEPT.values():
        kind = ContextParallelLatentAttention if config.attention == "latent" else ContextParallelGroupedQueryAttention
        layer, x = kind(config, group).bfloat16(), tokens(config, LENGTH // ranks.size, 0).bfloat16()
        group.sent_bytes = 0
        y = layer(x, *rest(config, LENGTH, False, 0))
        forward = group.sent_bytes
        y.sum().backward()
        answers.append((forward, group.sent_bytes))
    return answers


def test_the_bytes_sent_are_those_that_a_cache_would_keep():
    """Own tokens x kept width x (ranks - 1), and gradients as much again: latent attention 1/57 of multi-head attention."""
    formula = [BATCH * LENGTH // 2 * width * 2 for width in KEPT]
    assert world(2, sent) == [[(forward, 2 * forward) for forward in formula]] * 2
    assert formula[1] / formula[0] == pytest.approx(57, rel=0.01)


class Attentions(TorchDispatchMode):
    """Counts how often torch's own attention computes, backward passes left out."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "_scaled_dot_product" in op.name() and not op.name().endswith("_backward")
        return op(*args, **(kwargs or {}))


def expansions(ranks: Parallel) -> list[tuple[int, int, int]]:
    """Once with our kernel and once with torch's: how often latents are expanded in a pass and back, how many of the first are
    still there in between, and how often torch's attention computed."""
    answers = []
    for count in (nullcontext(Attentions()), Attentions()):
        layer, made = ContextParallelLatentAttention(CONFIGS[0], ContextGroup(dist.group.WORLD)), []
        layer.kv_b_proj.register_forward_hook(lambda module, arguments, out, made=made: made.append(weakref.ref(out)))
        with count as attentions:
            y = layer(tokens(CONFIGS[0], LENGTH // ranks.size, 0), *rest(CONFIGS[0], LENGTH, True, 0))
            alive = sum(expanded() is not None for expanded in made)
            y.sum().backward()
        answers.append((len(made), alive, attentions.count))
    return answers


def test_latents_are_expanded_again_in_the_backward_pass_and_attention_is_kept():
    assert world(2, expansions) == [[(2, 0, 0), (2, 0, 2)]] * 2


def test_every_rank_has_as_much_to_see():
    answers = world(4, lambda ranks: ContextGroup(dist.group.WORLD).own(48, torch.device("cpu")).tolist())
    assert answers[1] == [*range(6, 12), *range(36, 42)]
    assert {sum(position + 1 for position in own) for own in answers} == {48 * 49 // 2 // 4}


def test_a_split_sequence_changes_no_number(tmp_path, recipe):
    settings = (*EVERYTHING, "balance.batch_weight=0.01", "train.micro_batch=8", "train.steps=5", "eval.every=5")
    train(Parallel(), recipe, tmp_path / "alone", settings)
    world(2, several, recipe, tmp_path, {"split": {"context": 2, "expert": 2}}, settings)
    assert_same_run(tmp_path / "alone", tmp_path / "split")
