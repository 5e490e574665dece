"""The chat page: the files it is made of and the headers to send with them.

Hand-written HTML, CSS and ES modules, no build step and no outside request. Whoever serves it sends `index.html` at `/`
and every other file at `/page/NAME`, each with its media type and `HEADERS`, to anybody: the page asks for an API key
itself. Its addresses are relative, so it also works behind a proxy that mounts the server under a prefix.
"""

from __future__ import annotations

from pathlib import Path

# Scripts as files of their own rather than inline: "self" then needs no hash to be kept in step with the text. Trusted
# Types make every way from a string to markup or code an error, so a model's words can only ever be text.
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

_SCRIPT = "text/javascript; charset=utf-8"

# File name -> media type: all there is to serve.
FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "hood.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "theme.js": _SCRIPT,
    "main.js": _SCRIPT,
    "run.js": _SCRIPT,
    "api.js": _SCRIPT,
    "answer.js": _SCRIPT,
    "transcript.js": _SCRIPT,
    "hood.js": _SCRIPT,
    "grid.js": _SCRIPT,
    "settings.js": _SCRIPT,
    "dom.js": _SCRIPT,
}


def read(name: str) -> bytes:
    """The content of one of `FILES`. Raises `KeyError` for any other name, so no path leads out of the folder."""
    if name not in FILES:
        raise KeyError(name)
    return (Path(__file__).parent / name).read_bytes()
