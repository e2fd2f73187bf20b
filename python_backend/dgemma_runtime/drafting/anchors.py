"""Completes a canvas in the making from the text that it is copying. Knows token ids, no model and no request.

The first canvas of an answer follows nothing that was there before, so no match drafts it. But once a step has made
some of its tokens certain, pairs of them may stand in the prompt: a copy lies on a diagonal, a fixed distance from its
source. What is missing between certain tokens on a diagonal is taken from there; where certain ones contradict it, the
copy was edited.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import Float32Array, Int32Array
from dgemma_runtime.drafting.proposal import NOTHING, BoolArray, Proposal

REACH = 8  # positions over which certain tokens speak for their neighbours
_LONGEST_SOURCE = 65_536  # tokens of the text that are searched, its last ones: 2 ms
_DIAGONALS = 8  # that most pairs lie on
_LEAST_PAIRS = 2
_NEARNESS = (1 - np.abs(np.arange(-REACH, REACH + 1)) / (REACH + 1)).astype(np.float32)


def complete(text: Int32Array, argmax_ids: Int32Array, certain: BoolArray) -> Proposal | None:
    """What `text` [n], prompt and output before this canvas, says of a canvas's uncertain positions.

    `argmax_ids` and `certain` [canvas_length] are of one step. Proposed is the text's token on the diagonal that the
    most certain tokens around a position speak for; nothing where none does or a certain token contradicts all. None
    where nothing at all is proposed.
    """
    source = text[-_LONGEST_SOURCE:]
    distances = _diagonals(source, argmax_ids, certain)
    if not len(distances):
        return None
    places = np.arange(len(argmax_ids)) + distances[:, None]  # [diagonals, canvas_length]
    inside = (places >= 0) & (places < len(source))
    tokens = np.where(inside, source[np.clip(places, 0, len(source) - 1)], NOTHING)
    same = tokens == argmax_ids
    votes = np.where(same, np.float32(1), np.float32(-1)) * certain
    support = np.stack([np.convolve(row, _NEARNESS)[REACH:-REACH] for row in votes])
    support = np.where(inside & (same | ~certain), support, np.float32(0))
    best = support.argmax(axis=0)[None]
    strength = np.maximum(np.take_along_axis(support, best, axis=0)[0], np.float32(0))
    if not strength.any():
        return None
    token_ids = np.where(strength > 0, np.take_along_axis(tokens, best, axis=0)[0], NOTHING)
    confidences: Float32Array = strength / (strength + np.float32(1))
    return Proposal(token_ids.astype(np.int32), confidences, "lookup")


def _diagonals(source: Int32Array, argmax_ids: Int32Array, certain: BoolArray) -> npt.NDArray[np.int64]:
    """Distances from a canvas position to its place in the source, those that most pairs of certain tokens have."""
    where = np.flatnonzero(certain[:-1] & certain[1:])
    keys, first, counts = np.unique(_pairs(argmax_ids)[where], return_index=True, return_counts=True)
    keys, positions = keys[counts == 1], where[first[counts == 1]]  # what occurs twice says less of where it is from
    if not len(keys) or len(source) < 2:
        return np.empty(0, np.int64)
    of_source = _pairs(source)
    index = np.minimum(np.searchsorted(keys, of_source), len(keys) - 1)
    found = np.flatnonzero(keys[index] == of_source)
    length = len(argmax_ids)
    pairs = np.bincount(found - positions[index[found]] + length, minlength=1)
    most = np.argsort(-pairs, kind="stable")[:_DIAGONALS]
    distances: npt.NDArray[np.int64] = most[pairs[most] >= _LEAST_PAIRS] - length
    return distances


def _pairs(token_ids: Int32Array) -> npt.NDArray[np.int64]:
    """[n - 1]: a number for each pair of neighbours."""
    wide = token_ids.astype(np.int64)
    return (wide[:-1] << 32) | wide[1:]
