"""Training a byte-level BPE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cadre.data.split import pieces
from cadre.errors import UsageError
from cadre.hub.tokenizer import LLAMA3_SPLIT, SPECIAL_TOKENS

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# Far beyond any tokenizer; from 2**31 on the library ends the process.
MOST_VOCAB_SIZE = 2**24


# Training takes time in the square of the longest stretch that the rule does not split.
_STRETCH = 256
_LONG = re.compile(rf"(?<!\S)\S{{{4 * _STRETCH},}}|(?<!\s)\s{{{4 * _STRETCH},}}")


def _in_stretches(texts: Iterable[str]) -> Iterator[str]:
    """The texts, stretches of thousands of letters without a space, or of spaces, cut into short ones."""
    for text in texts:
        place = 0
        for found in _LONG.finditer(text):
            yield text[place : found.start()]
            for place in range(found.start(), found.end(), _STRETCH):
                yield text[place : min(place + _STRETCH, found.end())]
            place = found.end()
        yield text[place:]


# A tokenizer's merges settle on far less text; on all of a large corpus counting alone would take hours.
MOST_CHARACTERS = 2**27
_PIECE = 2**16


def sampled(texts: Iterable[str], characters: int) -> Iterator[str]:
    """What a tokenizer is trained on: the texts, which have so many characters together, or, where that is more than
    `MOST_CHARACTERS`, about that many of them, in pieces from all over the texts."""
    share = MOST_CHARACTERS / max(characters, 1)
    if share >= 1:
        yield from texts
        return
    taken = 0.0
    for text in texts:
        for piece in pieces(text, _PIECE):
            taken += share
            if taken >= 1:
                taken -= 1
                yield piece


def check_size(vocab_size: int) -> None:
    """Raises UsageError for a size that no tokenizer can be trained to."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"vocab_size {vocab_size} is too small: byte-level BPE needs at least {MIN_VOCAB_SIZE}"
            f" (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    if vocab_size > MOST_VOCAB_SIZE:
        raise UsageError(f"vocab_size {vocab_size} is too large: it must be at most {MOST_VOCAB_SIZE:,}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, section 3.2; on bytes as in the GPT-2 report, section 2.2).

    Any text comes back from its tokens byte for byte: there is no normaliser, and all 256 bytes are in the
    vocabulary. Ids 0 to 3 are `<|bos|>`, `<|eos|>`, `<|user|>`, `<|assistant|>`. The same texts give the same
    tokenizer. A small corpus may run out of pairs to merge before `vocab_size` entries are reached.

    Raises UsageError if `vocab_size` is below 260 (256 bytes and the special tokens), or above `MOST_VOCAB_SIZE`.
    """
    check_size(vocab_size)
    # ignore_merges is part of the rule that "llama-bpe" names: a word that is an entry is never split.
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_in_stretches(texts), trainer)
    return tokenizer
