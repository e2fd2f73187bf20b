"""What a canvas may start from: somebody's draft and pinned positions, and what came of a draft. Knows no drafter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import Float32Array, Int32Array

NOTHING = -1  # the id of a position for which nothing is proposed

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Proposal:
    """A draft of one canvas. The denoiser sees the positions whose confidence suffices; the others start as noise."""

    token_ids: Int32Array  # [canvas_length], NOTHING where nothing is proposed
    confidences: Float32Array  # [canvas_length], in [0, 1]; 0 where nothing is proposed
    source: str  # lookup, model, client
    enough: float = 0.5  # confidence with which a position is shown, where the request does not say another


@dataclass(frozen=True)
class Pins:
    """Positions of one canvas that are given: attended to, never renoised, never changed."""

    token_ids: Int32Array  # [canvas_length], of any value where not pinned
    pinned: BoolArray  # [canvas_length]
    read: int  # positions that anybody reads, the first ones; a canvas ends whatever stands behind them


@dataclass(frozen=True)
class DraftOutcome:
    """What came of one canvas's draft."""

    source: str
    drafted: int  # positions that the denoiser was shown, of those that were emitted
    accepted: int  # of these, positions where the committed canvas has the draft's token
    steps: int  # denoising steps of the canvas


def lay_out(token_ids: Int32Array, confidences: Float32Array, canvas_length: int, source: str) -> Proposal:
    """A proposal of [n <= canvas_length] ids with confidences; nothing is proposed behind them."""
    missing = canvas_length - len(token_ids)
    return Proposal(
        np.pad(np.asarray(token_ids, np.int32), (0, missing), constant_values=NOTHING),
        np.pad(np.asarray(confidences, np.float32), (0, missing)),
        source,
    )
