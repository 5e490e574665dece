"""One forward pass over new tokens of several sequences at once, whatever their lengths.

Letters in names: T new token (those of all sequences, one sequence after the other), B sequence, P page of a sequence, S
position seen, D hidden, N chosen row, W vocabulary (words), X what a cache keeps of a position, L sparse layer, E expert, K
expert choices, R choices of several passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from threading import Lock
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from cadre.infer.native import NATIVE_ROWS, NATIVE_TOKENS, NativeModel
from cadre.infer.pages import PagePool
from cadre.kernels.card import launches
from cadre.kernels.limits import best_dtype, products_keep_up
from cadre.model.attention import Averages
from cadre.model.experts import Routes
from cadre.model.transformer import Block, Transformer

if TYPE_CHECKING:
    from cadre.infer.scheduler import Sequence

# Passes whose experts are counted together.
_COUNT_EVERY = 32
# New tokens of a sequence that one kernel attends for along with those of all others.
_FEW = 8


@dataclass
class Batch:
    """What one forward pass reads. All on the CPU.

    ids_T, position_T: int64 [T]. count_B: new tokens of each sequence. start_B: its positions cached before. page_BP: int32
    [B, P], the pages of each sequence in order, rows filled up with 0. experts: None, or a list to which the pass adds the
    chosen experts of each sparse layer of the main model, int64 [T, K].
    """

    ids_T: Tensor
    position_T: Tensor
    count_B: list[int]
    start_B: list[int]
    page_BP: Tensor
    experts: list[Tensor] | None = field(default=None, compare=False)

    def part(self, begin: int, end: int) -> Batch:
        """Sequences `begin` to `end`."""
        first, last = sum(self.count_B[:begin]), sum(self.count_B[:end])
        return Batch(
            ids_T=self.ids_T[first:last],
            position_T=self.position_T[first:last],
            count_B=self.count_B[begin:end],
            start_B=self.start_B[begin:end],
            page_BP=self.page_BP[begin:end],
            experts=None if self.experts is None else [],
        )


def batch_of(work: list[tuple[Sequence, int]]) -> Batch:
    """The next so many tokens of each sequence as one batch: its unread ones, then its drafts."""
    ids: list[int] = []
    position: list[int] = []
    for sequence, count in work:
        start = sequence.cached
        ids += (sequence.ids[start : start + count] + sequence.drafts)[:count]
        position += range(start, start + count)
    return Batch(
        ids_T=torch.tensor(ids),
        position_T=torch.tensor(position),
        count_B=[count for _, count in work],
        start_B=[sequence.cached for sequence, _ in work],
        page_BP=table_of([sequence for sequence, _ in work]),
    )


def table_of(sequences: list[Sequence]) -> Tensor:
    """The pages of each sequence in order, int32 [B, P], rows filled up with 0."""
    page_BP = np.zeros((len(sequences), max(len(sequence.pages) for sequence in sequences)), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        page_BP[row, : len(sequence.pages)] = sequence.pages
    return torch.from_numpy(page_BP)


class Runner:
    """Runs a model over batches whose past lies in the pool's pages: a sequence's new tokens through the C++ kernels where
    there are any and the tokens are few, else through torch.

    The two differ in the last bits, in bfloat16 in more. Which one computes a token depends on its own sequence alone, and each
    gives it the same bits whatever else is in the batch. (On a card only about the same: there products are cut up by how many
    rows there are, and beside a prompt's chunk attention goes sequence by sequence.) Puts the model in eval mode. Any number of
    threads may each have a runner of one model."""

    def __init__(self, model: Transformer, pool: PagePool) -> None:
        self.model, self.pool = model.eval(), pool
        self.native = NativeModel.build(model, pool)
        # Weights of bfloat16 may go through training's kernels, quantized ones as bfloat16: what lies between is float32 then.
        self.whole = self.native is not None and self.native.halves and products_keep_up()
        if self.whole:
            model.round_factors(True)
        self.dtype = torch.float32 if self.whole else _torch_dtype(model)
        main = model.config.num_hidden_layers
        self._routers = [mixture.gate for layer, mixture in model.sparse_layers() if layer < main]
        self._load_LE = torch.zeros(len(self._routers), model.config.n_routed_experts or 0, dtype=torch.int64)
        self._uncounted: deque[list[Tensor]] = deque()
        self._counting = Lock()
        self._turn = _turns.setdefault(model, Lock())

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """Write the new tokens' part of the cache; their normed hidden states [T, D]."""
        return self._by_parts(batch, self._native_hidden, self._torch_hidden)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, W] of normed hidden states."""
        if self.native is not None:
            return self.native.logits(hidden_ND)
        return self.model.lm_head(hidden_ND.to(self.dtype)).float()

    @torch.inference_mode()
    def draft_hidden(self, depth: int, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """Hidden states [T, D] of multi-token prediction module `depth`, given those of the stage before at the batch's
        positions; the batch's ids are those `depth` + 1 further. Needs a pool with layers for the modules."""
        parts = iter(hidden_TD.split([len(part.ids_T) for part, _ in self._parts(batch)]))

        def through_torch(part: Batch) -> Tensor:
            cache = PagedCache(self.pool, part)
            ids_1T = part.ids_T.to(cache.position_T.device)[None]
            with self._computing():
                return self.model.mtp_hidden(next(parts)[None].to(self.dtype), ids_1T, depth, cache)[0]

        return self._by_parts(batch, lambda native, part: native.draft_hidden(depth, next(parts), part), through_torch)

    def load(self) -> Tensor:
        """How many tokens each expert of each sparse layer of the main model has had: int64 [L, E], on the CPU. Any thread
        may ask."""
        with self._counting:
            passes = [self._uncounted.popleft() for _ in range(len(self._uncounted))]
            if passes:
                layers, experts = self._load_LE.shape
                # All at once, and seldom: a count for each layer and pass would cost more than a small layer.
                by_layer = zip(*passes, strict=True)
                expert_LR = torch.stack([torch.cat([expert_TK.flatten() for expert_TK in own]) for own in by_layer])
                place_LR = expert_LR + torch.arange(layers, device=expert_LR.device)[:, None] * experts
                load_LE = torch.bincount(place_LR.flatten(), minlength=layers * experts).view(layers, experts)
                self._load_LE = self._load_LE + load_LE.cpu()
            if self.native is None:
                return self._load_LE
            return self._load_LE + self.native.load_LE[: len(self._routers)]

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, NativeModel | None]]:
        """A batch in passes: short pieces natively and as many at once as a pass takes, each longer one by itself in torch,
        whose products of several together would differ in their last bits. All at once where there are no kernels."""
        begin = rows = 0
        if self.native is None:
            yield batch, None
            return
        for number, count in enumerate(batch.count_B):
            if begin < number and (count > NATIVE_TOKENS or rows + count > NATIVE_ROWS):
                yield batch.part(begin, number), self.native
                begin, rows = number, 0
            if count > NATIVE_TOKENS:
                yield batch.part(number, number + 1), None
                begin = number + 1
            else:
                rows += count
        if begin < len(batch.count_B):
            yield (batch.part(begin, len(batch.count_B)) if begin else batch), self.native

    def _by_parts(
        self, batch: Batch, natively: Callable[[NativeModel, Batch], Tensor], through_torch: Callable[[Batch], Tensor]
    ) -> Tensor:
        hidden: list[Tensor] = []
        chosen: list[list[Tensor]] = []
        for part, native in self._parts(batch):
            hidden.append(through_torch(part) if native is None else natively(native, part))
            chosen.append(part.experts or [])
        if len(hidden) == 1:
            if batch.experts is not None:
                batch.experts[:] = chosen[0]
            return hidden[0]
        if batch.experts is not None:
            batch.experts.extend(torch.cat(own) for own in zip(*chosen, strict=True))
        return torch.cat([part_TD.float() for part_TD in hidden])

    def _native_hidden(self, native: NativeModel, batch: Batch) -> Tensor:
        hidden_TD = native.hidden(batch)
        if batch.experts is not None:
            batch.experts.extend(native.choices(len(hidden_TD))[: len(self._routers)])
        return hidden_TD

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self._turn:
            own, self.model.compute_dtype = self.model.compute_dtype, self.dtype
            try:
                yield
            finally:
                self.model.compute_dtype = own

    def _torch_hidden(self, batch: Batch) -> Tensor:
        if self.native is not None and self.dtype == torch.float32 and self.native.narrow and not self.whole:
            return self._mixed_hidden(self.native, batch)
        cache = PagedCache(self.pool, batch)
        ids_1T = batch.ids_T.to(cache.position_T.device)[None]
        chosen: list[Tensor] = []

        def note(router: object, inputs: object, routes: Routes) -> None:
            chosen.append(routes.expert_TK)

        with self._computing():
            hooks = [router.register_forward_hook(note) for router in self._routers]
            try:
                hidden_1TD = self.model.hidden(ids_1T, cache)
            finally:
                for hook in hooks:
                    hook.remove()
        if batch.experts is not None:
            batch.experts.extend(chosen)
        if chosen:
            self._uncounted.append(chosen)
            if len(self._uncounted) >= _COUNT_EVERY:
                self.load()
        return hidden_1TD[0]

    def _mixed_hidden(self, native: NativeModel, batch: Batch) -> Tensor:
        """Attention in torch, which expands the latents; feed-forward natively, which widens weights as it multiplies: most
        weights are there, and to widen them all for one chunk takes a quarter of its time."""
        cache = PagedCache(self.pool, batch)
        turn_TR = self.model.rotary.at(cache.position_T, cache.stop)
        x_TD = native.embedded(batch.ids_T)
        for layer, block in enumerate(cast(Iterable[Block], self.model.layers)):
            x_TD += block.self_attn(block.input_layernorm(x_TD[None]), turn_TR, cache.layer(layer))[0]
            native.feed_forward(layer, x_TD)
        if batch.experts is not None:
            batch.experts.extend(native.choices(len(x_TD))[: len(self._routers)])
        return native.normed(x_TD)


