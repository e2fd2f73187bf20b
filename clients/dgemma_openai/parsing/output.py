"""The text of a model's turn, cut anywhere, to events. Knows Gemma 4's format; no API, no transport, no tokens.

    <|channel>thought\\n ... <channel|>                                    thinking
    <|tool_call>call:name{key:<|"|>text<|"|>,n:1}<tool_call|>              a call; plain JSON arguments are read as well
    <turn|> or <|tool_response>                                           the end of the turn

What comes out depends on the text alone, not on where it was cut, and holds no marker. What the format leaves open:

- Text without channels and calls is the answer as it is. Once there has been one, white space around the answer is
  dropped, as Gemma's chat template drops it, unless not `trimmed`. White space around each thought always is; thoughts
  are a paragraph each.
- Thinking that is not closed is thinking, but a call ends it. A channel without content tells of nothing. Whatever a
  channel's name, it is thinking; only the channel `final` is part of the answer.
- A call that is malformed (no name, a function that the request does not offer, arguments that are no object) is
  content, as it was written but for its markers; quote markers become quotes.
- A call that the token limit cut once its arguments had begun is told of, with the arguments as far as they go and
  `complete=False`, as other servers tell of it while they stream. Cut before that, or left open by the end of the turn,
  it is content.
- Arguments longer than `STREAM_AFTER` characters are sent as they come. If such a call turns out to be malformed, it
  ends with `complete=False`, and what its JSON text does not cover is content.
- Braces too many behind a call are dropped. A call without braces that its own marker ends has no arguments.
- A request without tools, or with `tool_choice` "none", expects no calls: their text is content without markers.
- After the end of the turn nothing is read. Do not parse the text of a request that ignores the end.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping

from dgemma_openai.parsing.calls import CallReader, Ending
from dgemma_openai.parsing.events import ContentDelta, Event, ReasoningDelta, ToolCallArguments, Turn, collect
from dgemma_openai.parsing.markers import (
    CALL,
    CALL_END,
    CHANNEL,
    CHANNEL_END,
    MARKERS,
    QUOTE,
    RESPONSE,
    RESPONSE_END,
    TURN,
    TURN_END,
    Splitter,
    Visible,
)
from dgemma_openai.parsing.schema import Schema

_THOUGHT, _FINAL = "thought", "final"
_LABEL = re.compile(r"[A-Za-z_]{0,32}")
_ENDS = frozenset({TURN, TURN_END, RESPONSE})


def call_id() -> str:
    """As OpenAI's look."""
    return "call_" + secrets.token_hex(12)


