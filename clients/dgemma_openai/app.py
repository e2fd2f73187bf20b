"""The application: routes, checks in front of them, errors behind them. Knows no port and no process."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma_client import Client
from dgemma_client.errors import ClientError
from dgemma_openai import logs
from dgemma_openai.errors import ApiError, from_client, from_validation
from dgemma_openai.gateway import Gateway
from dgemma_openai.openapi import publish
from dgemma_openai.routes import chat, completions, editors, messages, models, responses, service, tokens
from dgemma_openai.routes.playground import playground_router
from dgemma_openai.security import ANTHROPIC_PREFIX, Guard
from dgemma_openai.settings import Settings

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DESCRIPTION = "DiffusionGemma on NVIDIA Triton, with the APIs of OpenAI and NIM."


def create_app(settings: Settings, client: Client | None = None) -> FastAPI:
    """`client` replaces the one to `settings.triton`; it is closed with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.gateway = Gateway(settings, client or Client(settings.triton, model=settings.model))
        yield
        await app.state.gateway.close()

    app = FastAPI(
        title="DiffusionGemma",
        description=_DESCRIPTION,
        version=version("dgemma-triton"),
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    for module in (chat, completions, editors, messages, models, responses, service, tokens):
        app.include_router(module.router)
    if settings.playground:
        app.include_router(playground_router())
    _add_handlers(app)
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(_Watch)
    publish(app, settings)
    return app


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _refused(request: Request, error: ApiError) -> JSONResponse:
        return _answer(request, error)

    @app.exception_handler(ClientError)
    async def _failed(request: Request, error: ClientError) -> JSONResponse:
        return _answer(request, from_client(error, {}))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _answer(request, from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = "not_found" if error.status_code == 404 else None
        return _answer(request, ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        request_id = request.state.request_id
        _log.error("request %s failed", request_id, exc_info=error)
        message = f"internal error; the log has it under {request_id}"
        return _answer(request, ApiError(500, message, headers={"x-request-id": request_id}))  # sent outside of _Watch


def _answer(request: Request, error: ApiError) -> JSONResponse:
    anthropic = request.url.path.startswith(ANTHROPIC_PREFIX)
    body = error.anthropic_body() if anthropic else error.body()
    return JSONResponse(body, error.status, headers=dict(error.headers))


class _Watch:
    """Gives each request an id, counts it, logs its end. Outermost, so that nothing goes unseen."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        logs.request_id.set(request_id)
        gateway = scope["app"].state.gateway
        metrics, work = gateway.metrics, int(scope["method"] == "POST")
        started, status, ended = time.perf_counter(), 499, False

        async def send_on(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            else:
                ended = not message.get("more_body", False)
            await send(message)

        metrics.live.inc(work)
        gateway.working += work
        try:
            await self._app(scope, receive, send_on)
        except Exception:
            status, ended = 500, True
            raise
        finally:
            status = status if ended else 499  # the client went away before the end of its answer
            metrics.live.dec(work)
            gateway.working -= work
            seconds = time.perf_counter() - started
            route = scope.get("route")
            endpoint = getattr(route, "path", "other")  # never the path itself: anybody may make those up
            metrics.requests.labels(endpoint, str(status)).inc()
            metrics.seconds.labels(endpoint).observe(seconds)
            level = logging.DEBUG if endpoint.startswith(("/v1/health", "/health", "/metrics")) else logging.INFO
            fields = {"request_id": request_id, "endpoint": endpoint, "status": status, "ms": round(1000 * seconds, 1)}
            _log.log(level, "%s %s -> %d in %.1f ms", scope["method"], endpoint, status, 1000 * seconds, extra=fields)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            return str(text)
    return uuid.uuid4().hex
