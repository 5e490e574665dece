import random
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadre.infer.pages import PagePool
from cadre.infer.quantize import quantize_model
from cadre.infer.runner import Batch, PagedCache, Runner
from cadre.kernels.limits import products_keep_up
from tests.infer.conftest import assert_close, lively
from tests.shapes import FAMILIES, configs, small

YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.707,
    "mscale_all_dim": 0.707,
}  # fmt: skip
KINDS = {
    "latent, query rank": small("deepseek_v3"),
    "latent, no query rank": small("deepseek_v3", q_lora_rank=None),
    "latent, YaRN": small("deepseek_v3", rope_parameters=YARN),
    "latent, rotary halves": small("deepseek_v3", rope_interleave=False),
    "latent, narrow, so that absorbing pays": small("deepseek_v3", kv_lora_rank=3, qk_nope_head_dim=9, v_head_dim=9),
    "latent, V2": small("deepseek_v2"),
    "GQA": small("llama"),
    "MHA": small("llama", num_key_value_heads=4),
    "MQA": small("llama", num_key_value_heads=1),
    "GQA, experts": small("glm4_moe"),
    **{family: small(family) for family in ("qwen3_moe", "mixtral", "olmoe", "qwen2", "qwen3")},
}


def random_ids(config, length, seed=0):
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


class Reader:
    """Sequences that are read in pieces, on pages in any order."""

    def __init__(self, model, lengths, page_size=4, shuffled=False, seed=0, layers=None, native=False, dtype=torch.float32):
        self.model, self.seen = model, [0] * len(lengths)
        self.ids = [random_ids(model.config, length, seed + n) for n, length in enumerate(lengths)]
        needed = [-(-length // page_size) for length in lengths]
        self.pool = PagePool(model.config, pages=sum(needed) + 2, page_size=page_size, dtype=dtype, layers=layers)
        # What was never written must not matter.
        self.pool.first.fill_(float("nan"))
        self.pool.second.fill_(float("nan"))
        pages = list(range(sum(needed) + 2))
        if shuffled:
            random.Random(seed).shuffle(pages)
        self.pages = [[pages.pop(0) for _ in range(count)] for count in needed]
        self.runner = Runner(model, self.pool)
        assert self.runner.native is not None
        if not native:
            self.runner.native = None

    def batch(self, work, shift=0):
        """The next `count` tokens of each (sequence, count)."""
        width = max(len(self.pages[n]) for n, _ in work)
        return Batch(
            ids_T=torch.cat([self.ids[n][self.seen[n] + shift :][:count] for n, count in work]),
            position_T=torch.cat([torch.arange(self.seen[n], self.seen[n] + count) for n, count in work]),
            count_B=[count for _, count in work],
            start_B=[self.seen[n] for n, _ in work],
            page_BP=torch.tensor([self.pages[n] + [0] * (width - len(self.pages[n])) for n, _ in work], dtype=torch.int32),
        )

    def read(self, *work):
        hidden = self.runner.hidden(self.batch(work))
        for n, count in work:
            self.seen[n] += count
        return self.runner.logits(hidden).split([count for _, count in work])


@torch.inference_mode()
def plain(model, ids):
    return model(ids[None])[0]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_recomputed(kind, shuffled, native):
    reader = Reader(lively(KINDS[kind]), [24], shuffled=shuffled, native=native)
    logits = [reader.read((0, count))[0] for count in [10, *[1] * 8, 3, 3]]
    assert_close(torch.cat(logits), plain(reader.model, reader.ids[0]))


@given(
    config=configs(),
    pieces=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=4),
    page_size=st.integers(1, 9),
    seed=st.integers(0, 99),
    rows=st.integers(0, 8),
)
def test_any_batch_and_partition_gives_the_same_logits(config, pieces, page_size, seed, rows):
    """Each pass reads a piece of a random choice of the sequences that have one left; pieces of at most `rows` tokens run
    natively, a few at a time, the others through torch, all on the same pages."""
    config = config.model_copy(update={"max_position_embeddings": 64})
    lengths, shuffled = [sum(own) for own in pieces], seed % 2 == 1
    reader = Reader(lively(config, seed), lengths, page_size, shuffled=shuffled, seed=seed, native=True)
    draw, left, logits = random.Random(seed), [list(own) for own in pieces], [[] for _ in pieces]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cadre.infer.runner.NATIVE_TOKENS", rows)
        patch.setattr("cadre.infer.runner.NATIVE_ROWS", rows + seed % 7)
        while any(left):
            able = [n for n, own in enumerate(left) if own]
            chosen = draw.sample(able, draw.randint(1, len(able)))
            for n, part in zip(chosen, reader.read(*((n, left[n].pop(0)) for n in chosen)), strict=True):
                logits[n].append(part)
    for own, ids in zip(logits, reader.ids, strict=True):
        assert_close(torch.cat(own), plain(reader.model, ids))


def test_position_matters_to_the_cache():
    """The tests above would pass a model that ignores what came before; this one would not."""
    model = lively(small("deepseek_v3"))
    one, other = Reader(model, [12]), Reader(model, [12])
    other.ids[0][[2, 5]] = other.ids[0][[5, 2]]
    assert one.ids[0][2] != one.ids[0][5]
    changed = [reader.read((0, 11)) and reader.read((0, 1))[0] for reader in (one, other)]
    assert (changed[0] - changed[1]).abs().max() > 1e-2


def test_pages_that_follow_each_other_are_read_without_copying():
    reader = Reader(lively(small("llama")), [7, 9], page_size=4)
    reader.pages[1] = [2, 4, 3]
    layer = PagedCache(reader.pool, reader.batch([(0, 7), (1, 9)])).layer(1)
    new = torch.randn(16, 2, 8)
    (rows, first, _), (other_rows, other, _) = layer.append(new, new)
    assert (rows, other_rows) == (slice(0, 7), slice(7, 16))
    assert first.data_ptr() == reader.pool.first[1].data_ptr()
    assert torch.equal(first, new[:7])
    assert torch.equal(other, new[7:])


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_bfloat16_on_any_cpu(family, compute, fast, monkeypatch):
    """Float32 arithmetic where bfloat16's would be emulated, native or not; the cache is bfloat16 and the model as before."""
    monkeypatch.setattr("cadre.infer.runner._best_dtype", lambda device: fast)
    exact = lively(small(family, initializer_range=0.1))
    model = lively(small(family, initializer_range=0.1)).to(torch.float32 if compute else torch.bfloat16)
    model.compute_dtype = compute
    for native in (False, True):
        reader = Reader(model, [12], dtype=torch.bfloat16, native=native, shuffled=True)
        # Where training's kernels take bfloat16 weights as they are, all else is float32.
        assert reader.runner.dtype == (torch.float32 if compute is None and products_keep_up() else fast)
        logits = torch.cat([reader.read((0, count))[0] for count in (7, 1, 1, 3)])
        want = plain(exact, reader.ids[0])
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, want, atol=0.1 * float(want.abs().max()), rtol=0)
    assert model.compute_dtype == compute


