"""Gemma's markers in text that arrives in pieces: told apart from it, and kept out of it. Knows no meaning of them.

Listed are the special tokens that structure a turn. `<bos>`, `<eos>`, `<pad>`, `<unk>` and `<mask>` are not: no turn
holds them before its end, and answers about language models do hold these words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
RESPONSE, RESPONSE_END = "<|tool_response>", "<tool_response|>"
TURN, TURN_END = "<|turn>", "<turn|>"
QUOTE = '<|"|>'
MARKERS = frozenset(
    {CHANNEL, CHANNEL_END, CALL, CALL_END, RESPONSE, RESPONSE_END, TURN, TURN_END, QUOTE, "<|think|>"}
    | {"<|tool>", "<tool|>", "<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>"}
)
ANY_MARKER = re.compile("|".join(map(re.escape, sorted(MARKERS))))  # none begins another one
_BEGINNINGS = frozenset(marker[:length] for marker in MARKERS for length in range(1, len(marker)))


def _unfinished(text: str) -> int:
    """Where a marker may have begun at the end of the text; its length if none has."""
    start = text.rfind("<")  # the only one in a marker is its first character
    return start if start >= 0 and text[start:] in _BEGINNINGS else len(text)


class Splitter:
    """Pieces cut anywhere to runs of text and whole markers."""

    def __init__(self) -> None:
        self._held = ""  # what may become a marker

    def feed(self, text: str) -> Iterator[str]:
        """The markers so far, each by itself, and the text between them."""
        text = self._held + text
        start = 0
        for found in ANY_MARKER.finditer(text):
            if found.start() > start:
                yield text[start : found.start()]
            yield found[0]
            start = found.end()
        text = text[start:]
        end = _unfinished(text)
        self._held = text[end:]
        if end:
            yield text[:end]

    def finish(self) -> str:
        """What looked like the beginning of a marker to the end."""
        held, self._held = self._held, ""
        return held


class Visible:
    """Text on its way to the reader. Where parts of it form a marker together, there is a space instead.

    Where `trimmed`, white space around the whole is dropped, and so it is held back until it proves to be inside.
    """

    def __init__(self, trimmed: bool) -> None:
        self.trimmed = trimmed
        self._held = ""
        self._gap = ""  # between paragraphs
        self._at_start = True

    def feed(self, text: str) -> str:
        """What can be shown now."""
        text = ANY_MARKER.sub(" ", self._held + text)
        if self.trimmed and self._at_start:
            text = text.lstrip()
        end = len(text[: _unfinished(text)].rstrip())
        self._held = text[end:]
        return self._show(text[:end])

    def paragraph(self) -> str:
        """The rest of what was fed; what follows is apart from it."""
        rest = self.finish()
        if not self._at_start:
            self._gap, self._at_start = "\n\n", True
        return rest

    def finish(self) -> str:
        """The rest of what was fed."""
        rest, self._held = self._held, ""
        return self._show(rest.rstrip() if self.trimmed else rest)

    def _show(self, text: str) -> str:
        if not text:
            return ""
        text, self._gap, self._at_start = self._gap + text, "", False
        return text
