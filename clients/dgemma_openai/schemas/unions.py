"""Objects that are one of several kinds by their `type`: other kinds are refused by name. Knows no API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BeforeValidator, Discriminator, Tag
from pydantic_core import PydanticCustomError


def only(*kinds: str, remark: str = "") -> BeforeValidator:
    """For a model that has one kind alone."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in (*kinds, None):
            raise PydanticCustomError("not_supported", _message("type", kinds) + remark)
        return value

    return BeforeValidator(check)


def tag(kind: str) -> Tag:
    """Marks a member of a union; in brackets, since a path in an error leaves such names out."""
    return Tag(f"<{kind}>")


def by(kind_of: Callable[[dict[str, Any]], Any], *kinds: str, name: str = "type") -> Discriminator:
    """`kinds` are those of the error; `name` is what they are kinds of."""

    def find(value: Any) -> str:
        given = value if isinstance(value, dict) else {name: getattr(value, name, None)}
        return f"<{kind_of(given)}>"

    return Discriminator(find, custom_error_type="not_supported", custom_error_message=_message(name, kinds))


def by_type(*kinds: str) -> Discriminator:
    return by(lambda value: value.get("type"), *kinds)


def by_role(*kinds: str) -> Discriminator:
    return by(lambda value: value.get("role"), *kinds, name="role")


def _message(name: str, kinds: Sequence[str]) -> str:
    *first, last = (repr(kind) for kind in kinds)
    known = f"{', '.join(first)} or {last}" if first else last
    return f"is of a {name} that is not supported; use {known}"
