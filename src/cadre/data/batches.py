"""Batches of packed windows: shuffled, endless, deterministic, exactly resumable; a grain pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cadre.data.shards import Tokens
from cadre.errors import UsageError

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True, eq=False)
class Batch:
    """ids: int64 [batch, seq_len + extra]. documents: int32 of the same shape, each token's document as a running
    number over the corpus, or None if documents are not kept apart."""

    ids: np.ndarray
    documents: np.ndarray | None


class Batches:
    """Endless batches over a stream of tokens.

    The stream is read as a ring. An epoch cuts it into len(tokens) // seq_len windows with stride seq_len, starting
    at an offset drawn anew for each epoch from [0, seq_len), and gives each window once, in an order shuffled anew
    for each epoch; a batch may straddle two epochs. A window is `extra` tokens longer than the stride: what follows
    its inputs, as targets (1, and one more for each multi-token prediction module).

    tokens: the stream. batch: windows in a batch. seq_len: inputs in a window. seed: with the stream and the sizes it
    decides every batch. separate_documents: give each token's document. part: (which, of how many) processes share out
    every batch; only this one's windows are read, every so many-th, so that any first few of a batch fall on all alike.

    Raises UsageError if a size is out of range or the stream is shorter than one batch.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch: int,
        seq_len: int,
        extra: int = 1,
        seed: int = 0,
        separate_documents: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        least = {"batch": (batch, 1), "seq_len": (seq_len, 1), "extra": (extra, 0), "seed": (seed, 0)}
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise UsageError(f"{name} {value} is out of range: at least {lowest}")
        if len(tokens) < batch * seq_len:
            raise UsageError(
                f"the corpus has {len(tokens):,} tokens; one batch needs {batch} x {seq_len} = {batch * seq_len:,}:"
                " use a smaller batch or seq_len, or more text"
            )
        self._tokens = tokens
        self._seq_len = seq_len
        self._length = seq_len + extra
        self._separate = separate_documents
        self._part = slice(part[0], None, part[1])
        self._windows = len(tokens) // seq_len
        self._batch = batch
        self._seed = seed
        self._epoch = -1
        self._identity = {"tokens": len(tokens), "batch": batch, "seq_len": seq_len, "extra": extra, "seed": seed}
        self._iterator = self._pipeline()

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one epoch."""
        return self._windows // self._batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Where the batches stand, as plain JSON: what `restore` goes on from."""
        return {**self._identity, "next_batch": self._iterator.get_state()["next_index"]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state()` was taken. Raises UsageError if it was taken from other batches."""
        changed = [f"{k} {state.get(k)} then, {v} now" for k, v in self._identity.items() if state.get(k) != v]
        if changed:
            raise UsageError(f"cannot resume the data: {'; '.join(changed)}")
        self._iterator.set_state({"next_index": state["next_batch"]})

    def _pipeline(self) -> grain.DatasetIterator[Batch]:
        grain = _import_grain()
        starts = grain.MapDataset.range(self._windows).repeat().map_with_index(self._start)
        # Dropping the remainder of an endless row costs nothing; counting it overflows grain's length.
        batches = starts.batch(self._batch, drop_remainder=True, batch_fn=self._read)
        # A batch takes a fraction of a millisecond to read: threads would only take time from the compute.
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def _start(self, index: int, place: int) -> int:
        """Position of the window at a place in the order of its epoch; `index` counts on over the epochs."""
        # Not grain's shuffle: it draws from 65,536 numbers until one is below the count of windows, which takes tens
        # of milliseconds a batch on a small corpus.
        epoch = index // self._windows
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._offset = int(rng.integers(self._seq_len))
            self._order = rng.permutation(np.arange(self._windows, dtype=np.uint32))
            self._epoch = epoch
        return self._offset + int(self._order[place]) * self._seq_len

    def _read(self, starts: list[int]) -> Batch:
        starts = starts[self._part]
        ids = np.stack([self._ring(start) for start in starts])
        if not self._separate:
            return Batch(ids, None)
        positions = np.array(starts)[:, None] + np.arange(self._length)
        lap, place = np.divmod(positions, len(self._tokens))
        document_starts = self._tokens.document_starts
        documents = np.searchsorted(document_starts, place, side="right") - 1 + lap * len(document_starts)
        return Batch(ids, documents.astype(np.int32))

    def _ring(self, start: int) -> np.ndarray:
        """int64 [seq_len + extra]: one window; past the stream's end it goes on at its beginning."""
        parts, missing = [], self._length
        while missing:
            place = start % len(self._tokens)
            parts.append(self._tokens.tokens(place, min(place + missing, len(self._tokens))))
            start += len(parts[-1])
            missing -= len(parts[-1])
        return np.concatenate(parts)


def _import_grain() -> Any:
    # grain warns of the absence of a profiler of jax, which Cadre has no use for.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import grain
    finally:
        logger.setLevel(level)
    return grain
