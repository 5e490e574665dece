"""`cadre serve`: a model over HTTP, for the clients of OpenAI's API, and a chat page."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

import typer

from cadre.cli.models import load_with_tokenizer
from cadre.cli.options import Model, Quantize
from cadre.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def serve(
    model: Model,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="CADRE_API_KEY", help="What clients must present.", show_default=False),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients call the model; its folder if absent.", show_default=False)
    ] = None,
    max_batch: Annotated[int, typer.Option(metavar="N", min=1, max=1024, help="Sequences that run at a time.")] = 64,
    max_queue: Annotated[int, typer.Option(metavar="N", min=0, max=100_000, help="Sequences that may wait beyond it.")] = 128,
    cache: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for the key-value cache, such as 2GiB; by default a share of what is free.",
                     show_default=False),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", min=1, help="Seconds that a request may take.")] = 600.0,
    grace: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds to finish running requests when told to stop.")
    ] = 30.0,
    speculate: Annotated[
        int, typer.Option(metavar="N", min=0, max=16, help="Tokens to draft with the model's multi-token prediction modules.")
    ] = 0,
    quantize: Quantize = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that a proxy gives this server; may be repeated.", show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Serve a model: OpenAI's API under /v1, a chat page at /."""
    try:
        from cadre.serve.server import listen, run
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}, which is not installed: pip install 'cadre-lm[serve]'") from None
    from cadre.hub.directory import display_name, model_directory
    from cadre.hub.template import chat_template
    from cadre.infer.engine import Engine
    from cadre.plan.count import count
    from cadre.serve.app import create_app
    from cadre.serve.service import Card

    cache_bytes = None if cache is None else parse_size(cache)
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise UsageError("--api-key: a key consists of printable ASCII characters without spaces, at least one")
    directory = model_directory(model)
    listener = listen(host, port)  # before the model loads: a port that is taken is told at once
    loaded, tokenizer = load_with_tokenizer(model, quantize)
    template = chat_template(directory)
    engine = Engine(loaded, tokenizer, cache_bytes=cache_bytes, max_batch=max_batch, speculate=speculate)
    counted = count(loaded.config, cache_bytes=engine.pool.first.element_size())
    card = Card(
        model_name or display_name(directory),
        loaded.config,
        counted.kv_cache_bytes_per_token,
        counted.kv_cache_bytes_per_token_mha,
        base_model=template is None or template.untrained,
    )
    local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    app = create_app(
        engine,
        tokenizer,
        card,
        render=None if template is None else template.render,
        max_batch=max_batch,
        max_queue=max_queue,
        timeout=timeout,
        api_key=api_key,
        hosts=allow_host or (),
        local=local,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    typer.echo(f"{card.name} at {address}/v1 (OpenAI's API), {address}/ (chat page)", err=True)
    if not local and api_key is None:
        typer.echo("no --api-key: whoever reaches this address can use the model", err=True)
    run(app, listener, grace=grace)


def parse_size(text: str) -> int:
    """Bytes of a size such as 2GiB, 500 MB or 1000000. Raises `UsageError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b|b|)\s*", text, re.IGNORECASE)
    size = int(min(float(match[1]) * _UNITS[match[2].lower()], 2.0**62)) if match else 0
    if size < 1:
        raise UsageError(f"--cache is {text[:40]!r}; it must be a size such as 2GiB or 500MB")
    if size >= 2**62:
        raise UsageError(f"--cache is {text[:40]!r}, more than any machine has")
    return size
