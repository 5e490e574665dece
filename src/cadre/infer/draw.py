"""Drawing one word from each row of logits: the arithmetic of sampling.

Letters in names: B rows, W vocabulary (words), N the likeliest words, M blocks of words, C words in a block. W is whole blocks
(`in_blocks`).

What goes over all words runs on the logits' device in operations that keep up with memory (a maximum, a sum); a cumulative sum,
argmax or top-k is several times slower on a CPU, so these are done over blocks first, then within the blocks that matter.
What is left are short rows: numpy, whose calls cost a fraction of torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_BLOCK = 64
# The likeliest words looked at first; rows where the filters keep more are sorted whole, on the CPU.
_FEW = {"cpu": 128, "cuda": 1024}
# A greater top_k goes straight to sorting.
_MANY = 512
# Rows up to this long are short: no blocks, and all words sorted at once unless top_k asks for few (a nucleus often holds
# hundreds).
_SMALL = 4096
# Words sorted at a time: bounds the memory that a large batch takes.
_AT_ONCE = 2**20


class Rule(NamedTuple):
    """How a row is drawn from: temperature above 0, a uniform number in [0, 1), and the filters of `Sampling`."""

    temperature: float
    uniform: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def in_blocks(logits_BW: Tensor) -> Tensor:
    """The same rows, filled up to whole blocks with words that are never drawn."""
    missing = -logits_BW.shape[1] % _BLOCK
    return F.pad(logits_BW, (0, missing), value=-math.inf) if missing else logits_BW.contiguous()


def likeliest(logits_BW: Tensor) -> list[int]:
    """The id of each row's greatest logit; the lowest id among equals."""
    logits_BMC = _blocks(logits_BW)
    block_B = logits_BMC.amax(dim=-1).argmax(dim=-1)
    row_B = torch.arange(len(block_B), device=block_B.device)
    return (block_B * _BLOCK + logits_BMC[row_B, block_B].argmax(dim=-1)).tolist()


def log_total(logits_BW: Tensor) -> Tensor:
    """float32 [B, 1]: what to subtract from logits for log-probabilities."""
    greatest_B1 = logits_BW.amax(dim=-1, keepdim=True)
    sum_BM = _blocks((logits_BW - greatest_B1).exp_()).sum(dim=-1)
    return greatest_B1 + sum_BM.sum(dim=-1, keepdim=True).log()


def top(logits_BW: Tensor, count: int) -> tuple[Array, Array]:
    """The greatest logits float32 [B, N], falling, and their ids int64 [B, N]; which of equals at the end is left open."""
    if logits_BW.device.type != "cpu":
        value_BN, id_BN = logits_BW.topk(count, dim=-1)
        return _host(value_BN), _host(id_BN)
    if 2 * count * _BLOCK > logits_BW.shape[1]:
        id_BW = _greatest(_host(logits_BW), count)
    else:  # they lie in the blocks with the greatest maxima
        block_BN = _greatest(_host(_blocks(logits_BW).amax(dim=-1)), count)
        id_BW = (block_BN[:, :, None] * _BLOCK + np.arange(_BLOCK)).reshape(len(block_BN), -1)
        id_BW = np.take_along_axis(id_BW, _greatest(np.take_along_axis(_host(logits_BW), id_BW, axis=1), count), axis=1)
    value_BW = np.take_along_axis(_host(logits_BW), id_BW, axis=1)
    order_BN = np.argsort(-value_BW, axis=1, kind="stable")
    return np.take_along_axis(value_BW, order_BN, axis=1), np.take_along_axis(id_BW, order_BN, axis=1)


def draw(logits_BW: Tensor, rules: Sequence[Rule]) -> list[int]:
    """One id for each row, drawn from the softmax of float32 logits over temperature, without filters.

    It is where the sum of the probabilities, in the order of ids, first exceeds the uniform number. In that order rounding
    in the logits (as between batches of different size) moves no more than the borders between neighbours, where an order
    by probability could swap words.
    """
    columns = _Columns.of(rules)
    if logits_BW.device.type == "cpu" and logits_BW.numel() <= _SMALL:
        return columns.place(_host(logits_BW))[:, 0].tolist()
    weight_BMC = _blocks(_weights(logits_BW, columns.temperature_B1))
    sum_BM = _host(weight_BMC.sum(dim=-1)).cumsum(axis=1, dtype=np.float64)
    block_B1 = _first(sum_BM, columns.uniform_B1 * sum_BM[:, -1:], past=True)
    row_B = torch.arange(len(weight_BMC), device=weight_BMC.device)
    weight_BC = _host(weight_BMC[row_B, torch.from_numpy(block_B1[:, 0]).to(row_B.device)])
    return _within(sum_BM, block_B1, weight_BC, columns.uniform_B1 * sum_BM[:, -1:], past=True)[:, 0].tolist()


