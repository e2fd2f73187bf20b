"""From a stream's responses to events, with the figures of the request. Knows tensors by name, no connection."""

from __future__ import annotations

import time

from dgemma_client.errors import Cancelled, ServerError
from dgemma_client.events import Delta, Done, Event, Preview, Statistics
from dgemma_client.tensors import Values
from dgemma_client.transport import Outputs


class Collector:
    """Turns each response into its events; holds what has arrived so far."""

    def __init__(self) -> None:
        self.text = ""
        self.done = False
        self._started = time.monotonic()
        self._first_canvas_ms: float | None = None
        self._canvases = 0
        self._steps_of_canvas = 0

    def events(self, outputs: Outputs) -> list[Event]:
        """The events of one response, in order; raises Cancelled where the server ended the request."""
        if self.done:
            raise ServerError("a response came after the last one")
        events: list[Event] = []
        preview = _text(outputs, "preview_output")
        if preview:
            self._steps_of_canvas += 1
            events.append(Preview(preview, self._canvases, self._steps_of_canvas))
        text, ids = _text(outputs, "text_output"), outputs.get("output_ids", ())
        if text or ids:
            events.append(self._delta(text, ids))
        reason = _text(outputs, "finish_reason")
        if reason:
            events.append(self._finish(reason, outputs))
        return events

    def _delta(self, text: str, ids: Values) -> Delta:
        if self._first_canvas_ms is None:
            self._first_canvas_ms = self._elapsed_ms()
        self._canvases += 1
        self._steps_of_canvas = 0
        self.text += text
        return Delta(text, tuple(int(token) for token in ids))

    def _finish(self, reason: str, outputs: Outputs) -> Done:
        self.done = True
        if reason == "cancelled":
            raise Cancelled("the server ended the request before the answer was complete")
        if reason not in ("stop", "length"):
            raise ServerError(f"finish_reason is {reason!r}; expected stop, length or cancelled")
        total_ms = self._elapsed_ms()
        statistics = Statistics(
            num_input_tokens=_integer(outputs, "num_input_tokens"),
            num_output_tokens=_integer(outputs, "num_output_tokens"),
            denoising_steps=_integer(outputs, "denoising_steps"),
            canvases=self._canvases,
            time_to_first_canvas_ms=total_ms if self._first_canvas_ms is None else self._first_canvas_ms,
            total_ms=total_ms,
        )
        return Done("stop" if reason == "stop" else "length", statistics)

    def _elapsed_ms(self) -> float:
        return 1000 * (time.monotonic() - self._started)


def _text(outputs: Outputs, name: str) -> str:
    values = outputs.get(name, ())
    return str(values[0]) if values else ""


def _integer(outputs: Outputs, name: str) -> int:
    values = outputs.get(name, ())
    if not values:
        raise ServerError(f"the last response has no {name}")
    return int(values[0])
