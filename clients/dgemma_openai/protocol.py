"""HTTP connections with the time and size limits that uvicorn's own lack. Knows no route."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_log = logging.getLogger(__name__)
_HEADERS_S = 10.0  # from a request's first byte, or from the connection, to the end of its headers
_HEADERS_BYTES = 64 * 1024  # of a request line and its headers
_UNREAD_S = 60.0  # that a client may leave an answer unread when it fills all buffers


class LimitedProtocol(HttpToolsProtocol):
    """Ends connections that send headers too slowly or without end, and those that do not read.

    Of a body's time and size `Guard` takes care.
    """

    _timer: asyncio.TimerHandle | None = None  # runs while headers are awaited
    _unread: asyncio.TimerHandle | None = None  # runs while nothing can be written
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()  # a further request on the connection
        if self._timer is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._header_bytes > _HEADERS_BYTES:
            self._end("431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_UNREAD_S, self._abort)

    def resume_writing(self) -> None:
        self._stop_unread()
        super().resume_writing()

    def _await_headers(self) -> None:
        self._header_bytes = 0
        self._timer = self.loop.call_later(_HEADERS_S, self._end, "408 Request Timeout")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _end(self, status: str) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
            self.transport.close()

    def _abort(self) -> None:
        self._unread = None
        _log.warning("a client did not read its answer for %g s; its connection is closed", _UNREAD_S)
        self.transport.abort()
