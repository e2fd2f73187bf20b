"""Passes what happens in the service on to several observers. Knows none of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dgemma_runtime.drafting.proposal import DraftOutcome
from dgemma_runtime.events import Finished
from dgemma_runtime.observer import Observer
from dgemma_runtime.requests import LiveRequest

_log = logging.getLogger(__name__)


class Observers(Observer):
    """One after the other. An observer that fails is left out from then on: nothing of it reaches the engine thread."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def refused(self, request_id: str, kind: str) -> None:
        self._call("refused", request_id, kind)

    def tokenized(self, request_id: str, tokens: int) -> None:
        self._call("tokenized", request_id, tokens)

    def submitted(self, request: LiveRequest) -> None:
        self._call("submitted", request)

    def admitted(self, request: LiveRequest) -> None:
        self._call("admitted", request)

    def prefilled(self, request: LiveRequest, tokens: int, started: int, ended: int) -> None:
        self._call("prefilled", request, tokens, started, ended)

    def stepped(self, canvases: int, commits: int, started: int, ended: int) -> None:
        self._call("stepped", canvases, commits, started, ended)

    def committed(self, request: LiveRequest, steps: int, tokens: int, started: int, ended: int) -> None:
        self._call("committed", request, steps, tokens, started, ended)

    def drafted(self, request: LiveRequest, outcome: DraftOutcome, steps_saved: float) -> None:
        self._call("drafted", request, outcome, steps_saved)

    def drafter_failed(self, drafter: str) -> None:
        self._call("drafter_failed", drafter)

    def encoded(self, request: LiveRequest, started: int, ended: int) -> None:
        self._call("encoded", request, started, ended)

    def preempted(self, request: LiveRequest) -> None:
        self._call("preempted", request)

    def finished(self, request: LiveRequest, event: Finished) -> None:
        self._call("finished", request, event)

    def _call(self, hook: str, *arguments: Any) -> None:
        for observer in self._observers:
            try:
                getattr(observer, hook)(*arguments)
            except Exception:  # noqa: BLE001 - watching must not break what is watched
                _log.exception("%s failed at %s and is left out from now on", type(observer).__name__, hook)
                self._observers = tuple(other for other in self._observers if other is not observer)
