"""JSON written in pieces: an answer may have megabytes, and whoever writes it in one go keeps everybody else waiting."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

_ROWS = 64  # of a long list, written at a time
_SLICE = 0.002  # seconds between two chances for others


def dumps(value: Any) -> str:
    """The JSON text of a value; iterators stand for lists."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=list)


def pieces(value: Any) -> Iterator[str]:
    """The same text, each piece quickly made: an iterator is drawn from as its list is written. Other lists, and the keys of
    a dictionary, should be few."""
    if isinstance(value, dict):
        for number, (key, item) in enumerate(value.items()):
            yield ("," if number else "{") + dumps(key) + ":"
            yield from pieces(item)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield "," if number else "["
            yield from pieces(item)
        yield "]" if value else "[]"
    elif isinstance(value, Iterator):
        opening = "["
        while rows := list(islice(value, _ROWS)):
            yield opening + dumps(rows)[1:-1]
            opening = ","
        yield "]" if opening == "," else "[]"
    else:
        yield dumps(value)


async def written(value: Any) -> str:
    """The JSON text of a value, made while the event loop goes on with other work."""
    parts, begin = [], time.monotonic()
    for piece in pieces(value):
        parts.append(piece)
        if time.monotonic() - begin > _SLICE:
            await asyncio.sleep(0)
            begin = time.monotonic()
    return "".join(parts)
