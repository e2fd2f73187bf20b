"""Server-sent events: the first one awaited for its error, signs of life while nothing happens. Knows no API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse

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
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        raise
    content = _with_keep_alive(events, first, keep_alive_s)
    return StreamingResponse(content, media_type="text/event-stream", headers={**_HEADERS, **(headers or {})})


async def _with_keep_alive(
    events: AsyncGenerator[bytes], pending: asyncio.Future[bytes], keep_alive_s: float
) -> AsyncIterator[bytes]:
    async with aclosing(events):
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=keep_alive_s)
                if not done:
                    yield _KEEP_ALIVE
                    continue
                if not (event := pending.result()):
                    return
                yield event
                pending = asyncio.ensure_future(anext(events, b""))
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
