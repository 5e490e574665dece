"""The key-value cache: pages of a fixed number of positions from one pool, shared by all requests.

Letters in names: L layer, N pages, P position within a page; what a layer keeps of a position is two tensors: latent C and
rotary key R, or keys and values, both of G key-value heads of width K.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from cadre.errors import UsageError
from cadre.model.config import ModelConfig

if TYPE_CHECKING:
    from cadre.model.transformer import Transformer


# Positions that a page holds.
PAGE_SIZE = 16


class PagePool:
    """Every layer's pages as two tensors allocated once, and the book of who holds which page.

    first, second: [L, N, P, ...] of `dtype`, uninitialised. Latent attention keeps one latent [.., C] and one rotary key
    [.., R] a position, shared by all heads (DeepSeek-V2 report, section 2.1); grouped-query attention keeps keys and values
    [.., G, K]. `layers` is the main model's number unless given (multi-token prediction blocks follow in number).

    A page is referenced by any number of sequences. A full one can be published under the hash chain of its token ids
    (`chain_key`) and found again by it, also once nobody references it: such pages are overwritten last, the least
    recently used first (as vLLM does, arXiv 2309.06180, section 4.4). Raises `UsageError` for sizes below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layers: int | None = None,
    ) -> None:
        for name, value in (("pages", pages), ("page_size", page_size)):
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        self.page_size = page_size
        depth = config.num_hidden_layers if layers is None else layers
        first, second = _widths(config)
        self.first = torch.empty(depth, pages, page_size, *first, dtype=dtype, device=device)
        self.second = torch.empty(depth, pages, page_size, *second, dtype=dtype, device=device)
        # The modules' layers have gaps where drafting was off, and attention over what memory held before may be NaN.
        for part in (self.first, self.second):
            part[config.num_hidden_layers :].zero_()
        self._references = [0] * pages
        self._key_of: list[bytes | None] = [None] * pages
        self._page_of: dict[bytes, int] = {}
        # Pages without references, in the order they are given out again.
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))

    @classmethod
    def for_budget(
        cls,
        config: ModelConfig,
        budget: int,
        *,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layers: int | None = None,
    ) -> PagePool:
        """As many pages as `budget` bytes hold. Raises `UsageError` if that is none."""
        one = page_size * bytes_per_position(config, dtype, layers)
        if budget < one:
            raise UsageError(f"a cache of {budget:,} bytes holds no page of {page_size} tokens: give at least {one:,} bytes")
        return cls(config, pages=budget // one, page_size=page_size, dtype=dtype, device=device, layers=layers)

    @property
    def pages(self) -> int:
        return len(self._references)

    @property
    def tokens(self) -> int:
        """Positions that all pages hold together."""
        return self.pages * self.page_size

    @property
    def free(self) -> int:
        """Pages that can be given out, those that are only kept to be found again among them."""
        return len(self._idle)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position takes over all layers."""
        held = self.first.nbytes + self.second.nbytes
        return held // self.tokens

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Pages to write, referenced once each; `count` must be at most `free`. One that lies behind page `after` is
        preferred where it costs nothing: a sequence whose pages follow each other is read without copying."""
        taken: list[int] = []
        if count == 1 and after is not None and after + 1 in self._idle and self._key_of[after + 1] is None:
            del self._idle[after + 1]
            taken.append(after + 1)
        while len(taken) < count:
            page, _ = self._idle.popitem(last=False)
            key = self._key_of[page]
            if key is not None:
                del self._page_of[key]
                self._key_of[page] = None
            taken.append(page)
        for page in taken:
            self._references[page] = 1
        return sorted(taken)

    def release(self, pages: Sequence[int]) -> None:
        """Give up one reference to each page of a sequence. Its last pages are overwritten first: others are likelier to
        share the beginning."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._idle[page] = None
                if self._key_of[page] is None:
                    self._idle.move_to_end(page, last=False)

    def publish(self, page: int, key: bytes) -> None:
        """Let a full page be found by its key. The first page published under a key stays the one that is found."""
        if self._page_of.setdefault(key, page) == page:
            self._key_of[page] = key

    def find(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def is_idle(self, page: int) -> bool:
        return self._references[page] == 0

    def share(self, page: int) -> None:
        """Reference a found page once more."""
        if self._references[page] == 0:
            del self._idle[page]
        self._references[page] += 1

    def recover(self) -> None:
        """Nobody references any page, whatever an interruption left half done; pages that were found stay findable."""
        self._references = [0] * self.pages
        self._key_of = [None] * self.pages
        for key, page in self._page_of.items():
            self._key_of[page] = key
        self._idle = OrderedDict.fromkeys(sorted(range(self.pages), key=lambda page: self._key_of[page] is not None))

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the book agrees with itself and with `held`, the pages of every living sequence."""
        references = [0] * self.pages
        for pages in held:
            for page in pages:
                references[page] += 1
        assert references == self._references, "references differ from what sequences hold"
        assert set(self._idle) == {page for page in range(self.pages) if not references[page]}, "idle pages"
        published = {key: page for page, key in enumerate(self._key_of) if key is not None}
        assert published == self._page_of, "published pages"


def chain_key(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a full page: a hash of its ids and of the key of the page before (empty for the first), so of all ids up
    to its end. Cryptographic, because a request must not be able to find another's pages by a made collision."""
    return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


def bytes_per_position(config: ModelConfig, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes that one position takes over all layers: `cadre.count`'s kv_cache_bytes_per_token."""
    kept = sum(torch.Size(width).numel() for width in _widths(config))
    return (config.num_hidden_layers if layers is None else layers) * kept * dtype.itemsize


def cache_dtype(model: Transformer) -> torch.dtype:
    """What a model's cache is kept in: what its weights or its arithmetic have, bfloat16 if either is that."""
    weight = model.embed_tokens.weight.dtype
    return weight if weight == torch.bfloat16 else model.compute_dtype or weight


def bytes_for(
    config: ModelConfig, positions: int, dtype: torch.dtype, page_size: int = PAGE_SIZE, layers: int | None = None
) -> int:
    """Bytes of the pages that one sequence of so many positions needs."""
    return -(-positions // page_size) * page_size * bytes_per_position(config, dtype, layers)


def _widths(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors that a layer keeps of one position."""
    if config.attention == "latent":
        return (config.kv_lora_rank or 0,), (config.qk_rope_head_dim or 0,)
    heads = (config.num_key_value_heads or 0, config.head_dim or 0)
    return heads, heads
