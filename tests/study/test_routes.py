"""What is counted, against the same counted one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.model.scoring import document_start
from cadre.model.transformer import Transformer
from cadre.study.excerpts import Excerpt, Sample
from cadre.study.routes import Gathered, coactivation, gather, study, token_lift
from tests.shapes import small

TEXT = "The people of the na\u00efve union answered \N{GRINNING FACE}: yes, we do.\nThen nothing followed.\n"
TOKENIZER = train_tokenizer([TEXT * 20], 300)
WORDS = train_tokenizer(["yes the the of of union union\n" * 20], 300)


def sampled(*texts: str) -> Sample:
    places = np.cumsum([0, *map(len, texts)]).tolist()
    return Sample([Excerpt(f"{n}.txt", "", places[n], text) for n, text in enumerate(texts)], len(texts), True)


def build(kind: str = "deepseek_v3", **changes) -> Transformer:
    config = small(kind, **{"vocab_size": 300, "num_hidden_layers": 3, "initializer_range": 0.3, "bos_token_id": 0,
                            "eos_token_id": 1, "num_nextn_predict_layers": 1, **changes})  # fmt: skip
    return Transformer(config).initialize(0)


@settings(max_examples=8)
@given(
    st.sampled_from(["deepseek_v3", "deepseek_v2"]), st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(2, 20)
)
def test_every_token_has_the_routes_of_a_lone_pass(kind, lengths, context):
    model = build(kind)
    chosen = sampled(*(TEXT[n : n + length] for n, length in enumerate(lengths)))
    read = []
    got = gather(model, TOKENIZER, chosen, context=context, max_tokens=10**6, progress=read.append)
    assert got.layers == [1, 2] and got.experts == 6  # without the multi-token prediction module's
    ids = [TOKENIZER.encode(e.text).ids for e in chosen.excerpts]
    assert got.ids_N.tolist() == [token for row in ids for token in row]
    assert got.excerpt_N.tolist() == [number for number, row in enumerate(ids) for _ in row]
    assert sum(read) == len(got.ids_N)
    first, place = document_start(model.config, TOKENIZER), 0
    for row in ids:
        for start in range(0, len(row), context - 1):
            window = torch.tensor([[first, *row[start : start + context - 1]]])
            for layer, (_, mixture) in enumerate(model.sparse_layers()[:2]):
                found = {}
                handle = mixture.gate.register_forward_hook(lambda m, i, routes, found=found: found.update(vars(routes)))
                with torch.no_grad():
                    model.hidden(window)
                handle.remove()
                there = slice(place, place + window.shape[1] - 1)
                assert np.array_equal(np.sort(got.expert_NLK[there, layer]), found["expert_TK"][1:].sort(dim=1).values)
                affinity = found["score_TE"][1:].gather(1, torch.from_numpy(got.expert_NLK[there, layer]).long())
                np.testing.assert_allclose(got.affinity_NLK[there, layer], affinity, rtol=2e-3, atol=1e-4)
            place += window.shape[1] - 1
    assert all(not layer.gate._forward_hooks for _, layer in model.sparse_layers())


@pytest.mark.parametrize("most", [1, 7, 40])
def test_no_more_tokens_are_read_than_asked_for_and_they_are_spread(most):
    chosen = sampled(*["yes we do then "] * 12)
    got = gather(build(), TOKENIZER, chosen, context=16, max_tokens=most)
    assert most * 0.6 <= len(got.ids_N) <= most
    assert got.excerpts[0].document == "0.txt"
    if most == 40:
        assert int(got.excerpts[-1].document.removesuffix(".txt")) >= 8


def test_a_dense_model_and_an_empty_text_are_refused():
    with pytest.raises(UsageError, match="dense"):
        gather(build("llama", num_nextn_predict_layers=0), TOKENIZER, sampled("a"), context=8, max_tokens=9)
    with pytest.raises(UsageError, match="no text"):
        gather(build(), TOKENIZER, sampled(), context=8, max_tokens=9)


# ------------------------------------------------------------------------------------------------- counts


@given(st.integers(1, 40), st.integers(1, 3), st.integers(3, 6), st.integers(1, 5), st.integers(0, 99))
def test_lifts_are_their_definition(tokens, choices, experts, kinds, seed):
    rng = np.random.default_rng(seed)
    expert_NK, next_NK = (np.array([rng.permutation(experts)[:choices] for _ in range(tokens)]) for _ in range(2))
    kind_N = rng.integers(-1, kinds, tokens)
    count_EC, lift_EC = token_lift(expert_NK, kind_N, experts, kinds)
    lift_EF = coactivation(expert_NK, next_NK, experts)
    goes = [[e in row for row in expert_NK.tolist()] for e in range(experts)]
    follows = [[f in row for row in next_NK.tolist()] for f in range(experts)]
    for e in range(experts):
        base = sum(goes[e]) / tokens
        for c in range(kinds):
            of_kind = [goes[e][n] for n in range(tokens) if kind_N[n] == c]
            assert count_EC[e, c] == sum(of_kind)
            wanted = sum(of_kind) / len(of_kind) / base if of_kind and base else 1
            assert lift_EC[e, c] == pytest.approx(wanted)
        for f in range(experts):
            after = [follows[f][n] for n in range(tokens) if goes[e][n]]
            chance = sum(follows[f]) / tokens
            assert lift_EF[e, f] == pytest.approx(sum(after) / len(after) / chance if after and chance else 1)


def made_up(rows: list[list[tuple[str, int, float]]]) -> Gathered:
    """One layer of three experts, top 1: per excerpt its tokens, where each goes and how much it is wanted there."""
    text = [[WORDS.token_to_id(word.replace(" ", "\u0120")) for word, _, _ in row] for row in rows]
    flat = [item for row in rows for item in row]
    return Gathered(
        sampled(*("".join(word for word, _, _ in row) for row in rows)).excerpts, [4], 3,
        np.array([token for row in text for token in row], dtype=np.int32),
        np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows]),
        np.array([expert for _, expert, _ in flat], dtype=np.int16).reshape(-1, 1, 1),
        np.array([affinity for _, _, affinity in flat], dtype=np.float16).reshape(-1, 1, 1),
    )  # fmt: skip


def test_each_expert_shows_its_tokens_and_where_it_wants_them_most():
    the, of, yes, union = (" the", 0, 0.5), (" of", 1, 0.5), ("yes", 0, 0.5), (" union", 0, 0.5)
    rows = [[the, of] * 10 + [yes], [the, of] * 10 + [(" the", 0, 0.9), of, (" of", 0, 0.99), union] + [(" union", 1, 0.7)]]
    found = study(made_up(rows), WORDS)
    (layer,) = found["layers"]
    assert (layer["layer"], layer["next_layer"], layer["coactivation"], layer["dead_experts"]) == (4, None, None, 1)
    assert found["tokens"] == 46 and found["groups"] == [{"name": "0.txt", "tokens": 21}, {"name": "1.txt", "tokens": 25}]
    first, second, third = layer["experts"]
    assert layer["load"] == [pytest.approx(24 / 46, abs=1e-6), pytest.approx(22 / 46, abs=1e-6), 0]
    assert first["load"] == pytest.approx(3 * 24 / 46, abs=1e-4)
    assert [(t["text"], t["count"], t["share"]) for t in first["tokens"]] == [(" the", 21, 1.0)]  # yes, union are rare
    assert first["tokens"][0]["lift"] == pytest.approx(46 / 24, abs=1e-3)
    assert [(t["text"], t["count"], t["share"]) for t in second["tokens"]] == [(" of", 21, round(21 / 22, 4))]
    (context,) = first["contexts"]
    assert (context["token"], context["document"], context["affinity"]) == (" the", "1.txt", pytest.approx(0.9, abs=1e-3))
    assert context["before"] == " the of" * 7 and context["after"] == " of of union union"
    assert (third["tokens"], third["contexts"], third["load"], third["groups"]) == ([], [], 0, [1, 1])
    assert first["groups"] == [pytest.approx(11 / 21 * 46 / 24, abs=1e-3), pytest.approx(13 / 25 * 46 / 24, abs=1e-3)]


def test_contexts_come_from_different_documents_where_they_can():
    the, of = (" the", 0, 0.5), (" of", 0, 0.5)
    rows = [[(" the", 0, 0.9), (" of", 0, 0.9)] + [the, of] * 5, [the, of, (" union", 1, 0.5)] * 5]
    contexts = study(made_up(rows), WORDS)["layers"][0]["experts"][0]["contexts"]
    assert {c["document"] for c in contexts} == {"0.txt", "1.txt"}


def test_letters_of_several_tokens_are_whole_in_contexts():
    model = build()
    got = gather(model, TOKENIZER, sampled(*[TEXT * 3] * 4), context=64, max_tokens=10**6)
    for layer in study(got, TOKENIZER)["layers"]:
        for expert in layer["experts"]:
            for context in expert["contexts"]:
                whole = context["before"] + context["token"] + context["after"]
                assert whole in TEXT * 3 and context["token"]
        assert len(layer["experts"]) == 6
