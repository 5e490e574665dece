"""The C++ decoding kernels against the plain forward pass: every architecture, ragged batches, shuffled pages."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cadre.infer.native import NativeModel
from cadre.infer.quantize import quantize_model
from cadre.kernels.native.library import library, own_products_faster, why_missing
from cadre.kernels.native.structs import Keeper
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer
from tests.shapes import FAMILIES, configs, small


def test_the_kernels_are_built_here() -> None:
    assert library() is not None, why_missing()


def pool(config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype = torch.float32) -> Any:
    if config.attention == "latent":
        widths = [(config.kv_lora_rank,), (config.qk_rope_head_dim,)]
    else:
        widths = [(config.num_key_value_heads, config.head_dim)] * 2
    first, second = (torch.full((config.total_layers, pages, page_size, *width), float("nan"), dtype=dtype) for width in widths)
    return SimpleNamespace(first=first, second=second, page_size=page_size)


def step(ids: list[list[int]], starts: list[int], tables: list[list[int]]) -> Any:
    columns = max(map(len, tables))
    return SimpleNamespace(
        ids_T=torch.tensor([token for row in ids for token in row]),
        position_T=torch.tensor([start + i for row, start in zip(ids, starts, strict=True) for i in range(len(row))]),
        count_B=[len(row) for row in ids],
        start_B=starts,
        page_BP=torch.tensor([table + [0] * (columns - len(table)) for table in tables], dtype=torch.int32),
    )


def randomized(config: ModelConfig, seed: int, std: float = 0.4) -> Transformer:
    """Weights large enough that every part matters, norms and biases included."""
    model = Transformer(config).initialize(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.empty_like(value).normal_(std=std, generator=generator)
            value.copy_(1 + noise if "norm" in name else noise)
    return model


@torch.inference_mode()
def decode(native: NativeModel, rows: list[list[int]], draw: random.Random, page_size: int) -> list[Tensor]:
    """Feed sequences in random pieces, all that have some left at once; logits of every position of each."""
    need = [-(-len(row) // page_size) for row in rows]
    numbers = draw.sample(range(sum(need)), sum(need))
    tables = [[numbers.pop() for _ in range(count)] for count in need]
    done, out = [0] * len(rows), [[] for _ in rows]
    while any(done[i] < len(row) for i, row in enumerate(rows)):
        live = [i for i, row in enumerate(rows) if done[i] < len(row)]
        pieces = [rows[i][done[i] : done[i] + draw.randint(1, 7)] for i in live]
        batch = step(pieces, [done[i] for i in live], [tables[i] for i in live])
        parts = native.logits(native.hidden(batch)).split(batch.count_B)
        for i, piece, part in zip(live, pieces, parts, strict=True):
            out[i].append(part)
            done[i] += len(piece)
    return [torch.cat(parts) for parts in out]


@given(config=configs(), seed=st.integers(0, 10_000), page_size=st.sampled_from([1, 3, 16]), sequences=st.integers(1, 4))
@settings(max_examples=150)
def test_logits_of_any_batch_are_those_of_a_full_forward(
    config: ModelConfig, seed: int, page_size: int, sequences: int
) -> None:
    draw = random.Random(seed)
    model = randomized(config, seed)
    length = min(config.max_position_embeddings, 40)
    rows = [[draw.randrange(config.vocab_size) for _ in range(draw.randint(1, length))] for _ in range(sequences)]
    native = NativeModel.build(model, pool(config, sequences * length, page_size))
    assert native is not None
    for row, logits in zip(rows, decode(native, rows, draw, page_size), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([row]))[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("page_size", [8, 5])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_has_the_same_bits_in_any_company(family: str, kind: str, page_size: int) -> None:
    """Row by row equality, not closeness: sampling must not depend on who else is served."""
    config = small(family, hidden_size=72, max_position_embeddings=640)
    if config.has_experts:
        config = config.model_copy(update={"moe_intermediate_size": 40})
    if config.attention == "latent":
        config = config.model_copy(update={"kv_lora_rank": 24})
    model, draw = randomized(config, 3, 0.1), random.Random(3)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    elif kind != "float32":
        model = quantize_model(model, kind)
    rows = [[draw.randrange(31) for _ in range(length)] for length in (5, 600, 17, 300)]
    kept = pool(config, 200, page_size, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    together, alone = NativeModel.build(model, kept), NativeModel.build(model, kept)
    assert together is not None and alone is not None
    alone.threads = 1
    shared = decode(together, rows, random.Random(1), page_size)
    for row, logits in zip(rows, shared, strict=True):
        assert torch.equal(decode(alone, [row], random.Random(2), page_size)[0], logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_attention_in_waves_has_the_same_bits(family: str) -> None:
    """Many wide heads: the partial results of a pass do not fit at once, and how many do depends on the threads."""
    wide = dict(kv_lora_rank=510) if family == "deepseek_v3" else dict(head_dim=512, num_key_value_heads=2)
    config = small(family, num_attention_heads=64, max_position_embeddings=600, num_hidden_layers=1, **wide)
    model = randomized(config, 4, 0.05)
    row = [random.Random(4).randrange(31) for _ in range(300)]
    logits = []
    for threads, pieces in ((1, [250, 50]), (2, [250, 50]), (3, [250, 20, 1, 29])):
        native = NativeModel.build(model, pool(config, 300, 1))
        assert native is not None
        native.threads = threads
        with torch.inference_mode():
            done, out = 0, []
            for count in pieces:
                out.append(native.logits(native.hidden(step([row[done : done + count]], [done], [list(range(300))]))))
                done += count
        logits.append(torch.cat(out))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    with torch.inference_mode():
        expected = model(torch.tensor([row]))[0]
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


@given(tokens=st.integers(1, 20), rows=st.integers(1, 70), cols=st.integers(1, 200), seed=st.integers(0, 10_000))
def test_products_with_bfloat16(tokens: int, rows: int, cols: int, seed: int) -> None:
    """Rows are rounded like the matrix where the processor multiplies bfloat16, and only there; sums are float32."""
    kernels, keep = library(), Keeper()
    assert kernels is not None
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).to(torch.bfloat16)
    x, y = torch.randn(tokens, cols, generator=generator), torch.empty(tokens, rows)
    kernels.cadre_linear(keep.matrix(weight), x.data_ptr(), tokens, 2, y.data_ptr())
    factor = x.to(torch.bfloat16) if own_products_faster(narrow=True) else x
    expected = factor.double() @ weight.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * cols**0.5)


@given(
    family=st.sampled_from(["deepseek_v3", "glm4_moe"]), width=st.sampled_from([8, 20, 32, 40, 64, 72, 104]),
    length=st.integers(1, 330), page_size=st.sampled_from([1, 3, 16]), seed=st.integers(0, 10_000),
)  # fmt: skip
@settings(max_examples=60)
def test_bfloat16_weights_and_cache(family: str, width: int, length: int, page_size: int, seed: int) -> None:
    wide = dict(kv_lora_rank=width) if family == "deepseek_v3" else dict(head_dim=width)
    config = small(family, max_position_embeddings=512, first_k_dense_replace=2, num_hidden_layers=2, **wide)
    model, draw = randomized(config, seed, 0.2).to(torch.bfloat16), random.Random(seed)
    row = [draw.randrange(31) for _ in range(length)]
    native = NativeModel.build(model, pool(config, length, page_size, torch.bfloat16))
    assert native is not None
    logits = decode(native, [row], draw, page_size)[0]
    with torch.inference_mode():
        expected = model.float()(torch.tensor([row]))[0]
    # What the cache keeps has 8 bits of mantissa, and where the processor multiplies that, so have all factors.
    assert float((logits - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_are_read_as_torch_widens_them(family: str, kind: str) -> None:
    config = small(family, hidden_size=40, vocab_size=37)
    model = quantize_model(randomized(config, 6, 0.2), kind)
    rows = [[random.Random(i).randrange(31) for _ in range(30)] for i in range(3)]
    native = NativeModel.build(model, pool(config, 60, 4))
    assert native is not None
    for row, logits in zip(rows, decode(native, rows, random.Random(6), 4), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([row]))[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("seed", [1, 2])
def test_multi_token_prediction_hidden_states(family: str, seed: int) -> None:
    config = small(family, num_nextn_predict_layers=2)
    model, draw = randomized(config, seed), random.Random(seed)
    length = min(config.max_position_embeddings, 12)
    row = [draw.randrange(config.vocab_size) for _ in range(length)]
    native = NativeModel.build(model, pool(config, length, 4))
    assert native is not None
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([row]))
        further = [[*row[1:], 0], [*row[2:], 0, 0]]
        tables = [list(range(length))]
        ours = native.hidden(step([row], [0], tables))
        for depth, ids in enumerate(further):
            hidden = model.mtp_hidden(hidden, torch.tensor([ids]), depth)
            ours = native.draft_hidden(depth, ours, step([ids], [0], tables))
            torch.testing.assert_close(ours, hidden[0], rtol=1e-4, atol=1e-4 * max(1.0, float(hidden.abs().max())))


def test_loads_and_choices_are_the_routers() -> None:
    config = small("deepseek_v3", num_hidden_layers=3)
    model = randomized(config, 9)
    row = [random.Random(9).randrange(31) for _ in range(20)]
    native = NativeModel.build(model, pool(config, 20, 4))
    assert native is not None
    with torch.inference_mode():
        native.hidden(step([row], [0], [list(range(5))]))
        model.train()(torch.tensor([row]))
    for number, (_, mixture) in enumerate(model.sparse_layers()):
        assert mixture.routes is not None
        chosen = mixture.routes.expert_TK
        assert torch.equal(native.choice_LTK[number, :20].long().sort(dim=1).values, chosen.sort(dim=1).values)
        assert torch.equal(native.load_LE[number], torch.bincount(chosen.flatten(), minlength=6))


def test_logits_of_many_rows_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("llama")
    native = NativeModel.build(randomized(config, 2), pool(config, 4, 4))
    assert native is not None
    hidden = torch.randn(11, config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = native.logits(hidden)
    monkeypatch.setattr("cadre.infer.native.NATIVE_ROWS", 4)
    assert whole.shape == (11, config.vocab_size)
    assert torch.equal(native.logits(hidden), whole)
