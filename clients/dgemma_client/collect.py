"""From a stream's responses to events, with the figures of the request. Knows tensors by name, no connection."""

from __future__ import annotations

import json
import time
from typing import Any, get_args

from dgemma_client.errors import Cancelled, ServerError
from dgemma_client.events import (
    Delta,
    Done,
    DraftStatistics,
    Event,
    FinishReason,
    Prefill,
    Preview,
    Statistics,
    StopReason,
)
from dgemma_client.tensors import Values
from dgemma_client.transport import Outputs

_REASONS: dict[str, FinishReason] = {reason: reason for reason in get_args(FinishReason)}


class Collector:
    """Turns each response into its events; holds what has arrived so far."""

    def __init__(self) -> None:
        self.text = ""
        self.done = False
        self._started = time.monotonic()
        self._first_canvas_ms: float | None = None

    def events(self, outputs: Outputs) -> list[Event]:
        """The events of one response, in order; raises Cancelled where the server ended the request."""
        if self.done:
            raise ServerError("a response came after the last one")
        events: list[Event] = []
        if "prefilled_tokens" in outputs:  # comes with num_input_tokens, as the end does
            events.append(Prefill(_integer(outputs, "prefilled_tokens"), _integer(outputs, "num_input_tokens")))
        if "preview_output" in outputs:
            index, step = _integer(outputs, "canvas_index"), _integer(outputs, "canvas_steps")
            events.append(Preview(_text(outputs, "preview_output"), index, step))
        text, ids = _text(outputs, "text_output"), outputs.get("output_ids", ())
        if text or ids:
            events.append(self._delta(text, ids))
        if "finish_reason" in outputs:
            events.append(self._finish(outputs))
        return events

    def _delta(self, text: str, ids: Values) -> Delta:
        if self._first_canvas_ms is None:
            self._first_canvas_ms = self._elapsed_ms()
        self.text += text
        return Delta(text, tuple(int(token) for token in ids))

    def _finish(self, outputs: Outputs) -> Done:
        self.done = True
        reason = _text(outputs, "finish_reason")
        if reason == "cancelled":
            raise Cancelled("the server ended the request before the answer was complete")
        if reason not in _REASONS:
            raise ServerError(f"finish_reason is {reason!r}; expected {', '.join(_REASONS)} or cancelled")
        served, total_ms = _served(outputs), self._elapsed_ms()
        statistics = Statistics(
            num_input_tokens=_integer(outputs, "num_input_tokens"),
            num_output_tokens=_integer(outputs, "num_output_tokens"),
            denoising_steps=_integer(outputs, "denoising_steps"),
            canvases=int(_figure(served, "canvases")),
            time_to_first_canvas_ms=total_ms if self._first_canvas_ms is None else self._first_canvas_ms,
            total_ms=total_ms,
            queue_ms=_figure(served, "queue_ms"),
            prefill_ms=_figure(served, "prefill_ms"),
            engine_ms=_figure(served, "engine_ms"),
            prefix_tokens=int(_figure(served, "prefix_tokens", 0)),
            preemptions=int(_figure(served, "preemptions", 0)),
            drafts=_drafts(served),
            hole_tokens=_count(served, "hole_tokens"),
            suffix_tokens=_count(served, "suffix_tokens"),
        )
        return Done(_REASONS[reason], statistics, _stop_reason(served))

    def _elapsed_ms(self) -> float:
        return 1000 * (time.monotonic() - self._started)


def _text(outputs: Outputs, name: str) -> str:
    values = outputs.get(name, ())
    return str(values[0]) if values else ""


def _integer(outputs: Outputs, name: str) -> int:
    values = outputs.get(name, ())
    if not values:
        raise ServerError(f"a response with {' and '.join(outputs)} has no {name}")
    return int(values[0])


def _served(outputs: Outputs) -> dict[str, Any]:
    try:
        served = json.loads(_text(outputs, "statistics"))
    except ValueError as error:
        raise ServerError(f"output statistics is not JSON: {error}") from None
    if not isinstance(served, dict):
        raise ServerError(f"output statistics is {type(served).__name__}; expected a JSON object")
    return served


def _stop_reason(served: dict[str, Any]) -> StopReason:
    value = served.get("stop_reason")
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise ServerError(f"output statistics has stop_reason {value!r}; expected text, a token id or null")
    return value


def _drafts(served: dict[str, Any]) -> tuple[DraftStatistics, ...]:
    drafts = served.get("drafts", [])
    if not isinstance(drafts, list) or not all(isinstance(draft, dict) for draft in drafts):
        raise ServerError(f"output statistics has drafts {drafts!r}; expected a list of objects")
    return tuple(
        DraftStatistics(
            drafter=str(draft.get("drafter")),
            canvases=int(_figure(draft, "canvases")),
            drafted_tokens=int(_figure(draft, "drafted_tokens")),
            accepted_tokens=int(_figure(draft, "accepted_tokens")),
            steps_saved=_figure(draft, "steps_saved"),
        )
        for draft in drafts
    )


def _count(served: dict[str, Any], name: str) -> int | None:
    return None if served.get(name) is None else int(_figure(served, name))


def _figure(served: dict[str, Any], name: str, missing: float | None = None) -> float:
    value = served.get(name, missing)
    if not isinstance(value, int | float):
        raise ServerError(f"output statistics has {name} {value!r}; expected a number")
    return value
