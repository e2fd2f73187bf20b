"""The process: ports, TLS, and a stop that lets running answers end. Knows no route."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import uvicorn
from fastapi import FastAPI

from dgemma_openai.app import create_app
from dgemma_openai.protocol import LimitedProtocol
from dgemma_openai.routes import service
from dgemma_openai.settings import Settings, SettingsError

_log = logging.getLogger(__name__)
_CONNECTIONS = 4096  # more are answered 503 by uvicorn
_POLL_S = 0.05
_LAST_BYTES_S = 2


def serve(settings: Settings) -> int:
    """Stay until SIGTERM or SIGINT; a second one does not wait for running answers. The exit status."""
    _check_tls(settings)
    with ExitStack() as sockets:
        main = sockets.enter_context(_listen("port", settings.host, settings.port))
        health = None
        if settings.health_port is not None:
            health = sockets.enter_context(_listen("health_port", settings.host, settings.health_port))
        return asyncio.run(_run(settings, main, health))


def _check_tls(settings: Settings) -> None:
    """Raises SettingsError for files that OpenSSL does not take; uvicorn would fail in the middle of its start."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")  # else OpenSSL asks for one
    except (ssl.SSLError, OSError) as error:
        pair = f"{settings.tls_certificate} and {settings.tls_key}"
        message = f"tls_certificate and tls_key: {pair} are not a PEM pair without a password ({error})"
        raise SettingsError(message) from None
    if settings.tls_client_ca is not None:
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except (ssl.SSLError, OSError) as error:
            message = f"tls_client_ca: {settings.tls_client_ca} has no PEM certificate ({error})"
            raise SettingsError(message) from None


def _listen(name: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"{name}: cannot listen on {host}:{port} ({error}); choose another one") from None
    return listener


async def _run(settings: Settings, main: socket.socket, health: socket.socket | None) -> int:
    app = create_app(settings)
    servers = [_Server(_config(app, settings, tls=True))]
    listeners = [main]
    if health is not None:
        servers.append(_Server(_config(_health_app(app), settings, tls=False)))
        listeners.append(health)
    tasks = [
        asyncio.create_task(server.serve(sockets=[listener]))
        for server, listener in zip(servers, listeners, strict=True)
    ]
    stop = _Stop(app, servers, settings.drain_s)
    stop.install()
    while not all(server.started for server in servers) and not any(task.done() for task in tasks):
        await asyncio.sleep(_POLL_S)
    if all(server.started for server in servers):
        scheme = "https" if settings.tls_certificate else "http"
        host, port = main.getsockname()[:2]
        print(f"dgemma-openai: serving on {scheme}://{host}:{port}", file=sys.stderr, flush=True)
    await asyncio.gather(*tasks)
    return 0 if stop.asked else 1


def _config(app: FastAPI, settings: Settings, tls: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=LimitedProtocol,
        log_config=None,
        access_log=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_BYTES_S,
        server_header=False,
        ssl_certfile=settings.tls_certificate if tls else None,
        ssl_keyfile=settings.tls_key if tls else None,
        ssl_ca_certs=str(settings.tls_client_ca) if tls and settings.tls_client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and settings.tls_client_ca else ssl.CERT_NONE,
        ws="none",
    )


def _health_app(app: FastAPI) -> FastAPI:
    """The health routes alone, about the same gateway."""
    health = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    health.state = app.state
    health.include_router(service.health_router)
    return health


class _Server(uvicorn.Server):
    """Leaves the signals to `_Stop`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield


class _Stop:
    """A first signal ends taking work and waits for what runs, a second one does not."""

    def __init__(self, app: FastAPI, servers: list[_Server], drain_s: float) -> None:
        self._app, self._servers, self._drain_s = app, servers, drain_s
        self._task: asyncio.Task[None] | None = None

    @property
    def asked(self) -> bool:
        return self._task is not None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        else:
            self._end(now=True)

    async def _drain(self) -> None:
        gateway = self._app.state.gateway
        gateway.draining = True
        _log.info("stopping: no new work, %g s for running answers", self._drain_s)
        end = asyncio.get_running_loop().time() + self._drain_s
        while gateway.working and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)
        if gateway.working:
            _log.warning("%d answers did not end in time", gateway.working)
        self._end(now=False)

    def _end(self, now: bool) -> None:
        for server in self._servers:
            server.should_exit = True
            server.force_exit = now
