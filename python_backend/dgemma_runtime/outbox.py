"""Events on their way from the engine thread to a transport: in order per request, bounded per request. Knows neither.

Previews are what may be lost. Where some wait already, the last one gives way to the next one of its canvas, so a
transport that falls behind sends fewer of them; and a request that has had very many gets them at a limited rate,
because Triton keeps whatever a client does not read, without limit and without telling. Commits and last events are
never dropped.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dgemma_runtime.events import Event, Prefill, Preview

_MAY_WAIT = 16  # events of one request, before its previews give way to each other
_FREE_PREVIEWS = 4096  # of one request, as fast as they come: minutes of a fast engine, some MB at a stalled client
_THEN_PER_S = 10.0


@dataclass(eq=False)
class Lane:
    """One request's events that were not taken yet; a transport adds what it needs to send them."""

    waiting: deque[Event | Exception] = field(default_factory=deque)
    previews: int = 0  # taken so far
    last_preview: float = 0.0  # monotonic seconds, when it was put


L = TypeVar("L", bound=Lane)


class Outbox(Generic[L]):
    """Any thread may `put`; one `take`s. Requests take turns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lanes: deque[L] = deque()  # with something waiting, in the order of their turns
        self._closed = False

    def put(self, lane: L, event: Event | Exception) -> None:
        """Never blocks for longer than another thread's `put` or `take`."""
        with self._changed:
            if isinstance(event, Preview) and not self._admits(lane):
                return
            if not lane.waiting:
                self._lanes.append(lane)
            elif len(lane.waiting) >= _MAY_WAIT and _is_passing(event) and type(lane.waiting[-1]) is type(event):
                lane.waiting.pop()
            lane.waiting.append(event)
            self._changed.notify()

    def take(self) -> tuple[L, Event | Exception] | None:
        """The next event; blocks while there is none. None after `close`, once everything was taken."""
        with self._changed:
            while not self._lanes:
                if self._closed:
                    return None
                self._changed.wait()
            lane = self._lanes.popleft()
            event = lane.waiting.popleft()
            if lane.waiting:
                self._lanes.append(lane)
            lane.previews += isinstance(event, Preview)
            return lane, event

    def close(self) -> None:
        """`take` ends when everything was taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _admits(self, lane: L) -> bool:
        now = time.monotonic()
        if lane.previews >= _FREE_PREVIEWS and now - lane.last_preview < 1 / _THEN_PER_S:
            return False
        lane.last_preview = now
        return True


def _is_passing(event: Event | Exception) -> bool:
    """Each one makes those before it worthless."""
    return isinstance(event, Preview | Prefill)
