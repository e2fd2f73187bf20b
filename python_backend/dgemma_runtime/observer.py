"""Who is told of what the service does: metrics, traces, logs. Knows neither; does nothing by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgemma_runtime.events import Finished

if TYPE_CHECKING:
    from dgemma_runtime.drafting.proposal import DraftOutcome
    from dgemma_runtime.requests import LiveRequest


class Observer:
    """Override what is of interest. Called on the engine thread but where said; must return in microseconds.

    Moments are nanoseconds of `time.monotonic_ns`.
    """

    def refused(self, request_id: str, kind: str) -> None:
        """A request was not accepted: `kind` is the error's class, as InvalidRequest. On any thread."""

    def tokenized(self, request_id: str, tokens: int) -> None:
        """A request with `max_tokens` 0 was answered with that many tokens of its prompt. On any thread."""

    def submitted(self, request: LiveRequest) -> None:
        """A request is accepted and waits. On any thread."""

    def admitted(self, request: LiveRequest) -> None:
        """It has a slot; `request.cached_tokens` were found in the prefix cache. Called again after a preemption."""

    def prefilled(self, request: LiveRequest, tokens: int, started: int, ended: int) -> None:
        """A chunk of its known tokens was encoded: prompt, or what a preemption had dropped."""

    def stepped(self, canvases: int, commits: int, started: int, ended: int) -> None:
        """One denoising pass over that many canvases, with so many commits beside them."""

    def committed(self, request: LiveRequest, steps: int, tokens: int, started: int, ended: int) -> None:
        """A canvas was emitted: after `steps` denoising steps, with `tokens` of output, between these moments.

        `request.timeline` still says when the one before was.
        """

    def drafted(self, request: LiveRequest, outcome: DraftOutcome, steps_saved: float) -> None:
        """The canvas emitted just now had started from a draft; `steps_saved` as in `DraftStatistics`."""

    def drafter_failed(self, drafter: str) -> None:
        """It is switched off for good."""

    def encoded(self, request: LiveRequest, started: int, ended: int) -> None:
        """A committed canvas was encoded into the cache."""

    def preempted(self, request: LiveRequest) -> None:
        """Its pages were dropped; it waits again."""

    def finished(self, request: LiveRequest, event: Finished) -> None:
        """Its end. On the engine thread, or on whichever ends it when the engine has failed."""