def draw_filtered(logits_BW: Tensor, rules: Sequence[Rule]) -> list[int]:
    """As `draw`, from what top_k, top_p and min_p leave in each row. Among equal logits the lower ids are kept."""
    words = logits_BW.shape[1]
    if words <= _SMALL and not all(0 < rule.top_k < _MANY for rule in rules):
        return _sorted_in_parts(logits_BW, rules)
    columns = _Columns.of(rules)
    total_B1 = np.zeros((len(rules), 1))
    if any(rule.top_p < 1 and not 0 < rule.top_k < words for rule in rules):
        weight_BW = _weights(logits_BW, columns.temperature_B1)
        total_B1 = _host(_blocks(weight_BW).sum(dim=-1)).sum(axis=1, keepdims=True, dtype=np.float64)
    wanted = max((rule.top_k + 1 for rule in rules if rule.top_k < _MANY), default=0)
    few = min(words, -(-max(_FEW.get(logits_BW.device.type, _MANY), wanted) // _BLOCK) * _BLOCK)
    value_BN, id_BN = top(logits_BW, few)
    # Rows that are not finite have no right choice; these have one at all.
    broken_B1 = ~np.isfinite(value_BN.max(axis=1, keepdims=True))
    value_BN[broken_B1[:, 0]] = 0
    kept_B1, certain_B1 = columns.kept(value_BN, words, total_B1)
    for row in np.flatnonzero(_tied(value_BN, kept_B1) & certain_B1 & ~broken_B1).tolist():
        kept = kept_B1[row, 0]
        logits_W = _host(logits_BW[row])
        id_BN[row, :kept] = _lowest(logits_W, value_BN[row, kept - 1], kept)
        value_BN[row, :kept] = logits_W[id_BN[row, :kept]]
    # In the order of ids, those left out last.
    id_BN[np.arange(few) >= kept_B1] = words
    order_BN = np.argsort(id_BN, axis=1)
    id_BN = np.take_along_axis(id_BN, order_BN, axis=1)
    value_BN = np.where(id_BN < words, np.take_along_axis(value_BN, order_BN, axis=1), -np.inf)
    ids = np.take_along_axis(id_BN, columns.place(value_BN), axis=1)[:, 0].tolist()
    # Where the few are not enough to tell what the filters keep.
    rest = np.flatnonzero(~certain_B1 & ~broken_B1).tolist()
    for row, id in zip(rest, _sorted_in_parts(logits_BW[rest], [rules[row] for row in rest]), strict=True):
        ids[row] = id
    return ids


def _sorted_in_parts(logits_BW: Tensor, rules: Sequence[Rule]) -> list[int]:
    step = max(1, _AT_ONCE // logits_BW.shape[1])
    ids = []
    for start in range(0, len(rules), step):
        ids += _draw_sorted(_host(logits_BW[start : start + step]), rules[start : start + step])
    return ids


def _draw_sorted(logits_BW: Array, rules: Sequence[Rule]) -> list[int]:
    """As `draw_filtered`, however many words the filters keep."""
    value_BW = np.sort(logits_BW, axis=1)[:, ::-1].copy()
    kept_B1, _ = _Columns.of(rules).kept(value_BW, logits_BW.shape[1])
    least_B1 = np.take_along_axis(value_BW, kept_B1 - 1, axis=1)
    left_BW = np.where(logits_BW >= least_B1, logits_BW, np.float32(-math.inf))
    for row in np.flatnonzero(_tied(value_BW, kept_B1)).tolist():
        left_BW[row] = -math.inf
        id_N = _lowest(logits_BW[row], least_B1[row, 0], kept_B1[row, 0])
        left_BW[row, id_N] = logits_BW[row, id_N]
    return draw(torch.from_numpy(left_BW), rules)


def _lowest(logits_W: Array, least: float, count: int) -> Array:
    """The ids, rising, of so many of the greatest logits; of those that equal the least kept, the lowest ids."""
    id_N = np.flatnonzero(logits_W >= least)
    equal_N = np.flatnonzero(logits_W[id_N] == least)
    surplus = len(id_N) - count
    return np.delete(id_N, equal_N[-surplus:]) if surplus > 0 else id_N


class _Columns(NamedTuple):
    """Rules as columns [B, 1]: temperature float32, top_k int64, the rest float64."""

    temperature_B1: Array
    uniform_B1: Array
    top_k_B1: Array
    top_p_B1: Array
    min_p_B1: Array

    @classmethod
    def of(cls, rules: Sequence[Rule]) -> _Columns:
        temperature_B1, uniform_B1, top_k_B1, top_p_B1, min_p_B1 = np.array(rules, dtype=np.float64).T[:, :, None]
        return cls(temperature_B1.astype(np.float32), uniform_B1, top_k_B1.astype(np.int64), top_p_B1, min_p_B1)

    def kept(self, value_BN: Array, words: int, total_B1: Array | None = None) -> tuple[Array, Array]:
        """How many of the likeliest words the filters keep, int64 [B, 1] and at least 1, going by the N greatest logits,
        falling; and whether the other words cannot change that, bool [B, 1].

        `total_B1`: the sum of the weights of all words; without it the N are taken for all.
        """
        seen = value_BN.shape[1]
        unlimited_B1 = (self.top_k_B1 == 0) | (self.top_k_B1 >= words)
        limit_B1 = np.where(unlimited_B1, seen, self.top_k_B1)
        weight_BN = self.weights(value_BN)
        kept_B1 = np.minimum(limit_B1, seen)
        if self.min_p_B1.any():
            kept_B1 = np.minimum(kept_B1, (weight_BN >= self.min_p_B1).sum(axis=1, keepdims=True))
        if (limit_B1 < seen).any():
            weight_BN[np.arange(seen) >= limit_B1] = 0
        if (self.top_p_B1 < 1).any():
            weight_BMC = weight_BN.reshape(len(weight_BN), -1, _BLOCK)
            sum_BM = weight_BMC.sum(axis=2).cumsum(axis=1, dtype=np.float64)
            target_B1 = sum_BM[:, -1:] if total_B1 is None else np.where(unlimited_B1, total_B1, sum_BM[:, -1:])
            # A top_p of 1 leaves nothing out, whatever rounding does to the sums.
            target_B1 = np.where(self.top_p_B1 < 1, self.top_p_B1 * target_B1, math.inf)
            block_B1 = _first(sum_BM, target_B1, past=False)
            weight_BC = np.take_along_axis(weight_BMC, block_B1[:, :, None], axis=1)[:, 0]
            nucleus_B1 = _within(sum_BM, block_B1, weight_BC, target_B1, past=False) + 1
            kept_B1 = np.where(target_B1 <= sum_BM[:, -1:], np.minimum(kept_B1, nucleus_B1), kept_B1)
        kept_B1 = np.maximum(kept_B1, 1)
        total_known_B1 = unlimited_B1 | (self.top_k_B1 < seen) | (self.top_p_B1 == 1)
        return kept_B1, (seen == words) | (kept_B1 < seen) & total_known_B1

    def place(self, value_BN: Array) -> Array:
        """The place [B, 1] drawn from the softmax of logits [B, N] over temperature."""
        sum_BN = self.weights(value_BN).cumsum(axis=1, dtype=np.float64)
        return _first(sum_BN, self.uniform_B1 * sum_BN[:, -1:], past=True)

    def weights(self, value_BN: Array) -> Array:
        """As `_weights`."""
        with np.errstate(all="ignore"):  # logits that are not finite; a small temperature
            return np.exp((value_BN - value_BN.max(axis=1, keepdims=True)) / self.temperature_B1)


def _weights(logits_BW: Tensor, temperature_B1: Array) -> Tensor:
    """Probabilities [B, W] times the factor for each row that makes the greatest 1."""
    # Shifting first keeps a tiny temperature from overflowing to infinity minus infinity.
    shifted_BW = logits_BW - logits_BW.amax(dim=-1, keepdim=True)
    return shifted_BW.div_(torch.from_numpy(temperature_B1).to(logits_BW.device)).exp_()


def _blocks(x_BW: Tensor) -> Tensor:
    return x_BW.unflatten(1, (-1, _BLOCK))


def _host(x: Tensor) -> Array:
    return x.detach().cpu().numpy()


def _greatest(value_BW: Array, count: int) -> Array:
    """The places [B, N] of each row's greatest values, rising."""
    first = value_BW.shape[1] - count
    return np.sort(np.argpartition(value_BW, first, axis=1)[:, first:], axis=1)


def _first(sum_BN: Array, target_B1: Array, *, past: bool) -> Array:
    """The first place [B, 1] where rising sums are past the target, or have reached it; their last rise if none are."""
    place_B1 = (sum_BN <= target_B1 if past else sum_BN < target_B1).sum(axis=1, keepdims=True)
    if place_B1.max() == sum_BN.shape[1]:
        place_B1 = np.minimum(place_B1, (sum_BN < sum_BN[:, -1:]).sum(axis=1, keepdims=True))
    return place_B1


def _within(sum_BM: Array, block_B1: Array, weight_BC: Array, target_B1: Array, *, past: bool) -> Array:
    """As `_first`, of words: from the blocks' running sums, the block that `_first` finds there, and its words' weights."""
    row_B1 = np.arange(len(sum_BM))[:, None]
    start_B1 = np.where(block_B1 > 0, sum_BM[row_B1, block_B1 - 1], 0)
    sum_BC = weight_BC.cumsum(axis=1, dtype=np.float64)
    # As a share of the block: its sum in float32 and the sum of its words in float64 differ by rounding.
    with np.errstate(invalid="ignore"):
        share_B1 = np.maximum(0, (target_B1 - start_B1) / (sum_BM[row_B1, block_B1] - start_B1))
    return block_B1 * _BLOCK + _first(sum_BC, share_B1 * sum_BC[:, -1:], past=past)


def _tied(value_BN: Array, kept_B1: Array) -> Array:
    """Whether the first word left out is as likely as the last one kept, bool [B, 1]."""
    seen = value_BN.shape[1]
    next_B1 = np.take_along_axis(value_BN, np.minimum(kept_B1, seen - 1), axis=1)
    return (next_B1 == np.take_along_axis(value_BN, kept_B1 - 1, axis=1)) & (kept_B1 < seen)
