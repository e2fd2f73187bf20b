"""A picture of a canvas from noise to text, as SVG. Knows events, not where they come from."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text

from dgemma_client.events import Preview
from dgemma_client.live import SETTLED_AFTER, CanvasHistory, Span, canvas_panel, canvas_text, printable

_FONT_FACE = re.compile(r"@font-face\s*\{[^}]*\}\s*")  # fonts from elsewhere; an image must stand alone


@dataclass(frozen=True)
class Frame:
    """The canvas after one step; step 0 is the noise it starts from."""

    step: int
    spans: tuple[Span, ...]


def frames(noise: str, previews: Sequence[Preview], answer: str) -> list[Frame]:
    """The steps that changed the first canvas, from its noise to the answer, which is the last one's."""
    history = CanvasHistory()
    first = [preview for preview in previews if preview.canvas_index == 0]
    shown = [Frame(0, (Span(noise, 0),))]
    for preview in first:
        spans = history.update(preview.text)
        if any(span.age == 0 for span in spans):
            shown.append(Frame(preview.step, tuple(spans)))
    return [*shown, Frame(len(first) + 1, (Span(answer, SETTLED_AFTER),))]


def chosen(all_frames: Sequence[Frame], count: int) -> list[Frame]:
    """At most `count` frames, the first and the last among them, evenly between."""
    last = len(all_frames) - 1
    if last < count:
        return list(all_frames)
    return [all_frames[round(index * last / (count - 1))] for index in range(count)]


def draw(prompt: str, shown: Sequence[Frame], caption: str, frame_width: int = 24) -> str:
    """The prompt and the frames side by side as an SVG document that needs nothing from elsewhere."""
    lines = prompt.split("\n")
    height = max(len(lines), *(_rows(frame, frame_width - 4) for frame in shown)) + 2
    prompt_width = max(map(len, lines)) + 4
    panels: list[RenderableType] = [
        Panel(
            Text(printable(prompt)),
            title="prompt",
            title_align="left",
            border_style="dim",
            height=height,
            width=prompt_width,
        )
    ]
    for frame in shown:
        panel = canvas_panel(list(frame.spans), f"step {frame.step}" if frame.step else "noise", height)
        panel.width = frame_width
        panels.append(panel)
    width = prompt_width + 1 + len(shown) * (frame_width + 1)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Columns(panels, padding=(0, 1, 0, 0)))
    legend = canvas_text([Span("changed in this step ", 0), Span(" changed one step ago ", 1)])
    legend.append_text(canvas_text([Span(" settled", SETTLED_AFTER)]))
    console.print(Text(caption))
    console.print(legend)
    return _FONT_FACE.sub("", console.export_svg(title="dgemma", unique_id="canvas"))


def _rows(frame: Frame, width: int) -> int:
    return len(canvas_text(list(frame.spans)).wrap(Console(width=width), width))