@pytest.mark.skipif(not products_keep_up(), reason="the processor has no products of bfloat16, or faster ones than ours")
@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "glm4_moe", "llama"])
def test_long_pieces_of_bfloat16_lose_less_than_in_torch(family, bits, monkeypatch):
    """Float32 but for the factors of products and the cache, of quantized models as well; the experts chosen are told and
    counted."""
    monkeypatch.setattr("cadre.infer.runner.NATIVE_TOKENS", 4)
    monkeypatch.setattr("cadre.infer.runner._best_dtype", lambda device: torch.bfloat16)
    # Every token goes to every expert: where two are nearly level, rounding would make another choice.
    every = {} if family == "llama" else {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    config = small(family, initializer_range=0.1, num_hidden_layers=3, **every)
    model = lively(config).to(torch.bfloat16)
    if bits:
        quantize_model(model, bits)
    exact = deepcopy(model).float()
    exact.compute_dtype = torch.float32
    off = {True: 0.0, False: 0.0}
    for native, seed in product(off, range(4)):  # of a single text, rounding may be lucky
        reader = Reader(model, [40, 33], dtype=torch.bfloat16, native=native, shuffled=True, seed=seed)
        if not native:
            reader.runner.dtype = torch.bfloat16
        batch = reader.batch([(0, 20), (1, 33)])
        batch.experts = []
        hidden = reader.runner.hidden(batch)
        reader.seen = [20, 33]
        later = torch.cat([reader.read((0, 1))[0], reader.read((0, 19))[0]])
        got, want = torch.cat([reader.runner.logits(hidden)[:20], later]), plain(exact, reader.ids[0])
        off[native] += float((got - want).norm() / want.norm()) / 4
        if config.has_experts:
            assert [len(own) for own in batch.experts] == [53] * len(batch.experts)
            load = reader.runner.load()
            assert int(load.sum()) == sum(own.numel() for own in batch.experts) + 20 * config.num_experts_per_tok * len(load)
    assert off[True] < off[False] < 0.03, off


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_forward_pass_that_failed_is_forgotten(monkeypatch):
    reader = Reader(lively(small("deepseek_v3")), [8])
    before = reader.read((0, 4))[0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reader.model.layers[1].mlp, "forward", interrupt)
        reader.read((0, 3))
    assert reader.seen == [4]
    assert not any(router._forward_hooks for router in reader.runner._routers)
    assert_close(torch.cat((before, reader.read((0, 4))[0])), plain(reader.model, reader.ids[0]))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_modules_in_pieces_equal_the_whole(family, native):
    """Both modules over all positions at once, against pieces of two sequences through the cache."""
    model = lively(small(family, num_nextn_predict_layers=2))
    reader = Reader(model, [14, 11], shuffled=True, layers=4, native=native)
    want = []
    with torch.inference_mode():
        for ids in reader.ids:
            count = len(ids) - 2
            stages = [model.hidden(ids[None, :count])]
            for depth in range(2):
                stages.append(model.mtp_hidden(stages[-1], ids[None, depth + 1 : depth + 1 + count], depth))
            want.append([stage[0] for stage in stages])
    got = [[[], [], []], [[], [], []]]
    for work in ([(0, 5), (1, 3)], [(1, 1)], [(0, 6), (1, 5)], [(0, 1)]):
        stages = [reader.runner.hidden(reader.batch(work))]
        for depth in range(2):
            stages.append(reader.runner.draft_hidden(depth, stages[-1], reader.batch(work, shift=depth + 1)))
        for n, count in work:
            reader.seen[n] += count
        for stage, hidden in enumerate(stages):
            for (n, _), part in zip(work, hidden.split([count for _, count in work]), strict=True):
                got[n][stage].append(part)
    for own, whole in zip(got, want, strict=True):
        for parts, stage in zip(own, whole, strict=True):
            assert_close(torch.cat(parts), stage)


@torch.inference_mode()
def test_threads_share_a_model(monkeypatch):
    """Each with a runner of its own: neither the experts that passes through torch tell nor the model's dtype get mixed."""
    monkeypatch.setattr("cadre.infer.runner.NATIVE_TOKENS", 0)
    monkeypatch.setattr("cadre.infer.runner._best_dtype", lambda device: torch.float32)
    model = lively(small("deepseek_v3", num_hidden_layers=3))
    model.compute_dtype = torch.bfloat16
    readers = [Reader(model, [20 + place], seed=place) for place in range(3)]

    def experts(reader):
        with torch.inference_mode():
            batch = reader.batch([(0, len(reader.ids[0]))])
            batch.experts = []
            reader.runner.hidden(batch)
            return batch.experts

    want = [experts(reader) for reader in readers]
    with ThreadPoolExecutor(3) as threads:
        for _ in range(15):
            for got, own in zip(threads.map(experts, readers), want, strict=True):
                assert len(got) == len(own) == 2
                assert all(map(torch.equal, got, own))
    assert model.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [0, 2, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_told_and_counted(family, rows, monkeypatch):
    """Native or not."""
    monkeypatch.setattr("cadre.infer.runner._COUNT_EVERY", 3)
    monkeypatch.setattr("cadre.infer.runner.NATIVE_ROWS", 4)
    monkeypatch.setattr("cadre.infer.runner.NATIVE_TOKENS", rows)
    model = lively(small(family, num_hidden_layers=3))
    reader, told = Reader(model, [9, 8], native=True), []
    for work in ([(0, 4), (1, 4)], [(0, 1)], [(1, 4), (0, 2)], [(0, 1)], [(0, 1)]):
        batch = reader.batch(work)
        batch.experts = []
        reader.runner.hidden(batch)
        for n, count in work:
            reader.seen[n] += count
        told += batch.experts
    layers = [mixture.gate for _, mixture in model.sparse_layers()]
    routes = {}
    for place, router in enumerate(layers):
        router.register_forward_hook(lambda router, inputs, found, place=place: routes.update({place: found.expert_TK}))
    want = [[] for _ in layers]
    for ids in (reader.ids[0], reader.ids[1]):
        plain(model, ids)
        for place, own in enumerate(want):
            own.append(routes[place])
    got = [torch.cat(told[place :: len(layers)]) for place in range(len(layers))]
    order = torch.tensor([*range(4), 9, 10, 11, 12, 4, 13, 14, 15, 16, 5, 6, 7, 8])
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours.sort().values, torch.cat(theirs)[order].sort().values)
    load = reader.runner.load()
    assert load.shape == (len(layers), model.config.n_routed_experts or 0)
    for count, own in zip(load, want, strict=True):
        assert torch.equal(count, torch.bincount(torch.cat(own).flatten(), minlength=6))
    assert torch.equal(reader.runner.load(), load)
