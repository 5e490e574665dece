"""Tokenizers in a model directory: loading, saving, and what the rest of Cadre asks of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cadre.errors import UsageError, read_error
from cadre.files import kind_of, replace_file, require_regular
from cadre.hub.template import CHAT_TEMPLATE

SPECIAL_TOKENS = BOS, EOS, *_ = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")

# What models call them, our own name first.
_BOS_NAMES = (
    BOS,
    "<s>",
    "<bos>",
    "[BOS]",
    "<|begin_of_text|>",
    "<\uff5cbegin▁of▁sentence\uff5c>",
    "<|begin▁of▁sentence|>",
    "<|startoftext|>",
)
_EOS_NAMES = (
    EOS,
    "</s>",
    "<eos>",
    "[EOS]",
    "<|end_of_text|>",
    "<\uff5cend▁of▁sentence\uff5c>",
    "<|end▁of▁sentence|>",
    "<|endoftext|>",
)

# How Llama 3 splits text, and our own tokenizers; GGUF readers know it by name ("llama-bpe"): contractions, words with one
# character in front, up to three digits, punctuation, line ends, other white space.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

_SAMPLE = 100_000


def lossy(tokenizer: Tokenizer, texts: Iterable[str]) -> str | None:
    """Why bits per byte of this tokenizer compare with no other's, in one line: letters that it drops or changes cost its model
    nothing. None if the beginning of the texts comes back from its tokens."""
    text = ""
    for each in texts:
        text += each[: _SAMPLE - len(text)]
        if len(text) == _SAMPLE:
            break
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    back = (Counter(text) & Counter(tokenizer.decode(ids, skip_special_tokens=False))).total() / max(1, len(text))
    if back > 0.999 or not text:
        return None
    return f"the tokenizer gives back {back:.1%} of the text's letters: its bits per byte compare with no other tokenizer's"


def tokenizer_file(path: str | Path) -> Path:
    """The `tokenizer.json` that a path means: itself, that of a folder, or that of a run's model."""
    path = Path(path)
    if kind_of(path) != "folder":
        return path
    own, of_model = (folder / "tokenizer.json" for folder in (path, path / "model"))
    return own if kind_of(own) is not None or kind_of(of_model) is None else of_model


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load what `tokenizer_file` finds. Truncation and padding stored in it are switched off: a corpus must not lose its
    documents' ends.

    Raises UsageError if there is none or it cannot be read.
    """
    file = tokenizer_file(path)
    if kind_of(file) is None:
        raise UsageError(f"{file}: no such tokenizer; wanted a tokenizer.json, its folder, or a run")
    require_regular(file)
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise read_error(file, error) from error
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{file}: not a tokenizer.json that the tokenizers library reads ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, from which `transformers.AutoTokenizer` loads the same
    tokenizer. Each file is replaced atomically; the directory is made if absent.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, token_id in zip(("bos_token", "eos_token"), special_ids(tokenizer), strict=True):
        if token_id is not None:
            config[name] = tokenizer.id_to_token(token_id)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if added.issuperset(SPECIAL_TOKENS):
        config["chat_template"] = CHAT_TEMPLATE
    replace_file(directory / "tokenizer.json", tokenizer.to_str(pretty=True).encode("utf-8"))
    replace_file(directory / "tokenizer_config.json", (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode("utf-8"))


def special_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """(bos id, eos id), by the names in common use; None for one that the tokenizer lacks."""
    # Only added tokens count: "</s>" may well be an ordinary entry learnt from HTML.
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    bos = next((added[name] for name in _BOS_NAMES if name in added), None)
    eos = next((added[name] for name in _EOS_NAMES if name in added), None)
    return bos, eos


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256, in hexadecimal, of the tokenizer's own serialisation: equal for tokenizers that are equal."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the greatest id: the rows an embedding needs (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UsageError if the tokenizer has ids that a model of `vocab_size` embeddings lacks."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise UsageError(
            f"the tokenizer has ids up to {needed - 1:,}, beyond the vocabulary of {vocab_size:,}:"
            f" set vocab_size to at least {needed:,} or use another tokenizer"
        )
