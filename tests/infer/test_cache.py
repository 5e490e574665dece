import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.errors import UsageError
from cadre.infer.cache import DecodingCache
from cadre.model.transformer import Transformer
from cadre.plan.count import count
from tests.shapes import FAMILIES, configs, small

YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.707,
    "mscale_all_dim": 0.707,
}  # fmt: skip
CORNERS = {
    "latent, query rank": small("deepseek_v3"),
    "latent, no query rank": small("deepseek_v3", q_lora_rank=None),
    "latent, YaRN": small("deepseek_v3", rope_parameters=YARN),
    "latent, rotary halves": small("deepseek_v3", rope_interleave=False),
    "latent, V2": small("deepseek_v2"),
    "GQA": small("llama"),
    "MHA": small("llama", num_key_value_heads=4),
    "MQA": small("llama", num_key_value_heads=1),
    "GQA, experts": small("glm4_moe"),
}


def lively(config, seed=0):
    """A model with weights large enough that attention is far from uniform."""
    return Transformer(config.model_copy(update={"initializer_range": 0.3})).initialize(seed).eval()


def random_ids(config, batch, length, seed=0):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def in_pieces(model, ids, pieces, capacity=None):
    """Logits of ids read through a cache, `pieces` tokens at a time."""
    cache = DecodingCache(model.config, len(ids), capacity or ids.shape[1], torch.float32)
    logits, start = [], 0
    for piece in pieces:
        logits.append(model(ids[:, start : start + piece], cache))
        start += piece
        assert cache.length == start
    return torch.cat(logits, dim=1)


def assert_close(cached, whole):
    scale = float(whole.abs().max())
    torch.testing.assert_close(cached, whole, atol=1e-4 * max(scale, 1.0), rtol=0)


@pytest.mark.parametrize("corner", CORNERS)
@torch.inference_mode()
def test_cached_logits_equal_recomputed(corner):
    model = lively(CORNERS[corner])
    ids = random_ids(model.config, 2, 24)
    assert_close(in_pieces(model, ids, [10] + [1] * 14, capacity=30), model(ids))


@given(config=configs(), pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.integers(0, 99))
@torch.inference_mode()
def test_any_partition_gives_the_same_logits(config, pieces, seed):
    config = config.model_copy(update={"max_position_embeddings": 64})
    model = lively(config, seed)
    ids = random_ids(config, 2, sum(pieces), seed)
    assert_close(in_pieces(model, ids, pieces), model(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_independent(family):
    model = lively(small(family))
    ids = random_ids(model.config, 3, 12)
    together = in_pieces(model, ids, [6, 1, 5])
    for row in range(3):
        assert_close(in_pieces(model, ids[row : row + 1], [6, 1, 5]), together[row : row + 1])


def test_position_matters_to_the_cache():
    """The tests above would pass a model that ignores what came before; this one would not."""
    model = lively(small("deepseek_v3"))
    ids = random_ids(model.config, 1, 12)
    swapped = ids.clone()
    swapped[0, [2, 5]] = ids[0, [5, 2]]
    assert ids[0, 2] != ids[0, 5]
    changed = in_pieces(model, swapped, [11, 1])[:, -1] - in_pieces(model, ids, [11, 1])[:, -1]
    assert changed.abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_token_are_those_counted_from_the_config(family, dtype):
    config = small(family)
    expected = count(config, cache_bytes=dtype.itemsize).kv_cache_bytes_per_token
    assert DecodingCache(config, 2, 5, dtype).bytes_per_token == expected


def test_latents_are_all_that_is_kept():
    config = small("deepseek_v3")
    layer = DecodingCache(config, 2, 5, torch.float32).layer(0)
    latent, key = layer.append(torch.ones(2, 3, 10), torch.ones(2, 3, 4))
    assert (latent.shape, key.shape) == ((2, 3, 10), (2, 3, 4))


def test_append_writes_in_place():
    cache = DecodingCache(small("llama"), 1, 4, torch.float32)
    first, _ = cache.layer(1).append(torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8))
    cache.advance(2)
    second, _ = cache.layer(1).append(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))
    assert first.data_ptr() == second.data_ptr()
    assert second[0, :, 0, 0].tolist() == [1, 1, 0]


def test_a_forward_pass_that_failed_is_forgotten(monkeypatch):
    model = lively(small("deepseek_v3"))
    ids = random_ids(model.config, 1, 8)
    cache = DecodingCache(model.config, 1, 8, torch.float32)
    with torch.inference_mode():
        model(ids[:, :4], cache)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.layers[1].mlp, "forward", interrupt)
            model(random_ids(model.config, 1, 3, seed=1), cache)
        assert cache.length == 4
        assert_close(model(ids[:, 4:], cache), model(ids)[:, 4:])


def interrupt(*_):
    raise KeyboardInterrupt


@torch.inference_mode()
def test_overflow_is_refused():
    model = lively(small("llama"))
    cache = DecodingCache(model.config, 1, 6, torch.float32)
    model(random_ids(model.config, 1, 5), cache)
    with pytest.raises(UsageError, match="holds 5 of 6 tokens and cannot take 2 more"):
        model(random_ids(model.config, 1, 2), cache)
    model(random_ids(model.config, 1, 1), cache)
    assert cache.length == 6


@pytest.mark.parametrize("length", [0, -1, 65])
def test_capacity_outside_the_context_is_refused(length):
    with pytest.raises(UsageError, match="1 to 64"):
        DecodingCache(small("llama"), 1, length, torch.float32)
