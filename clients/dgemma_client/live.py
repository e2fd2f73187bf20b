"""The canvas being denoised, on a terminal. Knows events and rich, no connection.

A preview is text only, so positions are told apart by aligning it with the preview before: what matches has settled
for one more step, the rest is new.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from dgemma_client.events import Delta, Done, Event, Prefill, Preview

_FRAME_S = 1 / 40  # steps that come faster than this are shown by the timer, the last of them surely
_BAR_WIDTH = 40
SETTLED_AFTER = 2  # steps without a change
_STYLES = ("bold red", "yellow")  # by steps without a change, before a span has settled
_SETTLED_STYLE = "green"
_PIECE = re.compile(r"[^\W\d_]+|\s|.", re.DOTALL)
_CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROL |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """`text` with control characters as symbols, so that an answer cannot steer the terminal."""
    return text.translate(_CONTROL)


@dataclass(frozen=True)
class Span:
    """Neighbouring text of one age; `age` counts the steps since it last changed."""

    text: str
    age: int


class CanvasHistory:
    """Ages of the pieces of one canvas."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ages: list[int] = []

    def update(self, text: str) -> list[Span]:
        """Align the canvas's text after one more step; returns it as spans."""
        pieces = _PIECE.findall(text)
        ages = [0] * len(pieces)
        for old, new, size in SequenceMatcher(None, self._pieces, pieces, autojunk=False).get_matching_blocks():
            for offset in range(size):
                ages[new + offset] = self._ages[old + offset] + 1
        self._pieces, self._ages = pieces, ages
        spans: list[Span] = []
        for piece, age in zip(pieces, ages, strict=True):
            if spans and spans[-1].age == age:
                spans[-1] = Span(spans[-1].text + piece, age)
            else:
                spans.append(Span(piece, age))
        return spans


def canvas_text(spans: list[Span]) -> Text:
    """Settled text green, text that changed in the last step red, yellow between."""
    text = Text(overflow="fold")
    for span in spans:
        style = _SETTLED_STYLE if span.age >= SETTLED_AFTER else _STYLES[span.age]
        shown = span.text if span.age >= SETTLED_AFTER else span.text.replace("\n", "↵\n")
        text.append(printable(shown), style)
    return text


def canvas_panel(spans: list[Span], title: str, height: int | None = None) -> Panel:
    """One canvas in a frame; `height` in lines, frame included."""
    return Panel(canvas_text(spans), title=title, title_align="left", border_style="dim", height=height)


class LiveCanvas:
    """Shows events on `console` while whole lines of final text go to `write`; leaves only the text behind."""

    def __init__(self, console: Console, write: Callable[[str], object]) -> None:
        self._live = Live(console=console, transient=True, refresh_per_second=20, redirect_stdout=False)
        self._write = write
        self._history = CanvasHistory()
        self._spans: list[Span] = []
        self._title = "canvas 1, step 0"
        self._height = 3
        self._tail = ""  # final text after the last line break, not written yet
        self._steps = self._tokens = 0
        self._started = time.monotonic()
        self._refreshed = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._tail:
            self._write(self._tail)

    def show(self, event: Event) -> None:
        """Take one event in."""
        if isinstance(event, Prefill):
            self._update(self._prompt(event))
        elif isinstance(event, Preview):
            self._spans = self._history.update(event.text)
            self._steps += 1
            self._title = f"canvas {event.canvas_index + 1}, step {event.step}"
            self._update(self._view())
        elif isinstance(event, Delta):
            self._history, self._spans = CanvasHistory(), []
            self._tokens += len(event.token_ids)
            self._commit(event.text)
        elif isinstance(event, Done):
            self._live.update(Text())

    def _update(self, view: RenderableType) -> None:
        now = time.monotonic()
        shown = now - self._refreshed >= _FRAME_S
        self._live.update(view, refresh=shown)
        self._refreshed = now if shown else self._refreshed

    def _commit(self, text: str) -> None:
        lines, line_break, self._tail = (self._tail + text).rpartition("\n")
        if line_break:
            self._live.update(Text())
            self._live.stop()
            self._write(lines + line_break)
            self._live.start()
        self._live.update(self._view())

    def _prompt(self, event: Prefill) -> RenderableType:
        status = Text(f"reading the prompt {event.cached_tokens:,} / {event.num_input_tokens:,}", "dim")
        bar = ProgressBar(total=event.num_input_tokens, completed=event.cached_tokens, width=_BAR_WIDTH)
        return Group(Text(printable(self._tail)), status, bar)

    def _view(self) -> RenderableType:
        width = self._live.console.width - 4
        body = canvas_text(self._spans)
        self._height = max(self._height, 2 + len(body.wrap(self._live.console, width)))
        panel = canvas_panel(self._spans, self._title, min(self._height, self._live.console.height - 3))
        seconds = time.monotonic() - self._started
        status = Text(f"{self._steps} steps, {self._tokens} tokens, {self._tokens / seconds:.0f} tokens/s", "dim")
        return Group(Text(printable(self._tail)), panel, status)