def _torch_dtype(model: Transformer) -> torch.dtype:
    """What torch computes in: float32 in the place of a bfloat16 that this CPU only emulates. The cache keeps its own."""
    weight = model.embed_tokens.weight
    dtype = model.compute_dtype or weight.dtype
    return _best_dtype(weight.device) if dtype == torch.bfloat16 else dtype


# A pass through torch sets the model's dtype and its routers' hooks: one at a time for each model, whoever runs it.
_turns: WeakKeyDictionary[Transformer, Lock] = WeakKeyDictionary()
# Measured once: it takes as long as reading a short prompt.
_best_dtype = cache(best_dtype)


class PagedCache:
    """The pool as the model's `Cache` for one batch."""

    def __init__(self, pool: PagePool, batch: Batch) -> None:
        size, device = pool.page_size, pool.first.device
        page_BP = batch.page_BP.numpy()
        position_T = batch.position_T.numpy()
        row_T = np.repeat(np.arange(len(batch.count_B)), batch.count_B)
        slot_T = page_BP[row_T, position_T // size].astype(np.int64) * size + position_T % size
        self.pool = pool
        self.slot_T = torch.from_numpy(slot_T).to(device)
        self.position_T = batch.position_T.to(device)
        self.few = max(batch.count_B) <= _FEW
        self._page_BP, self._row_T = batch.page_BP, torch.from_numpy(row_T)
        self.stop = 0
        # Of each sequence: its rows among T, how many positions it has seen, and its first slot if its pages follow each
        # other, else their numbers.
        self.sequences: list[tuple[slice, int, int | Tensor]] = []
        place = 0
        for row, (start, count) in enumerate(zip(batch.start_B, batch.count_B, strict=True)):
            seen = start + count
            page_P = page_BP[row, : -(-seen // size)]
            first = int(page_P[0])
            where: int | Tensor = first * size
            if len(page_P) > 1 and not np.array_equal(page_P, np.arange(first, first + len(page_P))):
                where = torch.from_numpy(page_P.astype(np.int64)).to(device)
            self.sequences.append((slice(place, place + count), seen, where))
            self.stop = max(self.stop, seen)
            place += count

    @cached_property
    def told(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `kernels.latent_triton` reads, int32: the pages of each sequence, whose a token is, and how much it sees."""
        device = self.position_T.device
        row_T = self._row_T.to(device, torch.int32)
        return self._page_BP.to(device), row_T, (self.position_T + 1).to(torch.int32)

    def layer(self, index: int) -> PagedLayer:
        return PagedLayer(self, self.pool.first[index], self.pool.second[index])


def _takes(latent_NPC: Tensor, latent_TC: Tensor) -> bool:
    """Whether the kernel for cards takes a layer's latents: of 16 bits, as they are kept."""
    return latent_NPC.dtype.itemsize == 2 and latent_TC.dtype == latent_NPC.dtype and launches(latent_NPC, latent_TC)


@dataclass
class PagedLayer:
    cache: PagedCache
    first_NPX: Tensor
    second_NPX: Tensor

    def averages(self, latent_TC: Tensor, key_TR: Tensor) -> Averages | None:
        """By Triton on a card; None of more than a few tokens a sequence and where there is no kernel for them."""
        if not (self.cache.few and _takes(self.first_NPX, latent_TC)):
            return None
        from cadre.kernels.latent_triton import latent_decode

        self._write(latent_TC, key_TR)

        def attend(q_THC: Tensor, q_THR: Tensor, scale: float) -> Tensor:
            q_THC, q_THR = q_THC.contiguous(), q_THR.contiguous()
            return latent_decode(q_THC, q_THR, self.first_NPX, self.second_NPX, *self.cache.told, scale, self.cache.stop)

        return attend

    def _write(self, first_TX: Tensor, second_TX: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.first_NPX.flatten(0, 1), self.second_NPX.flatten(0, 1)
        first.index_copy_(0, self.cache.slot_T, first_TX.to(first.dtype))
        second.index_copy_(0, self.cache.slot_T, second_TX.to(second.dtype))
        return first, second

    def append(self, first_TX: Tensor, second_TX: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Write the new positions into their pages. Of each sequence its rows among the new ones, and all it has seen,
        [S, X] twice: views where its pages follow each other, else copies."""
        first, second = self._write(first_TX, second_TX)
        for rows, seen, where in self.cache.sequences:
            if isinstance(where, int):
                kept = first[where : where + seen], second[where : where + seen]
            else:
                pages = (part.index_select(0, where).flatten(0, 1) for part in (self.first_NPX, self.second_NPX))
                kept = next(pages)[:seen], next(pages)[:seen]
            yield rows, kept[0].to(first_TX.dtype), kept[1].to(first_TX.dtype)
