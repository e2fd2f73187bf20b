"""Every error the client raises on purpose. Knows no transport and no tensor.

    ClientError
    ├── ConnectError        no Triton server at the address, or the connection broke
    ├── DeadlineExceeded    the time given ran out; the request is cancelled on the server
    ├── InvalidRequest      the request cannot be honoured; `field` names the input where it is known
    ├── Overloaded          the server takes no more requests now; try again, after `retry_after_s` where it says so
    ├── ServerError         the server failed, or answered what a DiffusionGemma server does not answer
    └── Cancelled           the server ended the request, or this client was closed

A task that is itself cancelled sees `asyncio.CancelledError`, as everywhere in asyncio.
"""

from __future__ import annotations

import re

_FIELD = re.compile(r"([a-z][a-z0-9_]*(?:\[\d+\])?): ")
_HINT = re.compile(r"again in (?:about )?(\d+(?:\.\d+)?) s\b")


class ClientError(Exception):
    """Base of all; `text` is what had arrived before it, `request_id` finds the request in the server's log."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.text = ""
        self.request_id = ""


class ConnectError(ClientError):
    """No Triton server answers at the address, or the connection broke."""


class DeadlineExceeded(ClientError):
    """The time given ran out."""


class InvalidRequest(ClientError):
    """A request that cannot be honoured; the message starts with the input's name where it is known."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = _FIELD.match(message)
        self.field: str | None = found.group(1) if found else None


class Overloaded(ClientError):
    """The server takes no more requests now (full queue, or shutting down); `retry_after_s` is its hint, or None."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = _HINT.search(message)
        self.retry_after_s: float | None = float(found.group(1)) if found else None


class ServerError(ClientError):
    """The server failed while it worked on the request."""


class Cancelled(ClientError):
    """The request was ended by the server or by closing this client, not by the caller's task."""
