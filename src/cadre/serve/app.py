"""The web application: which address leads where, and what every answer has in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response

from cadre.serve import page, replies
from cadre.serve.admission import Admission, Place
from cadre.serve.chat import chat_text, converse
from cadre.serve.completions import complete
from cadre.serve.errors import ApiError, ErrorReply, install_handlers
from cadre.serve.gate import Gate
from cadre.serve.loop import EngineLoop
from cadre.serve.metrics import CONTENT_TYPE, Metrics
from cadre.serve.pieces import dumps, written
from cadre.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from cadre.serve.service import Card, Service
from cadre.serve.tokens import TokenTexts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cadre.infer.chat import Render
    from cadre.infer.engine import Engine

_GENERATION = (400, 401, 403, 404, 413, 429, 500, 503, 504)
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    card: Card,
    *,
    render: Render | None = None,
    max_batch: int = 64,
    max_queue: int = 128,
    timeout: float = 600.0,
    api_key: str | None = None,
    hosts: Collection[str] = (),
    local: bool = False,
) -> FastAPI:
    """An OpenAI-compatible API over one engine, and the chat page.

    The engine belongs to the application from its start to its end: nothing else may touch it in between. `render`: writes chat
    messages by the model's template; without one they are continued as a transcript. `max_batch`: as the engine's;
    `max_queue`: sequences that may wait beyond it. `timeout`: seconds for a request in all. For `hosts` and `local` see
    `Gate`. `app.state` has the `loop` and the `admission`.
    """
    metrics = Metrics(engine)
    loop = EngineLoop(engine, metrics)
    admission = Admission(loop, max_batch=max_batch, max_queue=max_queue, timeout=timeout)
    service = Service(card, tokenizer, render, TokenTexts(tokenizer), admission)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await admission.stop()

    app = FastAPI(title="Cadre", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.loop, app.state.admission = loop, admission
    install_handlers(app)
    _add_api(app, service)
    _add_operations(app, admission, metrics)
    pages = _add_page(app)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    app.add_middleware(
        Gate,
        metrics=metrics,
        api_key=api_key,
        hosts=hosts,
        local=local,
        open_paths=("/health", *pages),
        known_paths={route.path for route in app.routes if hasattr(route, "path")},
    )
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=replies.Models, responses=_errors(401, 403))
    async def models() -> Any:
        return JSONResponse({"object": "list", "data": [service.model_object()]})

    @app.get("/v1/models/{name:path}", response_model=replies.Model, responses=_errors(401, 403, 404))
    async def model(name: str) -> Any:
        service.check_model(name)
        return JSONResponse(service.model_object())

    @app.post("/v1/completions", response_model=replies.Completion, responses=_errors(*_GENERATION) | _STREAM)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await complete(service, request, body)

    @app.post("/v1/chat/completions", response_model=replies.ChatCompletion, responses=_errors(*_GENERATION) | _STREAM)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await converse(service, request, body)

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        raise ApiError(404, "embeddings are not offered: this server has a model that generates text", code="not_offered")

    @app.post("/v1/responses", include_in_schema=False)
    async def responses() -> Response:
        raise ApiError(404, "the Responses API is not offered: use /v1/chat/completions", code="not_offered")

    @app.post("/tokenize", response_model=replies.Tokens, responses=_errors(*_GENERATION))
    async def tokenize(request: Request, body: TokenizeRequest) -> Any:
        service.check_model(body.model)

        async def work(_: Place) -> Response:
            if body.messages is None:
                text, special = body.prompt or "", body.add_special_tokens
            else:
                text, special = await chat_text(service, body.messages)
            ids = await service.tokenize(text, special)
            return _json(await written({"count": len(ids), "max_model_len": service.context, "tokens": iter(ids)}))

        return await service.admission.serve(request, 1, work)

    @app.post("/detokenize", response_model=replies.Detokenized, responses=_errors(*_GENERATION))
    async def detokenize(request: Request, body: DetokenizeRequest) -> Any:
        service.check_model(body.model)
        service.check_ids(body.tokens, "tokens")

        async def work(_: Place) -> Response:
            return _json(dumps({"prompt": await service.decode(body.tokens)}))

        return await service.admission.serve(request, 1, work)


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


def _add_operations(app: FastAPI, admission: Admission, metrics: Metrics) -> None:
    @app.get("/health", response_model=replies.Health, responses=_errors(403, 503))
    async def health() -> Any:
        admission.check(0)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses=_errors(401, 403) | {200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        text = await asyncio.to_thread(metrics.text)  # with many experts a long one
        return Response(text, headers={"content-type": CONTENT_TYPE})


def _add_page(app: FastAPI) -> list[str]:
    """The chat page's files; returns their addresses."""
    addresses = []
    for name, media_type in page.FILES.items():
        address = "/" if name == "index.html" else f"/page/{name}"
        app.add_api_route(address, _file(name, media_type), include_in_schema=False)
        addresses.append(address)
    return addresses


def _file(name: str, media_type: str) -> Any:
    async def answer() -> Response:
        return Response(page.read(name), headers=page.HEADERS | {"content-type": media_type})

    return answer


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply} for status in statuses}


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description. FastAPI announces its own answer to bad input, which here is a 400 of OpenAI's shape."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema
