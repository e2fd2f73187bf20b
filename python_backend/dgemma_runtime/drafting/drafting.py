"""Asks the drafters for the canvases that are about to start. Knows no request's text and no engine library.

The client's own draft comes first, then what the prompt and the output so far repeat, then the drafter network.
A drafter that fails is not asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dgemma_runtime.drafting.proposal import Proposal
from dgemma_runtime.requests import LiveRequest

_log = logging.getLogger(__name__)


class Drafting:
    """Of one service; on the engine thread."""

    def __init__(self, canvas_length: int) -> None:
        self._canvas_length = canvas_length

    def propose(self, requests: Sequence[LiveRequest]) -> None:
        """Decide what each request's present canvas starts from, once per canvas, however often that starts."""
        for request in requests:
            drafts = request.drafts
            if drafts.canvas_index == request.canvas_index:
                continue
            drafts.canvas_index = request.canvas_index
            drafts.proposal = self._proposal(request)

    def _proposal(self, request: LiveRequest) -> Proposal | None:
        if request.parameters.drafter == "off":
            return None
        return request.drafts.of_client(request.canvas_index, self._canvas_length)
