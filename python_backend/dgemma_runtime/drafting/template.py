"""Templates of an output: literal text, which is pinned, and holes of so many tokens. Knows no canvas, no request."""

from __future__ import annotations

import json

import numpy as np

from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Int32Array
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.drafting.proposal import Pins
from dgemma_runtime.errors import InvalidRequest

Template = tuple[str | int, ...]  # literals, and holes of so many tokens

FIELD = "template"
_SHAPE = 'must be a JSON list of literal texts and of holes, each the number of its tokens, like ["a: ", 4, "\\n"]'


def parse_template(text: str) -> Template:
    """Of at least one hole, and of literals that are not empty; raises InvalidRequest."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(FIELD, f"is not valid JSON ({error}); it {_SHAPE}") from None
    if not isinstance(items, list):
        raise InvalidRequest(FIELD, f"{_SHAPE}, got {_shown(items)}")
    for number, item in enumerate(items, 1):
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise InvalidRequest(FIELD, f"{_SHAPE}; item {number} is {_shown(item)}")
        if item == "":
            raise InvalidRequest(FIELD, f"item {number} is an empty text; leave it out")
        if isinstance(item, int) and item < 1:
            raise InvalidRequest(FIELD, f"item {number} is a hole of {item} tokens; a hole has at least one")
    if not any(isinstance(item, int) for item in items):
        raise InvalidRequest(FIELD, "has no hole, so there is nothing to generate; add one, the number of its tokens")
    return tuple(items)


class TemplateText(OutputText):
    """The output of a template, canvas by canvas: exactly its literals, and what its holes are filled with.

    It ends with the template's last token, for the reason "stop". No token in a hole ends it; special tokens and end
    tokens there have no text, and half a character at the end of a hole does not run into the literal behind it.
    """

    def __init__(self, codec: Codec, pins: Pins, end_ids: tuple[int, ...], skip_special_tokens: bool) -> None:
        length = len(pins.pinned)
        edges = np.flatnonzero(np.diff(pins.pinned.astype(np.int8))) + 1
        super().__init__(
            codec, length, skip_special_tokens=skip_special_tokens, full="stop", breaks=frozenset(edges.tolist())
        )
        self._skipped |= frozenset(end_ids)


def lay_out_template(template: Template, codec: Codec, most_tokens: int, skip_special_tokens: bool) -> Pins:
    """The whole output [n] of a template, n at most `most_tokens`, its literals pinned; raises InvalidRequest.

    Each literal is tokenised by itself, so that it is the same whatever stands beside it.
    """
    parts: list[Int32Array | int] = []
    tokens = 0
    for number, item in enumerate(template, 1):
        part = item if isinstance(item, int) else _literal(item, number, codec, skip_special_tokens)
        tokens += part if isinstance(part, int) else len(part)
        parts.append(part)
    if tokens > most_tokens:
        raise InvalidRequest(
            FIELD,
            f"has {tokens} tokens, literals and holes, the output may have {most_tokens} (max_tokens, or what the "
            "context leaves); shorten it, or the prompt",
        )
    ids = [np.zeros(part, np.int32) if isinstance(part, int) else part for part in parts]
    pinned = [np.full(len(row), not isinstance(part, int)) for row, part in zip(ids, parts, strict=True)]
    return Pins(np.concatenate(ids), np.concatenate(pinned), sum(map(len, pinned)))


def _literal(text: str, number: int, codec: Codec, skip_special_tokens: bool) -> Int32Array:
    ids = codec.encode_part(text, FIELD)
    skipped = codec.special_ids if skip_special_tokens else codec.silent_ids
    special = [token for token in ids.tolist() if token in skipped]
    if special:
        remedy = "; with skip_special_tokens false it would have" if special[0] not in codec.silent_ids else ""
        message = f"item {number} contains the special token {codec.piece(special[0])!r}, which has no text{remedy}"
        raise InvalidRequest(FIELD, message)
    if (back := codec.decode(ids, skip_special_tokens=False)) != text:
        message = f"item {number} is {_shown(text)}, which this model's tokens spell {_shown(back)}; write that instead"
        raise InvalidRequest(FIELD, message)
    return ids


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
