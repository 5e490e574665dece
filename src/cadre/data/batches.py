"""Batches of packed windows: shuffled, endless, deterministic, exactly resumable; a grain pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cadre.data.shards import Tokens
from cadre.errors import UsageError

if TYPE_CHECKING:
    import grain

# Text that is read up to so many times teaches about as much as new text would (arXiv 2305.16264, section 6).
MANY_PASSES = 4
# Held-out loss that rises before a text has been read so often has other causes than that it is learned by heart.
REPEATED = 2


@dataclass(frozen=True, eq=False)
class Batch:
    """ids: int64 [batch, seq_len + extra]. documents: int32 of the same shape, each token's document as a running
    number over its stream, or None if documents are not kept apart. A token between two documents is the second's. learned:
    bool of the same shape, which tokens are to be learned, or None if all are."""

    ids: np.ndarray
    documents: np.ndarray | None
    learned: np.ndarray | None = None


class Batches:
    """Endless batches over a stream of tokens, or over a mixture of several.

    A stream is read as a ring. An epoch cuts it into len(tokens) // seq_len windows with stride seq_len, starting
    at an offset drawn anew for each epoch from [0, seq_len), and gives each window once, in an order shuffled anew
    for each epoch; a batch may straddle two epochs. A window is `extra` tokens longer than the stride: what follows
    its inputs, as targets (1, and one more for each multi-token prediction module). Of several streams each goes through
    epochs of its own, and the windows of any run of batches are shared out among them by weight, to within one or two each.

    streams: the streams. weights: how often each is drawn from, relative to the others (equally often, if None); one of weight
    0 rests. batch: windows in a batch. seq_len: inputs in a window. seed: with streams and sizes it decides every batch.
    separate_documents: give each token's document. part: (i, n), where n processes share every batch and only the windows i,
    i + n, i + 2n, ... are read: so the first k windows of a batch, for any k, are shared as evenly as can be.

    Raises UsageError if a size is out of range, the streams are shorter than one batch or one of them than a window.
    """

    def __init__(
        self,
        *streams: Tokens,
        weights: Sequence[float] | None = None,
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
        lengths = [len(stream) for stream in streams]
        if sum(lengths) < batch * seq_len:
            raise UsageError(
                f"the corpus has {sum(lengths):,} tokens; one batch needs {batch} x {seq_len} = {batch * seq_len:,}:"
                " use a smaller batch or seq_len, or more text"
            )
        if min(lengths) < seq_len:
            raise UsageError(
                f"source {lengths.index(min(lengths)) + 1} of {len(lengths)} has {min(lengths):,} tokens of training text, "
                f"less what is held out; a sequence needs {seq_len:,}: give it more text, or leave it out"
            )
        self._streams = [_Stream(number if len(streams) > 1 else None, stream, seq_len, seed)
                         for number, stream in enumerate(streams)]  # fmt: skip
        self._weights = [1.0] * len(streams) if weights is None else list(weights)
        self._length = seq_len + extra
        self._separate = separate_documents
        self._part = slice(part[0], None, part[1])
        self._batch, self._seed = batch, seed
        tokens = lengths if len(streams) > 1 else lengths[0]
        self._identity = {"tokens": tokens, "batch": batch, "seq_len": seq_len, "extra": extra, "seed": seed}
        self._resting = [0] * len(streams)
        self._iterator = self._pipeline()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Where the batches stand, as plain JSON: what `restore` goes on from."""
        state, windows = self._iterator.get_state(), list(self._resting)
        for number, stream in zip(self._active(), state["parents"], strict=True):
            windows[number] = stream["next_index"]
        return {**self._identity, "windows": windows, "mixed": state["index"]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state()` was taken; with other weights every stream goes on where it was. Raises UsageError if
        it was taken from other batches."""
        identity = {**self._identity, "streams": len(self._streams)}
        then = {**state, "streams": len(state.get("windows", []))}
        changed = [f"{name} {then.get(name)} then, {value} now" for name, value in identity.items() if then.get(name) != value]
        if changed:
            raise UsageError(f"cannot resume the data: {'; '.join(changed)}")
        self._resting = list(state["windows"])
        streams = [{"next_index": state["windows"][number]} for number in self._active()]
        self._iterator.set_state({"parents": streams, "index": state["mixed"], "stop": False})

    def _active(self) -> list[int]:
        return [number for number, weight in enumerate(self._weights) if weight > 0]

    def _pipeline(self) -> grain.DatasetIterator[Batch]:
        grain = _import_grain()
        # A batch takes a fraction of a millisecond to read: threads would only take time from the compute.
        here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        streams = [
            grain.MapDataset.range(stream.windows).repeat().map_with_index(stream.window).to_iter_dataset(here)
            for stream in (self._streams[number] for number in self._active())
        ]
        mixed = grain.IterDataset.mix(streams, [self._weights[number] for number in self._active()])
        return iter(mixed.batch(self._batch, drop_remainder=True, batch_fn=self._read))

    def _read(self, windows: list[_Window]) -> Batch:
        if len(self._streams) > 1:
            # As they come, streams take turns, and each process would always get the same one's.
            first = windows[0]
            order = np.random.default_rng([self._seed, first.stream.number or 0, first.index]).permutation(len(windows))
            windows = [windows[place] for place in order]
        windows = windows[self._part]
        ids = np.stack([self._ring(window, window.stream.tokens.tokens) for window in windows])
        documents = learned = None
        if self._separate:
            documents = np.stack([self._documents(window) for window in windows]).astype(np.int32)
        if any(stream.tokens.masked for stream in self._streams):
            learned = np.stack([self._ring(window, window.stream.tokens.mask) for window in windows])
        return Batch(ids, documents, learned)

    def _documents(self, window: _Window) -> np.ndarray:
        tokens = window.stream.tokens
        # The token that ends a document is what the next one is predicted from, in scoring too: it is the next one's first.
        lap, place = np.divmod(window.start + np.arange(self._length) + tokens.ended, len(tokens))
        starts = tokens.document_starts
        return np.searchsorted(starts, place, side="right") - 1 + lap * len(starts)

    def _ring(self, window: _Window, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """[seq_len + extra]: what `read` gives for one window; past the stream's end it goes on at its beginning."""
        parts, missing, start, tokens = [], self._length, window.start, window.stream.tokens
        while missing:
            place = start % len(tokens)
            parts.append(read(place, min(place + missing, len(tokens))))
            start += len(parts[-1])
            missing -= len(parts[-1])
        return np.concatenate(parts)


class _Stream:
    """The windows of one stream. `number`: which of several it is, or None."""

    def __init__(self, number: int | None, tokens: Tokens, seq_len: int, seed: int) -> None:
        self.number, self.tokens, self.windows = number, tokens, len(tokens) // seq_len
        self._seq_len, self._seed, self._epoch = seq_len, seed, -1

    def window(self, index: int, place: int) -> _Window:
        """The window at a place in the order of its epoch; `index` counts on over the epochs."""
        # Not grain's shuffle: it draws from 65,536 numbers until one is below the count of windows, which takes tens
        # of milliseconds a batch on a small corpus.
        epoch = index // self.windows
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch, *([] if self.number is None else [self.number])])
            self._offset = int(rng.integers(self._seq_len))
            self._order = rng.permutation(np.arange(self.windows, dtype=np.uint32))
            self._epoch = epoch
        return _Window(self, index, self._offset + int(self._order[place]) * self._seq_len)


@dataclass(frozen=True, eq=False)
class _Window:
    """`index`: how many windows of its stream came before it. `start`: its position in the stream."""

    stream: _Stream
    index: int
    start: int


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
