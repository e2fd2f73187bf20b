"""A thread that does what others have no time for, one call after the other. Knows nothing of the calls."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Deferred:
    """`call` returns at once; what it was given runs later, in order."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """From any thread."""
        self._calls.put(function)

    def close(self, timeout_s: float) -> None:
        """Do what is left, then end; give up after `timeout_s` seconds."""
        self._calls.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (function := self._calls.get()) is not None:
            try:
                function()
            except Exception:  # noqa: BLE001 - one call's fault must not end the others
                _log.exception("a deferred call failed")
