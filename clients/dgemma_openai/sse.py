"""Server-sent events: the first one awaited for its error, signs of life while nothing happens. Knows no API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

_FIRST_S = 5.0  # a refusal comes within it and becomes a status; else the stream begins with a sign of life
_KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def data(content: Mapping[str, Any]) -> bytes:
    """An event of one JSON object."""
    return b"data: " + _json(content) + b"\n\n"


def named(name: str, content: Mapping[str, Any]) -> bytes:
    """An event with a name, as Anthropic's API and the responses API send them."""
    return b"event: " + name.encode() + b"\n" + data(content)


class EventStream(StreamingResponse):
    """Ends its events however it ends, also where the client has gone before the first one was asked for."""

    def __init__(
        self, events: AsyncGenerator[bytes], first: asyncio.Future[bytes], keep_alive_s: float, more: Mapping[str, str]
    ) -> None:
        self._events, self._pending, self._keep_alive_s = events, first, keep_alive_s
        super().__init__(self._content(), media_type="text/event-stream", headers={**_HEADERS, **more})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _end(self._pending, self._events)

    async def _content(self) -> AsyncIterator[bytes]:
        while True:
            done, _ = await asyncio.wait({self._pending}, timeout=self._keep_alive_s)
            if not done:
                yield _KEEP_ALIVE
                continue
            if not (event := self._pending.result()):
                return
            yield event
            self._pending = asyncio.ensure_future(anext(self._events, b""))


async def event_stream(
    events: AsyncGenerator[bytes], keep_alive_s: float, headers: Mapping[str, str] | None = None
) -> StreamingResponse:
    """Raises what `events` raises before its first event; later errors are for `events` to turn into events."""
    first = asyncio.ensure_future(anext(events, b""))
    try:
        await asyncio.wait({first}, timeout=_FIRST_S)
        if first.done():
            first.result()
    except BaseException:
        await _end(first, events)
        raise
    return EventStream(events, first, keep_alive_s, headers or {})


async def _end(pending: asyncio.Future[bytes], events: AsyncGenerator[bytes]) -> None:
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    await events.aclose()


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
