"""Every refusal as HTTP status and OpenAI-shaped body. Knows no route."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgemma_client.errors import (
    Cancelled,
    ClientError,
    ConnectError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
)
from dgemma_openai.parsing.errors import Unsupported

_RETRY_S = 1.0  # where the server gives no hint
_SHOWN = 80  # characters of a value in a message
_FIELD = re.compile(r"[a-z][a-z0-9_]*")  # members of unions have capitals or brackets, but for these:
_ROLES, _SCALARS = {"system", "developer", "user", "assistant", "tool"}, {"str", "int", "float", "bool"}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass
class ApiError(Exception):
    """What a client is told: `param` is the field at fault, `code` a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error")

    def body(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """As Anthropic's API has it."""
        kind = "api_error" if self.type == "server_error" else self.type
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """A field that cannot be honoured; the message goes behind its name."""
    return ApiError(400, f"{param}: {message}", param, code)


def overloaded(message: str, retry_after_s: float | None = None) -> ApiError:
    """503 with a hint when to come back."""
    seconds = max(1, math.ceil(_RETRY_S if retry_after_s is None else retry_after_s))
    return ApiError(503, message, code="overloaded", headers={"Retry-After": str(seconds)})


def from_client(error: ClientError, names: Mapping[str, str]) -> ApiError:
    """`names` are the request's own names of Triton's inputs, where they differ."""
    message = str(error)
    match error:
        case InvalidRequest():
            found = error.field
            param = names.get(found, found) if found is not None else None
            if found is not None and param != found:
                message = f"{param}{message.removeprefix(found)}"
            code = "context_length_exceeded" if "maximum context length" in message else None
            return ApiError(400, message, param, code)
        case Overloaded():
            return overloaded(message, error.retry_after_s)
        case ConnectError():
            return overloaded("the model server does not answer; it may be starting")
        case Cancelled():
            return overloaded("the server ended the request; it may be stopping")
        case DeadlineExceeded():
            return ApiError(504, message, code="timeout")
    return ApiError(500, message, code="engine_error")


def from_unsupported(error: Unsupported) -> ApiError:
    """Of a message or tool."""
    return ApiError(400, str(error), error.param)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """Of pydantic's errors about a body, the first: name, what is wrong, value."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    first = max(unknown or errors, key=lambda error: len(error["loc"]))  # of a union's errors, that of the best fit
    path = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="json_invalid")
    param = dotted(path)
    if first["type"] == "extra_forbidden":
        *outer, name = path
        param = f"{dotted(outer)}.{name}" if outer else str(name)
        param = param if len(param) <= _SHOWN else param[: _SHOWN - 3] + "..."
        return ApiError(400, f"{param}: is not a known parameter; leave it out", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param, "missing_required_parameter")
    if first["type"] == "not_supported":
        return ApiError(400, f"{param}: {first['msg']}, got {shown(first['input'])}", param, "unsupported_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param}: {message}, got {shown(first['input'])}", param or None)


def dotted(path: Sequence[int | str]) -> str:
    """messages[0].content of ("messages", 0, "user", "content", "str"): names of a union's members are left out."""
    text = ""
    for before, part in zip([None, *path], path, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif _FIELD.fullmatch(part) and not (isinstance(before, int) and part in _ROLES) and part not in _SCALARS:
            text += f".{part}" if text else part
    return text or "body"


def shown(value: object) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
