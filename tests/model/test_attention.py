from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cadre.model.attention import GroupedQueryAttention, LatentAttention, LayerCache
from cadre.model.config import ModelConfig
from cadre.model.rope import RotaryTable
from tests.shapes import configs, small

CPU = torch.device("cpu")
LATENT = ("deepseek_v3", "deepseek_v2")
GROUPED = ("glm4_moe", "qwen3_moe", "mixtral", "olmoe", "llama", "qwen2", "qwen3")
KINDS = [
    small("deepseek_v3"),
    small("deepseek_v3", q_lora_rank=None, attention_bias=True),
    small("deepseek_v2", v_head_dim=13),
    small("glm4_moe"),
    small("llama", num_key_value_heads=1),
    small("llama", num_key_value_heads=4, attention_bias=True),
]


class ListCache(LayerCache):
    """One layer's cache of several sequences: everything, joined. `count_B` says whose the next new positions are."""

    def __init__(self, sequences: int = 1) -> None:
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(sequences)]
        self.count_B = [0] * sequences

    def length(self, sequence: int) -> int:
        return sum(len(first) for first, _ in self.kept[sequence])

    def append(self, first: Tensor, second: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        stop = 0
        for kept, count in zip(self.kept, self.count_B, strict=True):
            rows = slice(stop, stop + count)
            kept.append((first[rows], second[rows]))
            stop += count
            if count:
                yield rows, torch.cat([part for part, _ in kept]), torch.cat([part for _, part in kept])


def attention(config: ModelConfig, seed: int = 0) -> LatentAttention | GroupedQueryAttention:
    module = LatentAttention(config) if config.attention == "latent" else GroupedQueryAttention(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            # Scores of order one, or a softmax would hardly tell positions apart.
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return module


def run(module: torch.nn.Module, config: ModelConfig, x_BTD: Tensor, **rest) -> Tensor:
    return module(x_BTD, RotaryTable(config)(x_BTD.shape[1], CPU), **rest)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(configs(LATENT), st.integers(1, 7), st.integers(1, 4), st.integers(0, 99))
def test_absorbed_equals_expanded(config: ModelConfig, seen, new, seed):
    new = min(new, seen)
    module, x = attention(config, seed), random(2, seen, config.hidden_size, seed=seed)
    turn = RotaryTable(config)(seen, CPU)
    latent, k = module.compress(x)
    q_nope, q_rotary = module.queries(x).split((module.nope, module.rotary), dim=-1)
    q_rotary, k_rotary = module.rotate(q_rotary, turn), module.rotate(k[:, :, None], turn)[:, :, 0]
    expanded = module.expanded(q_nope, q_rotary, latent, k_rotary)[:, seen - new :]
    absorbed = module.absorbed(q_nope[:, seen - new :], q_rotary[:, seen - new :], latent, k_rotary)
    assert_close(absorbed, expanded, atol=1e-4, rtol=1e-4)


@given(configs(), st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 99))
def test_cached_pieces_equal_the_whole(config: ModelConfig, pieces, seed):
    """A piece of every sequence at once as long as it has some: the cache must give what one pass over each gives."""
    module, table, cache = attention(config, seed), RotaryTable(config), ListCache(len(pieces))
    x = [random(sum(own), config.hidden_size, seed=seed + n) for n, own in enumerate(pieces)]
    outputs: list[list[Tensor]] = [[] for _ in pieces]
    for turn in range(max(map(len, pieces))):
        cache.count_B = [own[turn] if turn < len(own) else 0 for own in pieces]
        places = [torch.arange(count) + cache.length(n) for n, count in enumerate(cache.count_B)]
        new = torch.cat([own[place] for own, place in zip(x, places, strict=True)])
        out = module(new[None], table.at(torch.cat(places), 64), cache)[0]
        for own, part in zip(outputs, out.split(cache.count_B), strict=True):
            own.append(part)
    for own, whole in zip(outputs, x, strict=True):
        assert_close(torch.cat(own), run(module, config, whole[None])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", KINDS)
def test_later_tokens_never_change_earlier_outputs(config):
    module, x = attention(config), random(2, 9, config.hidden_size)
    before = run(module, config, x)
    for position in (1, 5, 8):
        changed = x.clone()
        changed[:, position:] += 1.0
        after = run(module, config, changed)
        assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


@pytest.mark.parametrize("config", KINDS)
def test_earlier_tokens_do_change_later_outputs(config):
    module, x = attention(config), random(1, 6, config.hidden_size)
    changed = x.clone()
    changed[:, 0] += 1.0
    difference = (run(module, config, changed) - run(module, config, x)).abs().amax(dim=(0, 2))
    assert torch.all(difference > 1e-4)


@given(configs(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_packed_documents_are_as_if_alone(config: ModelConfig, lengths, seed):
    """Scores depend on distance alone, so a document's place in the row is no matter."""
    module, x = attention(config, seed), random(1, sum(lengths), config.hidden_size, seed=seed)
    document = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])[None]
    packed = run(module, config, x, document_BT=document)
    alone = [run(module, config, part) for part in x.split(lengths, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("config", KINDS)
def test_every_weight_gets_a_gradient(config):
    module, x = attention(config), random(2, 5, config.hidden_size)
    run(module, config, x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-7, name


def test_grouped_heads_are_multi_head_attention_with_repeated_keys():
    grouped, full = small("llama", num_key_value_heads=2), small("llama", num_key_value_heads=4)
    ours, theirs = attention(grouped), attention(full)
    with torch.no_grad():
        theirs.q_proj.weight.copy_(ours.q_proj.weight)
        theirs.o_proj.weight.copy_(ours.o_proj.weight)
        for name in ("k_proj", "v_proj"):
            narrow = getattr(ours, name).weight.unflatten(0, (2, -1))
            getattr(theirs, name).weight.copy_(narrow.repeat_interleave(2, dim=0).flatten(0, 1))
    x = random(2, 5, 24)
    assert_close(run(ours, grouped, x), run(theirs, full, x))


def test_latent_cache_is_one_latent_and_one_rotary_key():
    config = small("deepseek_v3")
    module, cache = attention(config), ListCache()
    cache.count_B = [5]
    run(module, config, random(1, 5, config.hidden_size), cache=cache)
    assert [tuple(tensor.shape) for tensor in cache.kept[0][0]] == [(5, 10), (5, 4)]


def test_norms_inside_latent_attention_keep_their_own_epsilon():
    """transformers and DeepSeek's code: 1e-6 whatever rms_norm_eps says."""
    module = attention(small("deepseek_v3", rms_norm_eps=1e-2))
    assert (module.q_a_layernorm.eps, module.kv_a_layernorm.eps) == (1e-6, 1e-6)


@pytest.mark.parametrize("config", KINDS)
def test_bfloat16_stays_near_float32(config):
    module, x = attention(config), random(2, 9, config.hidden_size)
    low = run(module, config, x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), run(module, config, x), atol=0.06, rtol=0.05)
