"""Bodies of requests as JSON that means one thing only. Knows no schema.

Python's reader takes more than JSON is (NaN, numbers beyond any type, a key twice, halves of characters, any depth),
and what it takes would fail later, somewhere else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from dgemma_openai.errors import ApiError, shown

MAX_DEPTH = 64  # of lists and objects in each other; schemas of tools have ten or so
_MAX_KEYS = 4096  # of one object; each unknown one is an error of its own, which takes its time
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate; two of them are a character
_MEDIA_TYPE = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json", re.IGNORECASE)


class JsonRoute(APIRoute):
    """Reads its body with `loads`. Every route that has a body is one."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def strict(request: Request) -> Response:
            read = _JsonRequest(request.scope, request.receive)
            await read.json()
            return await handle(read)

        return strict


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            media_type = self.headers.get("content-type", "").partition(";")[0].strip()
            if not _MEDIA_TYPE.fullmatch(media_type):  # also keeps forms of other sites' pages out
                _refuse(f"it must come with the header Content-Type: application/json, got {shown(media_type)}")
            self._json = loads(await self.body())
        return self._json


def loads(content: bytes) -> dict[str, Any]:
    """An object; raises ApiError (400, `json_invalid`)."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        _refuse(f"byte {error.start} is not UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        _too_deep()
    except json.JSONDecodeError as error:
        _refuse(f"{error.msg} at line {error.lineno}, column {error.colno}")
    except ValueError:  # Python's own bound
        _refuse("a whole number has thousands of digits")
    if not isinstance(value, dict):
        _refuse(f"it must be an object, got {shown(value)}")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _HALF.search(text):
        _check_characters(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        _refuse(f"an object has more than {_MAX_KEYS} keys")
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                _refuse(f"the key {shown(name)} is there twice")
            seen.add(name)
    return found


def _constant(name: str) -> NoReturn:
    _refuse(f"{name} is not a number of JSON")


def _float(text: str) -> float:
    if math.isinf(value := float(text)):
        _refuse(f"the number {shown(text)} is out of range")
    return value


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inside = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in inside if isinstance(item, dict | list)]
        if not level:
            return
    _too_deep()


def _check_characters(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        _refuse(f"a text has half of a character, {error.object[error.start]!a}; send both surrogates")


def _too_deep() -> NoReturn:
    _refuse(f"lists and objects are nested more than {MAX_DEPTH} deep")


def _refuse(what: str) -> NoReturn:
    raise ApiError(400, f"the body is not valid JSON: {what}", code="json_invalid") from None