class OutputParser:
    """One turn. `feed` it text as it arrives, then `finish`; see the module for what becomes of what."""

    def __init__(
        self,
        *,
        tools: Mapping[str, object] | None = None,  # name -> JSON schema of its arguments, {} or None where not known
        primed: str = "",  # with what the prompt has opened the turn: an open thought, or the beginning of a call
        parallel: bool = True,  # False: nothing is read behind the first call
        trimmed: bool = True,
        new_id: Callable[[], str] = call_id,
    ) -> None:
        self.done = False  # nothing that comes now is read: the generation may be cancelled
        self.calls = 0  # complete ones
        self._tools = None if tools is None else {name: Schema.of(schema) for name, schema in tools.items()}
        self._parallel, self._trimmed = parallel, trimmed
        self._new_id = new_id
        self._splitter = Splitter()
        self._content = Visible(trimmed=False)
        self._reasoning = Visible(trimmed=True)
        self._thinking = False
        self._label: str | None = None  # of the channel, while it may go on
        self._call: CallReader | None = None
        self._indices = 0
        self.feed(primed)

    def feed(self, text: str) -> list[Event]:
        """What the text settles."""
        return _merged(self._fed(text))

    def finish(self, *, cut: bool) -> list[Event]:
        """What remains when no text comes any more. `cut`: it was the token limit or a deadline that ended it."""
        return _merged(self._finished(cut))

    def _fed(self, text: str) -> Iterator[Event]:
        for piece in self._splitter.feed(text):
            if self.done:
                return
            if piece not in MARKERS:
                yield from self._text(piece)
            elif piece == QUOTE:
                yield from self._text(piece if self._call else '"')
            else:
                yield from self._marker(piece)

    def _finished(self, cut: bool) -> Iterator[Event]:
        if not self.done:
            yield from self._text(self._splitter.finish())
            yield from self._end_call("cut" if cut else "other")
            if self._label and cut and any(name.startswith(self._label) for name in (_THOUGHT, _FINAL)):
                self._label = None
            yield from self._end_channel()
        self.done = True
        if text := self._content.finish():
            yield ContentDelta(text)

    # ------------------------------------------------------------ markers

    def _marker(self, marker: str) -> Iterator[Event]:
        if self._call:
            yield from self._end_call("marker" if marker == CALL_END else "other")
        if marker in (CHANNEL, CHANNEL_END, CALL) or marker in _ENDS:
            yield from self._end_channel()
        if marker == CHANNEL:
            self._label = ""
            self._thinking = True
        if marker in (CHANNEL, CHANNEL_END) or (marker == CALL and self._tools is not None):
            self._content.trimmed = self._trimmed
        if marker == CALL and self._tools is not None:
            self._call = CallReader(self._tools, self._indices, self._new_id)
        self.done = self.done or marker in _ENDS

    def _end_call(self, ending: Ending) -> Iterator[Event]:
        if self._call:
            yield from self._called(self._call, self._call.close(ending))
            self._call = None

    def _end_channel(self) -> Iterator[Event]:
        if self._label is not None:
            label, self._label = self._label, None
            if label not in (_THOUGHT, _FINAL):
                yield from self._thought(label)
        if self._thinking:
            self._thinking = False
            if text := self._reasoning.paragraph():
                yield ReasoningDelta(text)

    # ------------------------------------------------------------ text

    def _text(self, text: str) -> Iterator[Event]:
        if self._call:
            yield from self._called(self._call, self._call.feed(text))
        elif self._label is not None:
            yield from self._labelled(self._label + text)
        elif self._thinking:
            yield from self._thought(text)
        else:
            yield from self._answer(text)

    def _called(self, call: CallReader, events: Iterator[Event]) -> Iterator[Event]:
        """A call's events as they are, but for its content; counts what they tell of."""
        started, complete = call.started, call.complete
        for event in events:
            if isinstance(event, ContentDelta):
                yield from () if self.done else self._answer(event.text)
            else:
                yield event
            self._indices += call.started and not started
            self.calls += call.complete and not complete
            started, complete = call.started, call.complete
            self.done = self.done or (not self._parallel and complete)

    def _labelled(self, text: str) -> Iterator[Event]:
        """A channel's text from its beginning: its name, as soon as that has an end, and what follows."""
        found = _LABEL.match(text)
        assert found is not None
        label, rest = found[0], text[found.end() :]
        if not rest:
            self._label = label
            return
        self._label = None
        if rest.startswith("\n") or (label in (_THOUGHT, _FINAL) and rest[:1].isspace()):
            self._thinking = label != _FINAL
            yield from self._text(rest[1:])
        else:
            yield from self._text(text)

    def _thought(self, text: str) -> Iterator[Event]:
        if text := self._reasoning.feed(text):
            yield ReasoningDelta(text)

    def _answer(self, text: str) -> Iterator[Event]:
        if text := self._content.feed(text):
            yield ContentDelta(text)


def parse(text: str, *, tools: Mapping[str, object] | None = None, primed: str = "", cut: bool = False) -> Turn:
    """A whole turn at once."""
    parser = OutputParser(tools=tools, primed=primed)
    return collect([*parser.feed(text), *parser.finish(cut=cut)])


def opened_by(prompt: str) -> str:
    """How a rendered prompt opens the turn, to prime a parser with: an open channel, or nothing."""
    turn = prompt[max(prompt.rfind(TURN), prompt.rfind(RESPONSE_END), 0) :]
    start = turn.rfind(CHANNEL)
    return turn[start:] if start > turn.rfind(CHANNEL_END) else ""


def _merged(events: Iterator[Event]) -> list[Event]:
    """Neighbouring pieces of the same as one; between two calls' arguments there is a start."""
    merged: list[Event] = []
    for event in events:
        match merged[-1:], event:
            case [ReasoningDelta(before)], ReasoningDelta(text):
                merged[-1] = ReasoningDelta(before + text)
            case [ContentDelta(before)], ContentDelta(text):
                merged[-1] = ContentDelta(before + text)
            case [ToolCallArguments(index, before)], ToolCallArguments(_, text):
                merged[-1] = ToolCallArguments(index, before + text)
            case _:
                merged.append(event)
    return merged
