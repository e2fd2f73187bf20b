"""What the text of a turn turns into, piece by piece or whole. Knows no API and no syntax."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the thinking."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call of a function that the request offers; its arguments follow."""

    index: int  # 0 for the first call of the turn
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the arguments' JSON text; what has come so far always begins a JSON object."""

    index: int
    json_text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """No more arguments. Where not `complete`, their JSON text stops before its end, as the model's did."""

    index: int
    complete: bool


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass(frozen=True)
class Call:
    """A whole call; `arguments` is JSON text, of an object where `complete`."""

    id: str
    name: str
    arguments: str
    complete: bool


@dataclass(frozen=True)
class Turn:
    """A whole turn of the model."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]


def collect(events: Iterable[Event]) -> Turn:
    """The turn that these events tell of."""
    reasoning, content = [], []
    started: list[ToolCallStart] = []
    arguments: list[str] = []
    complete: list[bool] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallStart():
                started.append(event)
                arguments.append("")
            case ToolCallArguments(index, json_text):
                arguments[index] += json_text
            case ToolCallEnd(_, whole):
                complete.append(whole)
    calls = (
        Call(start.id, start.name, text, whole) for start, text, whole in zip(started, arguments, complete, strict=True)
    )
    return Turn("".join(reasoning), "".join(content), tuple(calls))
