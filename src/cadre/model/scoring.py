"""How well a model predicts text: bits per byte, the measure that does not depend on the tokenizer.

Letters in names: B window, T position, N token of a document or scored position, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cadre.errors import UsageError, encodable
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Logits held at once, in elements: a few MB in float32, so that the passes over them stay in the cache.
_CHUNK_ELEMENTS = 1 << 20
_CHUNK_ELEMENTS_OF_A_CARD = 1 << 26
# Windows computed at once, across documents.
_TOGETHER = 8
# Characters tokenised at a time: documents are scored together up to this much, so that their short ends share batches. A
# tokenizer's answer takes some hundred bytes a token.
_GROUP_CHARACTERS = 1 << 16


class Text(Protocol):
    """A document. `answers` is None where all of it counts; else it is a conversation as a chat template writes it, special
    tokens included, of which some parts count."""

    @property
    def text(self) -> str: ...

    @property
    def answers(self) -> Sequence[tuple[int, int]] | None: ...

    def learned(self, offsets: Sequence[tuple[int, int]]) -> list[bool]:
        """Which tokens count, of tokens that are these letters of the text."""
        ...

    @property
    def learned_bytes(self) -> int:
        """The size of what counts in UTF-8."""
        ...


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of text in nats, its tokens, and its size in UTF-8 bytes. Scores add up."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def score_documents(
    model: Transformer, tokenizer: Tokenizer, documents: Iterable[Text], *, context: int, stride: int | None = None
) -> Score:
    """The score of documents together; see `score_each`. Raises `UsageError` also if they hold no text at all."""
    total = sum(score_each(model, tokenizer, documents, context=context, stride=stride), Score(0.0, 0, 0))
    if not total.bytes:
        raise UsageError("nothing to score: the documents hold no text")
    return total


def score_each(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[Text],
    *,
    context: int,
    stride: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Score]:
    """The score of each document, in order, every token predicted within a sliding context; see `token_nats`.

    A document starts from the token that starts one in training (`document_start`) and counts without its end. Special
    tokens written out in it are text. Of a conversation count the answers alone, with the special token that ends each. Bits
    per byte are comparable between tokenizers that lose nothing of the text.
    `progress` is called with the number of tokens after each pass. Puts the model in eval mode.

    Raises `UsageError` for a context or stride out of range, and if config and tokenizer name no token that starts a
    document.
    """
    stride = _check(model.config, context, stride)
    first = document_start(model.config, tokenizer)
    encoder = type(tokenizer).from_str(tokenizer.to_str())
    encoder.encode_special_tokens = True
    for group in _groups(documents):
        with encodable("the text"):
            plain = iter(encoder.encode_batch_fast([d.text for d in group if d.answers is None], add_special_tokens=False))
            chats = iter(tokenizer.encode_batch([d.text for d in group if d.answers is not None], add_special_tokens=False))
            encoded = [next(plain if document.answers is None else chats) for document in group]
        # Templates may write what a document starts from themselves: it stands there once, as in training.
        begun = [d.answers is not None and encoding.ids[:1] == [first] for d, encoding in zip(group, encoded, strict=True)]
        ids = [torch.tensor(e.ids[skip:], dtype=torch.int64) for e, skip in zip(encoded, begun, strict=True)]
        counted = [
            None if document.answers is None else torch.tensor(document.learned(e.offsets[skip:]), dtype=torch.bool)
            for document, e, skip in zip(group, encoded, begun, strict=True)
        ]
        del encoded, plain, chats
        nats = _nats(model, ids, first, context, stride, progress)
        for document, nats_N, counted_N in zip(group, nats, counted, strict=True):
            if counted_N is not None:
                nats_N = nats_N[counted_N]
            yield Score(float(nats_N.double().sum()), len(nats_N), document.learned_bytes)


def token_nats(
    model: Transformer, ids: Sequence[int] | Tensor, *, first: int, context: int, stride: int | None = None
) -> Tensor:
    """Negative log-likelihood in nats of every token of one document: float32 [N] on the CPU.

    The document is preceded by the token `first`. Windows of `context` tokens move by `stride` (half of `context` unless
    given); each token is scored once, in the first window that reaches it, and so sees at least `context - stride` tokens
    before it where there are so many. `stride` = `context` is cheapest, a smaller one scores better. Puts the model in
    eval mode. Raises `UsageError` for a context or stride out of range.
    """
    stride = _check(model.config, context, stride)
    return _nats(model, [torch.as_tensor(ids, dtype=torch.int64)], first, context, stride, None)[0]


def document_start(config: ModelConfig, tokenizer: Tokenizer) -> int:
    """The token that a document is predicted from: what the tokenizer itself puts before a text, else the token that
    ends the document before it, else the one that begins a text. Raises `UsageError` if there is none of them."""
    own = tokenizer.encode("").ids
    if own:
        return own[0]
    start = config.end_tokens[0] if config.end_tokens else config.bos_token_id
    if start is None:
        raise UsageError("the model names no eos_token_id or bos_token_id, and a document needs one to start from")
    return start


def _check(config: ModelConfig, context: int, stride: int | None) -> int:
    """The stride, once all is in range."""
    most = config.max_position_embeddings
    if not 1 <= context <= most:
        raise UsageError(f"context is {context}; it must be from 1 to {most}, the model's max_position_embeddings")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError(f"stride is {stride}; it must be from 1 to the context ({context})")
    return stride


def _groups(documents: Iterable[Text]) -> Iterator[list[Text]]:
    group: list[Text] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class _Window:
    """Positions start to stop - 1 of one document, of which those from `scored` on count."""

    document: int
    start: int
    stop: int
    scored: int

    def __len__(self) -> int:
        return self.stop - self.start


def _windows(document: int, length: int, context: int, stride: int) -> Iterator[_Window]:
    start = scored = 0
    while scored < length:
        stop = min(start + context, length)
        yield _Window(document, start, stop, scored)
        start, scored = start + stride, stop


@torch.inference_mode()
def _nats(
    model: Transformer,
    documents: list[Tensor],
    first: int,
    context: int,
    stride: int,
    progress: Callable[[int], None] | None,
) -> list[Tensor]:
    """`token_nats` of several documents at once."""
    model.eval()
    device = model.device
    nats = [torch.empty(len(ids), dtype=torch.float32) for ids in documents]
    inputs = [torch.cat((torch.tensor([first]), ids[:-1])) for ids in documents]
    windows = [w for number, ids in enumerate(documents) for w in _windows(number, len(ids), context, stride)]
    windows.sort(key=len, reverse=True)  # equal lengths share a batch; the shorter ones need little padding
    for place in range(0, len(windows), _TOGETHER):
        together = windows[place : place + _TOGETHER]
        ids_BT = torch.zeros(len(together), len(together[0]), dtype=torch.int64)
        for row, w in zip(ids_BT, together, strict=True):
            row[: len(w)] = inputs[w.document][w.start : w.stop]
        # Padding on the right needs no mask: attention is causal, and no expert drops a token for it.
        hidden_BTD = model.hidden(ids_BT.to(device))
        counted = [slice(w.scored - w.start, len(w)) for w in together]
        hidden_ND = torch.cat([hidden[part] for hidden, part in zip(hidden_BTD, counted, strict=True)])
        target_N = torch.cat([documents[w.document][w.scored : w.stop] for w in together]).to(device)
        values = _cross_entropy(model, hidden_ND, target_N).cpu().split([w.stop - w.scored for w in together])
        for w, value in zip(together, values, strict=True):
            nats[w.document][w.scored : w.stop] = value
        if progress is not None:
            progress(len(target_N))
    return nats


def _cross_entropy(model: Transformer, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """float32 [N]: -log softmax(head(hidden_n))[target_n], a few rows' logits at a time."""
    elements = _CHUNK_ELEMENTS_OF_A_CARD if hidden_ND.is_cuda else _CHUNK_ELEMENTS
    rows = max(64, elements // model.config.vocab_size)
    return torch.cat(
        [
            F.cross_entropy(model.lm_head(hidden).float(), target, reduction="none")
            for hidden, target in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
        ]
    )
