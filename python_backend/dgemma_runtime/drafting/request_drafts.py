"""What one request has to do with drafts: the client's own, its pins, the present canvas's draft, what came of them.

Knows no drafter but the client.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting.adaptive import DraftPolicy
from dgemma_runtime.drafting.hole import Hole
from dgemma_runtime.drafting.proposal import DraftOutcome, Pins, Proposal, lay_out
from dgemma_runtime.statistics import DraftStatistics

# Of one draft, in denoising steps. The demonstration checkpoint's network takes 0.4 to 0.5 of one; at the dimensions of
# the released model it would be 0.04 to 0.13.
COST_STEPS = {"model": 0.5}


@dataclass(eq=False)
class RequestDrafts:
    """Changed by the service alone."""

    given: Int32Array | None = None  # [n], the client's draft of the whole output
    literals: Pins | None = None  # [n] of the whole output; behind it nothing is pinned
    hole: Hole | None = None  # between prompt and suffix; then the output is one canvas
    proposal: Proposal | None = None  # for the present canvas
    canvas_index: int = -1  # whose proposal that is; a canvas that starts again starts from the same
    asks_network: bool = False  # which has not answered yet
    policy: DraftPolicy = field(default_factory=lambda: DraftPolicy(COST_STEPS))
    statistics: dict[str, DraftStatistics] = field(default_factory=dict)  # by drafter

    def ended(self, steps: int, outcome: DraftOutcome | None, steps_saved: float) -> None:
        """A canvas took `steps`; `outcome` is None where it had no draft."""
        self.policy.observe(steps, outcome)
        if outcome is not None and outcome.drafted:
            known = self.statistics.get(outcome.source, DraftStatistics(outcome.source))
            self.statistics[outcome.source] = known.with_canvas(outcome, steps_saved)

    def of_client(self, canvas_index: int, canvas_length: int) -> Proposal | None:
        """The client's draft of this canvas; None where there is none, or it ends before."""
        if self.given is None:
            return None
        ids = self.given[canvas_index * canvas_length :][:canvas_length]
        return lay_out(ids, np.ones(len(ids), np.float32), canvas_length, "client") if len(ids) else None

    def pins(self, canvas_index: int, canvas_length: int) -> Pins | None:
        """Of this canvas, also where it lies in a hole; None without a template."""
        if self.literals is None:
            return None
        start = canvas_index * canvas_length
        pinned = self.literals.pinned[start:][:canvas_length]
        read = len(pinned)
        missing = (0, canvas_length - read)
        return Pins(np.pad(self.literals.token_ids[start:][:canvas_length], missing), np.pad(pinned, missing), read)
