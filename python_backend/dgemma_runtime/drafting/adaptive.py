"""Whether a request's next canvas should be drafted: what drafts cost it and saved it so far. Knows no drafter.

A draft has paid where its canvas took fewer steps, the drafter's own cost included, than the request's canvases without
a draft take on average; where none was without, if at least half of what was shown was right. One that has not paid
makes its source rest for a canvas, the next one for two, then four and so on; one that has paid ends that. Resting
canvases tell what a canvas takes without a draft. So do those whose draft was not confident enough to be shown; they
have not paid where asking has its cost. There is no clock and no chance in it: a seed means the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dgemma_runtime.drafting.proposal import DraftOutcome

LONGEST_REST = 32  # canvases
_RECENT = 4  # canvases that the average looks back on, roughly
_RIGHT_SHARE = 0.5


@dataclass
class _Source:
    rest: int = 0  # canvases left of the present rest
    next_rest: int = 1  # canvases, should the next draft not pay


@dataclass
class DraftPolicy:
    """Of one request. Ask `decide` once per canvas and source, then tell `observe` how the canvas went."""

    cost_steps: Mapping[str, float] = field(default_factory=dict)  # by source, of one draft in denoising steps; else 0
    usual_steps: float | None = None  # of a canvas without a draft, recent ones more than old ones
    _sources: dict[str, _Source] = field(default_factory=dict)

    def decide(self, source: str) -> bool:
        """Whether to draft the next canvas; a canvas for which not counts towards the source's rest."""
        state = self._sources.setdefault(source, _Source())
        if state.rest == 0:
            return True
        state.rest -= 1
        return False

    def observe(self, steps: int, outcome: DraftOutcome | None = None) -> None:
        """A canvas took `steps`, with a draft of this outcome or, None, without."""
        shown = outcome is not None and outcome.drafted > 0
        if not shown:
            usual = self.usual_steps
            self.usual_steps = float(steps) if usual is None else usual + (steps - usual) / _RECENT
        if outcome is None or not (shown or self.cost_steps.get(outcome.source)):
            return
        state = self._sources.setdefault(outcome.source, _Source())
        if shown and self._paid(steps, outcome):
            state.next_rest = 1
            return
        state.rest = state.next_rest
        state.next_rest = min(2 * state.next_rest, LONGEST_REST)

    def _paid(self, steps: int, outcome: DraftOutcome) -> bool:
        if self.usual_steps is None:
            return outcome.accepted >= _RIGHT_SHARE * outcome.drafted
        return steps + self.cost_steps.get(outcome.source, 0.0) < self.usual_steps
