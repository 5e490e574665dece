"""A single token as text: what its bytes are, and how to write them down when they are no whole character."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark of a space


class TokenTexts:
    """The bytes and the text of a tokenizer's tokens, of byte-level and of SentencePiece-like vocabularies."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.known: dict[int, bytes] = {}
        # No token covers more characters of a text than its name has.
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)
        self.alphabet = _byte_alphabet() if _byte_level(json.loads(tokenizer.to_str())["decoder"]) else None

    def raw(self, token: int) -> bytes:
        """What the token stands for in a text; the name of a special token, nothing for an id without one."""
        found = self.known.get(token)
        if found is None:
            found = self.known[token] = self._raw(token)
        return found

    def _raw(self, token: int) -> bytes:
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if token in self.special:
            return piece.encode()
        if self.alphabet is not None:
            if all(letter in self.alphabet for letter in piece):
                return bytes(self.alphabet[letter] for letter in piece)
            return piece.encode()  # an added token is written as it is
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()

    def text(self, token: int) -> str:
        """The token as text; bytes that are no whole character in OpenAI's spelling, `bytes:\\xe2\\x82`."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def begun(self, token: int) -> int:
        """How many characters of a generated text begin in this token; special tokens give no text there."""
        return 0 if token in self.special else _characters(self.raw(token))

    def offsets(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        """Where each token begins in the text that `ids` were decoded to, special tokens written out."""
        # Some tokenizers drop the space that their first token begins with.
        dropped = int(self.raw(ids[0]).startswith(b" ") and not text.startswith(" "))
        starts = accumulate((_characters(self.raw(token)) for token in ids[:-1]), initial=-dropped)
        return tuple(max(0, start) for start in starts)


def _characters(raw: bytes) -> int:
    return sum(byte & 0xC0 != 0x80 for byte in raw)


def _byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_byte_level, decoder.get("decoders", ())))


@lru_cache(1)
def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level vocabularies write for each byte (GPT-2's `bytes_to_unicode`), inverted."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in letters.values())
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}
