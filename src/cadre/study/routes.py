"""What the experts of a model took up: the routes of a text's tokens, counted against what chance would send.

Everything is a lift: how many times more often than expected. For a token, a group of documents or an expert of the layer
before, it is P(expert | it) / P(expert); 1 says nothing, 0 never, and at even load experts / choices is the most there can
be.

Letters in names: N token of the text, L sparse layer, K choices, E expert, F expert of the next layer, C candidate token,
G group of documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cadre.errors import UsageError, encodable
from cadre.model.experts import MixtureOfExperts, Routes
from cadre.model.scoring import document_start
from cadre.model.transformer import Transformer
from cadre.study.excerpts import Excerpt, Sample, group
from cadre.train.loads import dead_experts, evenness, load_ratio, max_violation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Letters of text looked at for each token wanted: few tokenizers get more into one.
LETTERS_PER_TOKEN = 8
LETTERS_PER_PLACE = 4
TYPICAL_TOKENS = 12
CONTEXTS = 4
_BROKEN = "\ufffd"  # what a decoder makes of a part of a letter
_AROUND = 14  # tokens on each side of a context's token
_WINDOWS = 8  # read at once
# Rare tokens prove little: a lift is reckoned as if this many more had been sent as chance would.
_PRIOR = 20
# Pairs of choices counted at once.
_PAIRS = 1 << 22


@dataclass(frozen=True)
class Gathered:
    """A text's routes. ids_N int32; excerpt_N int32, the excerpt of each token; expert_NLK int16; affinity_NLK float16,
    sigmoid or softmax, without bias. 4 L K bytes a token."""

    excerpts: list[Excerpt]
    layers: list[int]
    experts: int
    ids_N: NDArray[np.int32]
    excerpt_N: NDArray[np.int32]
    expert_NLK: NDArray[np.int16]
    affinity_NLK: NDArray[np.float16]


def sparse_layers(model: Transformer) -> list[tuple[int, MixtureOfExperts]]:
    """The mixtures of experts that read a text: those of multi-token prediction modules do not. Raises `UsageError` for a
    dense model."""
    layers = [(index, layer) for index, layer in model.sparse_layers() if index < model.config.num_hidden_layers]
    if not layers:
        raise UsageError("the model is dense: it has no experts whose routes could be read")
    return layers


@torch.inference_mode()
def gather(
    model: Transformer,
    tokenizer: Tokenizer,
    sample: Sample,
    *,
    context: int,
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> Gathered:
    """Read excerpts, at most `max_tokens` tokens of them evenly chosen, in windows of `context` positions, of which the
    first is the token that a document starts from. Raises `UsageError` for a dense model and for no text."""
    layers = sparse_layers(model)
    first = document_start(model.config, tokenizer)
    with encodable("the text"):
        encoded = tokenizer.encode_batch([e.text for e in sample.excerpts], add_special_tokens=False)
    rows = _within([encoding.ids for encoding in encoded], max_tokens)
    excerpts = [sample.excerpts[number] for number, _ in rows]
    if not rows:
        raise UsageError("there is no text to read: the documents hold no tokens")
    windows = [
        (number, ids[start : start + context - 1])
        for number, (_, ids) in enumerate(rows)
        for start in range(0, len(ids), context - 1)
    ]
    offset = np.cumsum([0, *(len(ids) for _, ids in windows)])
    choices = model.config.num_experts_per_tok or 1
    shape = (int(offset[-1]), len(layers), choices)
    expert_NLK, affinity_NLK = np.empty(shape, dtype=np.int16), np.empty(shape, dtype=np.float16)
    heard: list[Routes] = []

    def hear(router: nn.Module, inputs: object, routes: Routes) -> None:
        heard.append(routes)

    handles = [layer.gate.register_forward_hook(hear) for _, layer in layers]
    device = model.embed_tokens.weight.device
    model.eval()
    try:
        by_length = sorted(range(len(windows)), key=lambda w: -len(windows[w][1]))  # little padding
        for place in range(0, len(by_length), _WINDOWS):
            together = by_length[place : place + _WINDOWS]
            ids_BT = torch.full((len(together), 1 + len(windows[together[0]][1])), first)
            for row, window in zip(ids_BT, together, strict=True):
                row[1 : 1 + len(windows[window][1])] = torch.tensor(windows[window][1])
            heard.clear()
            model.hidden(ids_BT.to(device))
            expert_BTLK = _together([routes.expert_TK for routes in heard], ids_BT)
            affinity_BTLK = _together([routes.score_TE.gather(1, routes.expert_TK) for routes in heard], ids_BT)
            for row, window in enumerate(together):
                there, length = slice(offset[window], offset[window + 1]), len(windows[window][1])
                expert_NLK[there] = expert_BTLK[row, 1 : 1 + length]
                affinity_NLK[there] = affinity_BTLK[row, 1 : 1 + length]
            if progress is not None:
                progress(sum(len(windows[window][1]) for window in together))
    finally:
        for handle in handles:
            handle.remove()
    ids_N = np.concatenate([np.array(ids, dtype=np.int32) for _, ids in windows])
    excerpt_N = np.repeat(np.array([number for number, _ in windows], dtype=np.int32), np.diff(offset))
    numbers = [index for index, _ in layers]
    return Gathered(excerpts, numbers, layers[0][1].gate.weight.shape[0], ids_N, excerpt_N, expert_NLK, affinity_NLK)


def study(gathered: Gathered, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that `cadre routes` says of the routes, as plain JSON; docs/balance.md names the keys."""
    names = group(gathered.excerpts)
    groups = _ordered(names)
    group_N = np.array([groups.index(name) for name in names])[gathered.excerpt_N]
    layers = []
    for place, layer in enumerate(gathered.layers):
        following = place + 1 < len(gathered.layers)
        expert_NK = gathered.expert_NLK[:, place]
        load_E = np.bincount(expert_NK.ravel(), minlength=gathered.experts)
        lift_EG = group_lift(expert_NK, group_N, gathered.experts, len(groups))
        ratio_E = load_ratio(load_E)
        experts = [
            {
                "expert": expert,
                "load": round(float(ratio_E[expert]), 4),
                "groups": _rounded(lift_EG[expert]),
                "tokens": tokens,
                "contexts": _contexts(gathered, place, expert, [token["id"] for token in tokens], tokenizer),
            }
            for expert, tokens in enumerate(_typical(gathered, place, load_E, tokenizer))
        ]
        layers.append({
            "layer": layer,
            "load": (load_E / load_E.sum()).round(6).tolist(),
            "max_vio": round(float(max_violation(load_E)), 4),
            "load_entropy": round(float(evenness(load_E)), 4),
            "dead_experts": int(dead_experts(load_E)),
            "experts": experts,
            "next_layer": gathered.layers[place + 1] if following else None,
            "coactivation": _rounded(coactivation(expert_NK, gathered.expert_NLK[:, place + 1], gathered.experts))
            if following
            else None,
        })  # fmt: skip
    tokens_G = np.bincount(group_N, minlength=len(groups)).tolist()
    return {
        "tokens": len(gathered.ids_N),
        "excerpts": len(gathered.excerpts),
        "groups": [{"name": name, "tokens": tokens} for name, tokens in zip(groups, tokens_G, strict=True)],
        "layers": layers,
    }


