"""A call's arguments, from Gemma's syntax or JSON to JSON text, as they arrive. Knows no markers but the quote.

Gemma writes `{city:<|"|>Paris<|"|>,days:3,ok:true,tags:[<|"|>a<|"|>],at:{lat:1.5}}`: keys bare, strings between quote
markers and free to hold anything else, the rest as in JSON or as Python prints it. JSON's own quotes are read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Literal

from dgemma_openai.parsing.markers import QUOTE
from dgemma_openai.parsing.schema import Schema, bare_value

State = Literal["open", "complete", "malformed"]
Steps = Generator[None]  # yields where it needs more text

_DEPTH = 64
_SPACE = re.compile(r"\s*")
_KEY_END = re.compile(r'[:,{}\[\]"]')
_JSON_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_WORD_END = re.compile(r'[,}\]{\["]')
_JSON_RUN = re.compile(r'[^"\\<]+|<')
_HEX = re.compile(r"[0-9a-fA-F]{4}")


class _Malformed(Exception):
    """No object of arguments goes on like this."""


class ArgumentReader:
    """Give it text from the opening brace on. Text must not be cut inside a quote marker."""

    def __init__(self, schema: Schema) -> None:
        self.state: State = "open"
        self.position = 0  # characters read and understood
        self._text = ""
        self._told = 0  # of these, how many the JSON text covers
        self._json: list[str] = []
        self._steps = self._object(schema, _DEPTH)

    def feed(self, text: str) -> str:
        """The JSON text that is certain by now and has not been given yet."""
        self._text += text
        if self.state == "open":
            try:
                next(self._steps)
            except StopIteration:
                self.state = "complete"
            except _Malformed:
                self.state = "malformed"
        found = "".join(self._json)
        self._json.clear()
        return found

    @property
    def rest(self) -> str:
        """What the JSON text does not cover."""
        return self._text[self._told :]

    # ------------------------------------------------------------ values

    def _object(self, schema: Schema, depth: int) -> Steps:
        self._tell("{", 1)
        first = True
        while True:
            char = yield from self._next()
            if char == "," and not first:
                self.position += 1
                char = yield from self._next()
            elif char != "}" and not first:
                raise _Malformed
            if char == "}":
                self._tell("}", 1)
                return
            key = yield from self._key(char)
            if (yield from self._next()) != ":":
                raise _Malformed
            name = json.dumps(key, ensure_ascii=False).replace("<", "\\u003c")  # escapes may have spelt a marker
            self._tell(("" if first else ", ") + name + ": ", 1)
            yield from self._value(schema.member(key), depth)
            first = False

    def _list(self, schema: Schema, depth: int) -> Steps:
        self._tell("[", 1)
        first = True
        while True:
            char = yield from self._next()
            if char == "," and not first:
                self.position += 1
                char = yield from self._next()
            elif char != "]" and not first:
                raise _Malformed
            if char == "]":
                self._tell("]", 1)
                return
            if not first:
                self._tell(", ", 0)
            yield from self._value(schema, depth)
            first = False

    def _value(self, schema: Schema, depth: int) -> Steps:
        char = yield from self._next()
        if char in "{[" and not depth:
            raise _Malformed
        if char == "{":
            yield from self._object(schema, depth - 1)
        elif char == "[":
            yield from self._list(schema.items(), depth - 1)
        elif char == '"':
            yield from self._json_string()
        elif self._text.startswith(QUOTE, self.position):
            yield from self._quoted_string()
        else:
            end = yield from self._find(_WORD_END)
            word = self._text[self.position : end].strip()
            if not word or self._text[end] in '{["':
                raise _Malformed
            self._tell(bare_value(word, schema.types()), end - self.position)

    def _quoted_string(self) -> Steps:
        self._tell('"', len(QUOTE))
        while (end := self._text.find(QUOTE, self.position)) < 0:
            self._tell_text(len(self._text))
            yield
        self._tell_text(end)
        self._tell('"', len(QUOTE))

    def _json_string(self) -> Steps:
        self._tell('"', 1)
        while True:
            yield from self._need(1)
            char = self._text[self.position]
            if char == '"':
                self._tell('"', 1)
                return
            if self._text.startswith(QUOTE, self.position):
                self._tell('\\"', len(QUOTE))
            elif char == "\\":
                yield from self._escape()
            elif run := _JSON_RUN.match(self._text, self.position):
                self._tell_text(run.end())

    def _escape(self) -> Steps:
        """A backslash and what belongs to it; one that escapes nothing stands for itself."""
        yield from self._need(2)
        kind = self._text[self.position + 1]
        length = 6 if kind == "u" else 2
        if kind == "u":
            yield from self._need(length)
        if kind in '"\\/bfnrt' or (kind == "u" and _HEX.match(self._text, self.position + 2)):
            self._tell(self._text[self.position : self.position + length], length)
        else:
            self._tell("\\\\", 1)

    def _key(self, char: str) -> Generator[None, None, str]:
        if self._text.startswith(QUOTE, self.position):
            self.position += len(QUOTE)
            while (end := self._text.find(QUOTE, self.position)) < 0:
                yield
            key = self._text[self.position : end]
            self.position = end + len(QUOTE)
            return key
        if char == '"':
            while not (found := _JSON_KEY.match(self._text, self.position)):
                yield
            self.position = found.end()
            try:
                return str(json.loads(found[0], strict=False))
            except ValueError:
                raise _Malformed from None
        end = yield from self._find(_KEY_END)
        key = self._text[self.position : end].strip()
        if not key or self._text[end] != ":":
            raise _Malformed
        self.position = end
        return key

    # ------------------------------------------------------------ text

    def _next(self) -> Generator[None, None, str]:
        """The next character that is not white space, which stays to be read."""
        while True:
            space = _SPACE.match(self._text, self.position)
            assert space is not None
            self.position = space.end()
            if self.position < len(self._text):
                return self._text[self.position]
            yield

    def _need(self, count: int) -> Steps:
        while len(self._text) < self.position + count:
            yield

    def _find(self, pattern: re.Pattern[str]) -> Generator[None, None, int]:
        while not (found := pattern.search(self._text, self.position)):
            yield
        return found.start()

    def _tell(self, json_text: str, read: int) -> None:
        self._json.append(json_text)
        self.position += read
        self._told = self.position

    def _tell_text(self, end: int) -> None:
        """Up to `end` as the inside of a JSON string."""
        text = self._text[self.position : end]
        self._tell(json.dumps(text, ensure_ascii=False)[1:-1], end - self.position)
