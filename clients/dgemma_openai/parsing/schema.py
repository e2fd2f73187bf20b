"""What a tool's JSON schema says of the types in its arguments. Validates nothing and knows no syntax of calls."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_DEPTH = 8  # of references and alternatives; deeper ones say nothing
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_NEARLY_A_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_NAMES: tuple[tuple[type, str], ...] = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"))


@dataclass(frozen=True)
class Schema:
    """A place in a JSON schema; where it says nothing of a value, everything is allowed."""

    node: object = None
    root: object = None

    @staticmethod
    def of(parameters: object) -> Schema:
        """From a tool's `parameters`."""
        return Schema(parameters, parameters)

    def types(self) -> frozenset[str]:
        """Names of the types allowed here; empty where nothing is said."""
        return frozenset(name for node in self._nodes() for name in _types(node))

    def member(self, key: str) -> Schema:
        """Of the value under a key."""
        for node in self._nodes():
            properties = node.get("properties")
            if isinstance(properties, Mapping) and key in properties:
                return Schema(properties[key], self.root)
        return self._first("additionalProperties")

    def items(self) -> Schema:
        """Of a list's entries."""
        return self._first("items")

    def _first(self, name: str) -> Schema:
        for node in self._nodes():
            if isinstance(node.get(name), Mapping):
                return Schema(node[name], self.root)
        return Schema()

    def _nodes(self) -> Iterator[Mapping[str, Any]]:
        return _expand(self.node, self.root, _DEPTH)


def _expand(node: object, root: object, depth: int) -> Iterator[Mapping[str, Any]]:
    """The node, what it refers to and its alternatives."""
    if not isinstance(node, Mapping) or not depth:
        return
    yield node
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: object = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        yield from _expand(target, root, depth - 1)
    for name in ("anyOf", "oneOf", "allOf"):
        alternatives = node.get(name)
        for alternative in alternatives if isinstance(alternatives, list) else ():
            yield from _expand(alternative, root, depth - 1)


def _types(node: Mapping[str, Any]) -> Iterator[str]:
    given = node.get("type")
    yield from (name.lower() for name in (given if isinstance(given, list) else [given]) if isinstance(name, str))
    if node.get("nullable") is True:
        yield "null"
    values = node.get("enum") if isinstance(node.get("enum"), list) else []
    for value in [*(values or []), *([node["const"]] if "const" in node else [])]:
        yield "null" if value is None else next((name for kind, name in _NAMES if isinstance(value, kind)), "object")


def bare_value(word: str, types: frozenset[str]) -> str:
    """JSON text of a word without quotes: a literal or number if it is one and the types do not ask for a string."""
    lower = word.lower()
    if lower in ("true", "false") and _may_be(types, "boolean"):
        return lower
    if lower in ("null", "none", "nil") and _may_be(types, "null"):
        return "null"
    if _may_be(types, "number", "integer"):
        if _NUMBER.fullmatch(word):
            return word
        if _NEARLY_A_NUMBER.fullmatch(word) and math.isfinite(value := float(word)):
            return repr(int(word)) if word.lstrip("+-").isdigit() else repr(value)
    return json.dumps(word, ensure_ascii=False)


def _may_be(types: frozenset[str], *names: str) -> bool:
    return "string" not in types or not types.isdisjoint(names)