def token_lift(expert_NK: NDArray[Any], token_N: NDArray[Any], experts: int, tokens: int) -> tuple[Ints, Floats]:
    """How often each of `tokens` kinds of token (token_N: 0 to tokens - 1, -1 for none of them) went to each expert, and its
    lift: [E, C] both."""
    counted = token_N >= 0
    pair = expert_NK[counted].astype(np.int64) * tokens + token_N[counted, None]
    count_EC = np.bincount(pair.ravel(), minlength=experts * tokens).reshape(experts, tokens)
    occurs_C = np.bincount(token_N[counted], minlength=tokens)
    return count_EC, _lift(count_EC, occurs_C, np.bincount(expert_NK.ravel(), minlength=experts), len(token_N))


def group_lift(expert_NK: NDArray[Any], group_N: NDArray[Any], experts: int, groups: int) -> Floats:
    """The lift of each group of documents for each expert: [E, G]."""
    return token_lift(expert_NK, group_N, experts, groups)[1]


def coactivation(expert_NK: NDArray[Any], next_NK: NDArray[Any], experts: int) -> Floats:
    """The lift of each expert for each of the next layer: P(f at the next layer | e at this one) / P(f), [E, F]."""
    count_EF = np.zeros(experts * experts, dtype=np.int64)
    tokens = max(1, _PAIRS // expert_NK.shape[1] ** 2)
    for start in range(0, len(expert_NK), tokens):
        here = expert_NK[start : start + tokens].astype(np.int64)
        pair_NKK = here[:, :, None] * experts + next_NK[start : start + tokens, None, :]
        count_EF += np.bincount(pair_NKK.ravel(), minlength=experts * experts)
    load_E, load_F = (np.bincount(chosen.ravel(), minlength=experts) for chosen in (expert_NK, next_NK))
    return _lift(count_EF.reshape(experts, experts).T, load_E, load_F, len(expert_NK)).T


def _lift(count_EC: Ints, occurs_C: Ints, load_E: Ints, tokens: int) -> Floats:
    """P(e | c) / P(e) from counts; 1 where either never occurs."""
    expected_EC = np.outer(load_E, occurs_C) / tokens
    return np.divide(count_EC, expected_EC, out=np.ones(count_EC.shape), where=expected_EC > 0)


def _within(rows: list[list[int]], most: int) -> list[tuple[int, list[int]]]:
    """(number, ids) of rows that are not empty, evenly chosen so that they have at most `most` tokens in all."""
    full = [(number, ids) for number, ids in enumerate(rows) if ids]
    total = sum(len(ids) for _, ids in full)
    if total > most:
        count = max(1, len(full) * most // total)
        full = [full[i * len(full) // count] for i in range(count)]
    chosen, left = [], most
    for number, ids in full:
        if left > 0:
            chosen.append((number, ids[:left]))
        left -= len(ids)
    return chosen


def _together(layers: list[Tensor], ids_BT: Tensor) -> NDArray[Any]:
    """Each layer's [B * T, K] as one array [B, T, L, K]."""
    return torch.stack([one.view(*ids_BT.shape, -1) for one in layers], dim=2).cpu().numpy()


def _ordered(names: list[str]) -> list[str]:
    """Groups in the order of the text; decades in time."""
    found = list(dict.fromkeys(names))
    if all(name[:4].isdigit() and name[4:] == "s" for name in found):
        return sorted(found)
    return sorted(found, key=lambda name: name in ("other files", "other documents"))


def _typical(gathered: Gathered, place: int, load_E: Ints, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    """For each expert the tokens most typical of it, those of doubtful lift left behind."""
    occurs = np.bincount(gathered.ids_N)
    candidates = np.flatnonzero(occurs >= max(4, len(gathered.ids_N) // 20_000))
    if not len(candidates):
        return [[] for _ in load_E]
    number = np.full(len(occurs), -1)
    number[candidates] = np.arange(len(candidates))
    expert_NK = gathered.expert_NLK[:, place]
    count_EC, lift_EC = token_lift(expert_NK, number[gathered.ids_N], gathered.experts, len(candidates))
    base_E1 = load_E[:, None] / len(gathered.ids_N)
    doubtful_EC = (count_EC + _PRIOR * base_E1) / (occurs[candidates] + _PRIOR) / np.where(base_E1 > 0, base_E1, 1)
    result = []
    for count_C, lift_C, rank_C in zip(count_EC, lift_EC, doubtful_EC, strict=True):
        best = [c for c in np.argsort(-rank_C, kind="stable")[:TYPICAL_TOKENS] if count_C[c] and rank_C[c] > 1]
        ids = [int(candidates[c]) for c in best]
        result.append([
            {
                "id": token,
                "text": _text(token, tokenizer),
                "count": int(count_C[c]),
                "share": round(float(count_C[c] / occurs[token]), 4),
                "lift": round(float(lift_C[c]), 3),
            }
            for c, token in zip(best, ids, strict=True)
        ])  # fmt: skip
    return result


def _text(token: int, tokenizer: Tokenizer) -> str:
    """A token's text within a line: some decoders drop the space before a first token, so it is taken from a second."""
    once, twice = (tokenizer.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
    return twice[len(once) :] or once


def _contexts(gathered: Gathered, place: int, expert: int, typical: list[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """For the most typical tokens, where the expert wanted each most, in different documents if there are."""
    at_K = gathered.expert_NLK[:, place] == expert
    there = np.flatnonzero(at_K.any(axis=1))
    affinity = gathered.affinity_NLK[there, place][at_K[there]].astype(float)
    documents = np.array([excerpt.document for excerpt in gathered.excerpts])
    contexts: list[dict[str, Any]] = []
    for token in typical[:CONTEXTS]:
        own = np.flatnonzero(gathered.ids_N[there] == token)
        seen = [context["document"] for context in contexts]
        fresh = own[~np.isin(documents[gathered.excerpt_N[there[own]]], seen)]
        own = fresh if len(fresh) else own
        best = own[np.argmax(affinity[own])]
        contexts.append(_context(gathered, int(there[best]), round(float(affinity[best]), 4), tokenizer))
    return contexts


def _context(gathered: Gathered, position: int, affinity: float, tokenizer: Tokenizer) -> dict[str, Any]:
    excerpt = gathered.excerpt_N[position]
    low, high = (int(np.searchsorted(gathered.excerpt_N, excerpt, side=side)) for side in ("left", "right"))
    low, high = max(low, position - _AROUND), min(high, position + 1 + _AROUND)
    ids = gathered.ids_N[low:high].tolist()
    # Beginnings are decoded, never the token alone: some decoders drop a first space, and a token may be part of a letter.
    start, stop = position - low, position - low + 1
    while start > 0 and tokenizer.decode(ids[:start]).endswith(_BROKEN):
        start -= 1
    while stop < len(ids) and tokenizer.decode(ids[:stop]).endswith(_BROKEN):
        stop += 1
    upto, through, whole = (tokenizer.decode(ids[:end]) for end in (start, stop, len(ids)))
    return {
        "before": upto.lstrip(_BROKEN),
        "token": through[len(upto) :],
        "after": whole[len(through) :].rstrip(_BROKEN),
        "document": gathered.excerpts[excerpt].document,
        "affinity": affinity,
    }


def _rounded(values: Floats) -> list[Any]:
    return np.round(values, 3).tolist()
