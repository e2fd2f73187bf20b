"""What is checked before a body is parsed: keys, rates, sizes, times. ASGI middleware; knows no route's meaning."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import time
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma_openai.errors import ApiError
from dgemma_openai.settings import ApiKey, Settings

# Probes and scrapers have no key; neither shows a prompt or an answer. The page asks for a key itself.
OPEN_PATHS = frozenset({"/health", "/v1/health/live", "/v1/health/ready", "/metrics", "/v1/metrics", "/"})
OPEN_PREFIX = "/playground/"
ANTHROPIC_PREFIX = "/v1/messages"


def is_open(path: str) -> bool:
    """Whether anybody may ask for it."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def find_key(presented: str, keys: tuple[ApiKey, ...]) -> ApiKey | None:
    """Takes the same time whichever key it is; compares all."""
    digest = hashlib.sha256(presented.encode()).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.sha256):
            found = key
    return found


class Guard:
    """Refuses with 401, 408, 413 and 429 before the application sees the request; hands it the whole body at once."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        per_minute = settings.requests_per_minute
        self._limit = None if per_minute is None else RateLimitItemPerMinute(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            if not is_open(scope["path"]):
                await self._admit(scope)
            body = _Body(receive, self._settings)
            await body.read(Headers(scope=scope))
        except ApiError as error:
            await send_error(error, scope, send)
            return
        await self._app(scope, body.receive, send)

    async def _admit(self, scope: Scope) -> None:
        if scope["method"] == "OPTIONS":
            return  # asked by browsers without credentials, and answered by the CORS rules alone
        who = ("address", scope["client"][0] if scope["client"] else "unknown")
        refusal = None
        if keys := self._settings.api_keys:
            presented = _presented(Headers(scope=scope))
            key = None if presented is None else find_key(presented, keys)
            if key is not None:
                who = ("key", key.name)
            elif presented is None:
                message = "no API key; send it as `Authorization: Bearer KEY` (or `x-api-key: KEY`)"
                refusal = _unknown("missing_api_key", message)
            else:
                refusal = _unknown("invalid_api_key", "the API key is not known here")
        await self._count(*who)  # guesses count for their address
        if refusal is not None:
            raise refusal

    async def _count(self, kind: str, name: str) -> None:
        if self._limit is not None and not await self._limiter.hit(self._limit, kind, name):
            window = await self._limiter.get_window_stats(self._limit, kind, name)
            seconds = max(1, math.ceil(window.reset_time - time.time()))
            message = f"more than {self._limit.amount} requests in a minute; come back in {seconds} s"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def _unknown(code: str, message: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


@dataclass
class _Body:
    """Reads a request's body, within size and time, and gives it to the application as one message."""

    _receive: Receive
    _settings: Settings
    _content: bytes = b""
    _given: bool = False

    async def read(self, headers: Headers) -> None:
        limit = self._settings.max_body_bytes
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        break
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = self._settings.body_timeout_s
            raise ApiError(408, f"the body was not here within {seconds:g} s", code="body_timeout") from None
        self._content = b"".join(parts)

    async def receive(self) -> Message:
        if self._given:
            return await self._receive()
        self._given = True
        return {"type": "http.request", "body": self._content, "more_body": False}

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes
        return ApiError(413, f"the body has more than {limit} bytes; send less", code="body_too_large")


def _presented(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None


async def send_error(error: ApiError, scope: Scope, send: Send) -> None:
    """In the shape of the API that the path belongs to. The connection ends: the body may not have been read."""
    anthropic = scope["path"].startswith(ANTHROPIC_PREFIX)
    body = json.dumps(error.anthropic_body() if anthropic else error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= {name.lower(): value for name, value in error.headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
