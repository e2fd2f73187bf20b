"""Asks the drafters for the canvases that are about to start. Knows no text and no engine library.

The client's own draft comes first, then what prompt and output repeat. A drafter that fails is not asked again, by any
request: a draft is an offer, and the canvas starts from noise without one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.drafting.lookup import propose
from dgemma_runtime.drafting.proposal import Proposal
from dgemma_runtime.observer import Observer
from dgemma_runtime.requests import LiveRequest
from dgemma_runtime.statistics import Mean

CLIENT, LOOKUP = "client", "lookup"

_log = logging.getLogger(__name__)


class Drafting:
    """Of one service; on the engine thread."""

    def __init__(self, canvas_length: int, observer: Observer) -> None:
        self._canvas_length, self._observer = canvas_length, observer
        self._off: set[str] = set()
        self._usual = Mean()  # denoising steps of canvases without a draft

    def propose(self, requests: Sequence[LiveRequest]) -> None:
        """Decide what each request's present canvas starts from, once per canvas, however often that starts."""
        for request in requests:
            drafts = request.drafts
            if drafts.canvas_index != request.canvas_index:
                drafts.canvas_index, drafts.proposal = request.canvas_index, self._proposal(request)

    def ended(self, request: LiveRequest, canvas: Canvas, emitted: int) -> None:
        """The request's canvas is done, and its first `emitted` tokens are output."""
        outcome = canvas.outcome(emitted)
        if outcome is not None and not outcome.drafted:
            outcome = None
        if outcome is None:
            self._usual.add(canvas.step)
        steps_saved = self._usual.value - canvas.step if self._usual.count else 0.0
        request.drafts.ended(canvas.step, outcome, steps_saved)
        if outcome is not None:
            self._observer.drafted(request, outcome, steps_saved)

    def _proposal(self, request: LiveRequest) -> Proposal | None:
        if request.parameters.drafter == "off":
            return None
        source = CLIENT if request.drafts.given is not None else LOOKUP
        if source in self._off or (source == LOOKUP and request.parameters.drafter == "model"):
            return None
        if not request.drafts.policy.decide(source):
            return None
        try:
            return self._from_text(request, source)
        except Exception:  # noqa: BLE001 - whatever it was, a request is none the worse for it
            _log.exception("drafter %s failed and is switched off; requests go on without its drafts", source)
            self._off.add(source)
            self._observer.drafter_failed(source)
            return None

    def _from_text(self, request: LiveRequest, source: str) -> Proposal | None:
        """Where the output begins, the client's draft begins as well; behind that it is found by what it follows."""
        drafts, length = request.drafts, self._canvas_length
        if request.canvas_index == 0 and source == CLIENT:
            return drafts.of_client(0, length)
        end_ids = request.parameters.end_ids
        proposal = propose(request.tokens, len(request.prompt_ids), length, end_ids, drafts.given)
        return None if proposal is None else replace(proposal, source=source)
