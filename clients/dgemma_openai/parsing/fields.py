"""Reading fields of a request's JSON, with errors that name their path. Knows no API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_openai.parsing.errors import Unsupported

Object = Mapping[str, Any]
PART_JOINT = "\n"  # between a message's parts of text


def an_object(path: str, value: object) -> Object:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise Unsupported(path, f"must be an object, got {_kind(value)}")
    return value


def a_list(path: str, value: object) -> list[Any]:
    """A JSON list; none for null."""
    if value is None:
        return []
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise Unsupported(path, f"must be a list, got {_kind(value)}")
    return list(value)


def a_string(path: str, value: object) -> str:
    """A JSON string; empty for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unsupported(path, f"must be a string, got {_kind(value)}")
    return value


def a_name(path: str, value: object) -> str:
    """A string that is not empty."""
    if value is None or value == "":
        raise Unsupported(path, "is missing")
    return a_string(path, value)


def one_of(path: str, value: object, *known: str) -> str:
    """One of a few strings."""
    if value not in known:
        raise Unsupported(path, f"{value!r} is not supported; use {' or '.join(known)}")
    return str(value)


def only(path: str, value: Object, known: frozenset[str]) -> None:
    """No other fields, unless they say nothing."""
    for name, given in value.items():
        if name not in known and given not in (None, False, "", [], {}):
            raise Unsupported(f"{path}.{name}", "is not supported; leave it out")


def text_of(path: str, value: object, *types: str) -> str:
    """A string, or a list of parts of text of the given types, a line each."""
    if value is None or isinstance(value, str):
        return value or ""
    return PART_JOINT.join(
        text_part(f"{path}[{index}]", part, *types) for index, part in enumerate(a_list(path, value))
    )


def text_part(path: str, value: object, *types: str) -> str:
    """The text of one part."""
    part = an_object(path, value)
    if part.get("type") not in types:
        raise unsupported_part(path, part.get("type"))
    return a_string(f"{path}.text", part.get("text"))


def unsupported_part(path: str, kind: object) -> Unsupported:
    """For images, audio, files and everything else that is not text."""
    return Unsupported(f"{path}.type", f"{kind!r} is not supported; this server takes text only")


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
