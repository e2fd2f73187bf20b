"""Asks the drafters for the canvases that are about to start. Knows no text and no engine library.

The client's own draft comes first, then what prompt and output repeat, then the drafter network, for all canvases that
start in one call. A drafter that fails is not asked again, by any request: a draft is an offer, and the canvas starts
from noise without one. Only where a request has a seed, a network that finds no memory is waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import DraftRow, Engine
from dgemma_runtime.drafting.lookup import propose
from dgemma_runtime.drafting.opening import opening
from dgemma_runtime.drafting.proposal import Proposal
from dgemma_runtime.errors import EngineMemoryError, InvalidRequest
from dgemma_runtime.observer import Observer
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.requests import LiveRequest
from dgemma_runtime.statistics import Mean, Stopwatch

CLIENT, LOOKUP, MODEL = "client", "lookup", "model"
# What a network is not sure of misleads more than noise does. Measured on the demonstration checkpoint's drafter, over
# prompts of training (`python -m dgemma_build.drafter.measure --confidence`): at 0.5 a canvas takes as many steps, and
# one answer in 50 more is wrong.
MODEL_CONFIDENCE = 0.97

_log = logging.getLogger(__name__)


class Drafting:
    """Of one service; on the engine thread, but for `check`. `piece` is a token's text."""

    def __init__(self, engine: Engine, engine_time: Stopwatch, observer: Observer, piece: Callable[[int], str]) -> None:
        self._engine, self._engine_time, self._observer, self._piece = engine, engine_time, observer, piece
        self._canvas_length = engine.manifest.model.canvas_length
        self._off: set[str] = set()
        self._usual = Mean()  # denoising steps of canvases without a draft

    def check(self, parameters: GenerationParameters) -> None:
        """Raises InvalidRequest for a drafter that this server does not have."""
        if parameters.drafter == MODEL and self._engine.drafter is None:
            raise InvalidRequest("drafter", "'model': this server has no drafter network; send auto, lookup or off")

    def propose(self, requests: Sequence[LiveRequest]) -> None:
        """Decide what each request's present canvas starts from, once per canvas, however often that starts.

        Raises EngineMemoryError where a network's draft of a request with a seed found no memory. That canvas is then
        to start again, and the network is asked again.
        """
        for request in requests:
            drafts = request.drafts
            if drafts.canvas_index == request.canvas_index:
                continue
            drafts.canvas_index, drafts.proposal = request.canvas_index, self._from_text(request)
            drafts.asks_network = drafts.proposal is None and self._wants(request, MODEL) and request.cached_tokens > 0
        if undrafted := [r for r in requests if r.drafts.asks_network and MODEL not in self._off]:
            self._from_network(undrafted)

    def ended(self, request: LiveRequest, canvas: Canvas, emitted: int) -> None:
        """The request's canvas is done, and its first `emitted` tokens are output."""
        outcome = canvas.outcome(emitted)
        shown = outcome is not None and outcome.drafted > 0
        if not shown:
            self._usual.add(canvas.step)
        steps_saved = self._usual.value - canvas.step if self._usual.count else 0.0
        request.drafts.ended(canvas.step, outcome, steps_saved)
        if outcome is not None and shown:
            self._observer.drafted(request, outcome, steps_saved)

    def _wants(self, request: LiveRequest, source: str) -> bool:
        if source in self._off or (source == MODEL and self._engine.drafter is None):
            return False
        if source != CLIENT and request.parameters.drafter not in ("auto", source):
            return False
        return request.drafts.policy.decide(source)

    def _from_text(self, request: LiveRequest) -> Proposal | None:
        """Where the output begins, the client's draft begins as well; behind that it is found by what it follows."""
        drafts, length = request.drafts, self._canvas_length
        given = drafts.given if drafts.given is not None and self._wants(request, CLIENT) else None
        if given is not None and request.canvas_index == 0:
            return drafts.of_client(0, length)
        own = self._wants(request, LOOKUP)
        if given is None and not own:
            return None
        proposal = None
        with self._guarded(LOOKUP if given is None else CLIENT):
            end_ids = request.parameters.end_ids
            proposal = propose(request.tokens, len(request.prompt_ids), length, end_ids, given, own)
            if proposal is None and request.canvas_index == 0 and request.parameters.drafter == LOOKUP:
                proposal = opening(request.prompt_ids, length, end_ids, self._piece)
        return proposal

    def _from_network(self, requests: Sequence[LiveRequest]) -> None:
        rows = [DraftRow(r.slot, r.cached_tokens, r.page_view, int(r.tokens[-1])) for r in requests]
        try:
            with self._guarded(MODEL):
                with self._engine_time.running():
                    result = self._engine.draft(rows)
                for index, request in enumerate(requests):
                    ids, confidences = result.token_ids[index].copy(), result.confidences[index].copy()
                    request.drafts.proposal = Proposal(ids, confidences, MODEL, MODEL_CONFIDENCE)
        except EngineMemoryError as error:
            if any(request.is_exact for request in requests):
                raise
            _log.warning("no drafts for %d canvases: %s", len(requests), error)
        for request in requests:
            request.drafts.asks_network = False

    @contextmanager
    def _guarded(self, source: str) -> Iterator[None]:
        """What goes wrong in here costs drafts and no more; too little memory is not the drafter's fault."""
        try:
            yield
        except EngineMemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever it was, a request is none the worse for it
            _log.exception("drafter %s failed and is switched off; requests go on without its drafts", source)
            self._off.add(source)
            self._observer.drafter_failed(source)
