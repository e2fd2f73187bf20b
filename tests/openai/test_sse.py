"""Server-sent events: form, signs of life, errors before and after the first event, the end of what is behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from dgemma_openai import sse
from dgemma_openai.errors import ApiError

pytestmark = pytest.mark.asyncio


class Source:
    """Events with pauses; knows whether it was ended."""

    def __init__(self, *items: bytes | float | Exception) -> None:
        self.ended = False
        self._items = items

    async def events(self) -> AsyncGenerator[bytes]:
        try:
            for item in self._items:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, bytes):
                    yield item
                else:
                    await asyncio.sleep(item)
        finally:
            self.ended = True


async def sent(source: Source, keep_alive_s: float = 5.0, leave: bool = False) -> list[bytes]:
    """What reaches the client; with `leave` it has gone before the response begins."""
    response = await sse.event_stream(source.events(), keep_alive_s)
    parts: list[bytes] = []

    async def send(message: Any) -> None:
        if message.get("body"):
            parts.append(message["body"])

    async def receive() -> dict[str, str]:
        if not leave:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    return parts


async def test_events_come_as_they_are() -> None:
    source = Source(b"a", 0.01, b"b")
    assert await sent(source) == [b"a", b"b"]
    assert source.ended


async def test_an_event_is_json_on_one_line() -> None:
    assert sse.data({"a": "x\ny\u00fc"}) == 'data: {"a":"x\\ny\u00fc"}\n\n'.encode()
    assert sse.named("n", {"a": 1}) == b'event: n\ndata: {"a":1}\n\n'


async def test_an_error_before_the_first_event_is_raised() -> None:
    source = Source(0.01, ApiError(400, "no"))
    with pytest.raises(ApiError):
        await sse.event_stream(source.events(), 5.0)
    assert source.ended


async def test_a_first_event_that_is_late_does_not_hold_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_FIRST_S", 0.01)
    parts = await sent(Source(0.2, b"a"), keep_alive_s=0.05)
    assert parts[0] == b": keep-alive\n\n"
    assert parts[-1] == b"a"


async def test_silence_between_events_has_signs_of_life() -> None:
    parts = await sent(Source(b"a", 0.2, b"b"), keep_alive_s=0.05)
    assert set(parts[1:-1]) == {b": keep-alive\n\n"}
    assert (parts[0], parts[-1]) == (b"a", b"b")


async def test_a_client_that_has_gone_ends_the_source() -> None:
    for items in ((b"a", 60.0), (b"a",)):
        source = Source(*items)
        await sent(source, leave=True)
        assert source.ended


async def test_cancelled_before_the_first_event() -> None:
    source = Source(60.0)
    task = asyncio.create_task(sse.event_stream(source.events(), 5.0))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.ended
