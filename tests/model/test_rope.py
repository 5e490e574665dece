from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from cadre.kernels.rotary import rotate_halves, rotate_pairs
from cadre.model.config import ModelConfig
from cadre.model.rope import RotaryTable, frequencies, softmax_scale, yarn_magnitude
from tests import published
from tests.shapes import configs, small

CPU = torch.device("cpu")
ROTATIONS = [rotate_pairs, rotate_halves]


@pytest.mark.parametrize(("name", "multiplier"), [("DeepSeek-V3", 1.874), ("DeepSeek-V2-Lite", 1.590)])
def test_yarn_sharpens_the_softmax_of_published_models(name, multiplier):
    config = ModelConfig.from_hf(published.ALL[name])
    assert round(softmax_scale(config) * config.qk_head_dim**0.5, 3) == multiplier


def test_softmax_scale_without_scaling_and_with_grouped_attention():
    assert softmax_scale(small("deepseek_v3")) == 10**-0.5
    assert softmax_scale(ModelConfig.from_hf(published.LLAMA_3_1_405B)) == 128**-0.5


def test_yarn_magnitude():
    assert yarn_magnitude(1.0) == yarn_magnitude(0.5) == 1.0
    assert yarn_magnitude(40.0, 0.707) == pytest.approx(1 + 0.0707 * math.log(40))


def rope_of(rotary_dim: int, theta: float, context: int) -> ModelConfig:
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": context}
    return small("deepseek_v3", qk_rope_head_dim=rotary_dim, rope_parameters=rope)


@given(configs())
@example(rope_of(4, 2.0, 4096))  # both ends of the ramp beyond the last pair
@example(rope_of(8, 100.0, 2))  # both before the first
def test_frequencies_are_those_of_transformers(config: ModelConfig):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.hidden_size % config.num_attention_heads:
        config = config.model_copy(update={"hidden_size": 12})
    freq, magnitude = frequencies(config)
    rope = config.rope_parameters
    if rope.rope_type == "default":
        want = torch.tensor([rope.rope_theta ** (-2 * i / config.rotary_dim) for i in range(config.rotary_dim // 2)])
        want_magnitude = 1.0
    else:
        theirs = AutoConfig.for_model(**config.to_hf())
        want, want_magnitude = ROPE_INIT_FUNCTIONS[rope.rope_type](theirs)
    assert_close(freq, want)
    assert magnitude == pytest.approx(want_magnitude)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    config = ModelConfig.from_hf(published.DEEPSEEK_V3)
    freq, magnitude = frequencies(config)
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    assert magnitude == 1.0
    assert_close(freq[0], plain[0])
    assert_close(freq[-1], plain[-1] / 40)
    assert torch.all(freq.diff() < 0)


def plainly_rotated(x: list[float], position: int, freq: list[float], pairs: list[tuple[int, int]]) -> list[float]:
    """The textbook formula, one pair after the other."""
    result = list(x)
    for angle, (first, second) in zip((position * f for f in freq), pairs, strict=True):
        result[first] = x[first] * math.cos(angle) - x[second] * math.sin(angle)
        result[second] = x[first] * math.sin(angle) + x[second] * math.cos(angle)
    return result


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotation_is_the_textbook_formula(rotate):
    config = small("deepseek_v3", qk_rope_head_dim=6)
    x = torch.randn(2, 5, 3, 6)
    turn = RotaryTable(config)(9, CPU)[4:]
    freq = frequencies(config)[0].tolist()
    pairs = [(0, 1), (2, 3), (4, 5)] if rotate is rotate_pairs else [(0, 3), (1, 4), (2, 5)]
    want = torch.tensor(
        [[[plainly_rotated(head, 4 + t, freq, pairs) for head in heads] for t, heads in enumerate(row)] for row in x.tolist()]
    )
    assert_close(rotate(x, turn), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotate", ROTATIONS)
@given(distance=st.integers(0, 40), start=st.integers(0, 60), seed=st.integers(0, 99))
def test_scores_depend_on_distance_alone(rotate, distance, start, seed):
    config = small("deepseek_v3", qk_rope_head_dim=8)
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 8, generator=generator)
    table = RotaryTable(config)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned = [rotate(x.view(1, 1, 1, 8), table(at + 1, CPU)[at:]).flatten() for x, at in ((q, query_at), (k, key_at))]
        return turned[0] @ turned[1]

    assert_close(score(start + distance, start), score(distance, 0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotation_keeps_length_and_dtype_and_starts_at_the_identity(rotate):
    x = torch.randn(2, 7, 3, 4)
    turn = RotaryTable(small("deepseek_v3"))(7, CPU)
    turned = rotate(x, turn)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert_close(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1], x[:, 1])
    assert rotate(x.bfloat16(), turn).dtype == torch.bfloat16


def test_a_table_reaches_as_far_as_is_asked_and_serves_training_whoever_made_it():
    config = small("deepseek_v3")
    first, grown = RotaryTable(config), RotaryTable(config)
    with torch.inference_mode():
        grown(5, CPU)
    assert not grown(5, CPU).is_inference()  # autograd refuses those
    assert len(first(300, CPU)) == 300
    assert torch.equal(grown(300, CPU), first(300, CPU))


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotation_takes_any_memory_layout(rotate):
    wide = torch.randn(2, 3, 1, 9)
    turn = RotaryTable(small("deepseek_v3"))(3, CPU)
    slice_at_odd_offset = wide[..., 5:]
    assert_close(rotate(slice_at_odd_offset, turn), rotate(slice_at_odd_offset.clone(), turn))


def test_both_pairings_score_alike_under_a_permutation():
    """Halves over (even, odd) dimensions are pairs: what transformers' de-interleaving of V3 relies on."""
    q, k = torch.randn(2, 1, 5, 2, 8)
    turn = RotaryTable(small("deepseek_v3", qk_rope_head_dim=8))(5, CPU)
    apart = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves = (rotate_halves(q[..., apart], turn) * rotate_halves(k[..., apart], turn)).sum(-1)
    pairs = (rotate_pairs(q, turn) * rotate_pairs(k, turn)).sum(-1)
    assert_close(halves, pairs)


def test_table_grows_and_carries_yarns_magnitude():
    rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}
    config = small("deepseek_v3", rope_parameters=rope)
    table = RotaryTable(config)
    first = table(8, CPU).clone()
    assert_close(first.abs(), torch.full_like(first.abs(), yarn_magnitude(40.0)))
    assert table(1003, CPU).shape == (1003, 2)
    assert_close(table(8, CPU), first, rtol=0, atol=0)
