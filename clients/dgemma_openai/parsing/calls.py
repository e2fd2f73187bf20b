"""One call, from the text between its markers to events. Knows nothing of the turn around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from dgemma_openai.parsing.arguments import ArgumentReader
from dgemma_openai.parsing.events import ContentDelta, Event, ToolCallArguments, ToolCallEnd, ToolCallStart
from dgemma_openai.parsing.markers import QUOTE
from dgemma_openai.parsing.schema import Schema

STREAM_AFTER = 1024  # characters of arguments, from which on they are sent before the call is complete
_HEADER_LENGTH = 256  # at most, up to the opening brace
_HEADER = re.compile(r"\s*(?:call)?\s*:\s*([^\s{}:\"]+)\s*")  # "call" is left out now and then
_CLOSERS = " \t\r\n})]"  # one brace too many is no content

Ending = Literal["marker", "other", "cut"]  # by its own marker; by another one or the turn's end; by the token limit


class CallReader:
    """Give it the text behind the call's marker. A ContentDelta is text that is no part of a call."""

    def __init__(self, tools: Mapping[str, Schema], index: int, new_id: Callable[[], str]) -> None:
        self.complete = False
        self._tools = tools
        self._index = index
        self._new_id = new_id
        self._phase: Literal["header", "arguments", "after", "content"] = "header"
        self._raw = ""  # all of it, while it may yet become content
        self._name = ""
        self._started = False
        self._json = ""  # not sent yet
        self._arguments = ArgumentReader(Schema())

    @property
    def started(self) -> bool:
        """Whether there is a call to be told of."""
        return self._started

    def feed(self, text: str) -> Iterator[Event]:
        """What the text settles. It may be the quote marker, but never a part of one."""
        match self._phase:
            case "header":
                self._raw += text
                yield from self._header()
            case "arguments":
                self._raw = "" if self._started else self._raw + text
                yield from self._read(text)
            case "after":
                yield from self._after(text)
            case "content":
                yield _content(text)

    def close(self, ending: Ending) -> Iterator[Event]:
        """What remains to be told when the call is over."""
        if self._phase == "header":
            name = _HEADER.fullmatch(self._raw)
            if ending == "marker" and name and name[1] in self._tools:
                self._name, self._json, self.complete = name[1], "{}", True
                yield from self._send()
                yield ToolCallEnd(self._index, True)
            else:
                yield _content(self._raw)
        elif self._phase == "arguments":
            if ending == "cut" or self._long:
                yield from self._break_off(with_rest=ending != "cut")
            else:
                yield _content(self._raw)

    def _header(self) -> Iterator[Event]:
        brace = self._raw.find("{", 0, _HEADER_LENGTH)
        if brace < 0 and len(self._raw) < _HEADER_LENGTH:
            return
        name = _HEADER.fullmatch(self._raw, 0, max(brace, 0))
        if not name or name[1] not in self._tools:
            self._phase = "content"
            yield _content(self._raw)
            return
        self._name = name[1]
        self._phase = "arguments"
        self._arguments = ArgumentReader(self._tools[self._name])
        yield from self._read(self._raw[brace:])

    def _read(self, text: str) -> Iterator[Event]:
        self._json += self._arguments.feed(text)
        match self._arguments.state:
            case "complete":
                self.complete = True
                self._phase = "after"
                yield from self._send()
                yield ToolCallEnd(self._index, True)
                yield from self._after(self._arguments.rest)
            case "malformed" if self._long:
                self._phase = "content"
                yield from self._break_off(with_rest=True)
            case "malformed":
                self._phase = "content"
                yield _content(self._raw)
            case "open" if self._long:
                yield from self._send()

    def _after(self, text: str) -> Iterator[Event]:
        text = text.lstrip(_CLOSERS)
        if text:
            self._phase = "content"
            yield _content(text)

    @property
    def _long(self) -> bool:
        """Depends on nothing but the text read, so that a broken call is told of alike however it was cut."""
        return self._arguments.position > STREAM_AFTER

    def _send(self) -> Iterator[Event]:
        if not self._started:
            self._started = True
            yield ToolCallStart(self._index, self._new_id(), self._name)
        if self._json:
            yield ToolCallArguments(self._index, self._json)
            self._json = ""

    def _break_off(self, with_rest: bool) -> Iterator[Event]:
        yield from self._send()
        yield ToolCallEnd(self._index, False)
        if with_rest:
            yield _content(self._arguments.rest)


def _content(text: str) -> ContentDelta:
    return ContentDelta(text.replace(QUOTE, '"'))
