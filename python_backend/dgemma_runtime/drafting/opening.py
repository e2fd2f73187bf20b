"""Guesses that an answer begins as the document in the prompt does. Knows tokens and their texts, no request.

Nothing was there before an answer that its beginning could be matched with. But a line that ends in a colon announces
something, and who asks for a revision of it gets most of it back. This is a guess about the task, not a match: where
the answer is no copy it can cost a step, so it is for those who ask for prompt lookup, not for everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting.lookup import MIN_STRENGTH
from dgemma_runtime.drafting.proposal import Proposal, lay_out

CONFIDENCE = 0.5  # of every token: more positions are right than not where the answer is a copy
LONGEST_INSTRUCTION = 256  # tokens of the turn in which the colon must come


def opening(
    prompt: Int32Array, canvas_length: int, end_ids: Sequence[int], piece: Callable[[int], str]
) -> Proposal | None:
    """The first canvas of the answer to `prompt` [n], whose turns end in one of `end_ids`; `piece` is a token's text.

    Proposed is what follows the first line that ends in a colon in the last turn, to that turn's end. None where there
    is no such line, or less than MIN_STRENGTH tokens behind it.
    """
    ends = np.flatnonzero(np.isin(prompt, end_ids))
    if not len(ends):
        return None
    start = int(ends[-2]) + 1 if len(ends) > 1 else 0
    place = _announced(prompt[start : ends[-1]], piece)
    if place is None or ends[-1] - (start + place) < MIN_STRENGTH:
        return None
    ids = prompt[start + place : ends[-1] + 1][:canvas_length]  # with the turn's end, as the answer's
    return lay_out(ids, np.full(len(ids), CONFIDENCE, np.float32), canvas_length, "lookup")


def _announced(turn: Int32Array, piece: Callable[[int], str]) -> int | None:
    """Index of the first token behind a line that ends in a colon, and behind empty lines that follow."""
    line, announced = "", False
    for index, token_id in enumerate(turn[:LONGEST_INSTRUCTION].tolist()):
        text = piece(token_id)
        if announced and text.strip():
            return index
        line += text
        if "\n" in text:
            announced = announced or line.rstrip().endswith(":")
            line = ""
    return None
