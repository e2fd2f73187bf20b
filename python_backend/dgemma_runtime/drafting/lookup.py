"""Prompt lookup: drafts what followed an earlier occurrence of the text's end. Knows token ids, no model, no request.

There is no index. A canvas begins once in a dozen denoising steps, and one scan with numpy finds the longest match at
once: 0.1 ms for 262,144 tokens of text, 3 ms where one token is repeated all through it. An automaton would make every
prompt pay at its arrival for what most requests never use, and would need tens of megabytes beside a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import Float32Array, Int32Array
from dgemma_runtime.drafting.proposal import NOTHING, Proposal

MIN_MATCH = 4  # tokens; what follows shorter matches is right in one position of ten
MAX_MATCH = 64  # tokens; longer matches count as long as this
_SPARSE = 16  # once fewer than one position in so many is left, positions are listed instead of marked


@dataclass(frozen=True)
class Match:
    """A place in a corpus where the text's end occurs."""

    end: int  # index of the first token behind it
    length: int  # tokens


def longest_match(corpus: Int32Array, text: Int32Array, max_match: int = MAX_MATCH) -> Match | None:
    """The longest end of `text` [n] that occurs in `corpus` [m] before its last token, and the latest place of it.

    None where not even the last token does. The time is at most that of `max_match` passes over the corpus.
    """
    most = min(max_match, len(text), len(corpus) - 1)
    if most < 1:
        return None
    last = len(corpus) - 1  # a match that ends there is followed by nothing
    found, length = corpus[:last] == text[-1], 1
    count = np.count_nonzero(found)
    if not count:
        return None
    while length < most and count * _SPARSE > last:
        longer = found[length:] & (corpus[: last - length] == text[-1 - length])
        if not (count := np.count_nonzero(longer)):
            break
        found[:length] = False
        found[length:] = longer
        length += 1
    ends = np.flatnonzero(found)
    while length < most and count:
        longer = ends[ends >= length]
        longer = longer[corpus[longer - length] == text[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return Match(int(ends[-1]) + 1, length)


def confidences(match_length: int, count: int) -> Float32Array:
    """[count]: rises with the match, falls with the distance from it, in tokens.

    Of the form of the rule of succession; the constants are those of texts and programs as they were edited.
    """
    distance = np.arange(count, dtype=np.float32)
    return np.float32(match_length) / (np.float32(match_length + 2) + distance / np.float32(4))


def propose(
    text: Int32Array, canvas_length: int, end_ids: Sequence[int] = (), draft: Int32Array | None = None
) -> Proposal | None:
    """A canvas for the end of `text` [n], prompt and output so far; None where too little of its end occurred before.

    `draft`, a client's own, is searched first and wins ties. Where the match reaches the end of the text, its period is
    repeated. Nothing is proposed behind a draft's end or behind an end token.
    """
    own = None if draft is None else longest_match(draft, text)
    match = longest_match(text, text)
    if draft is not None and own is not None and (match is None or own.length >= match.length):
        match, ids = own, draft[own.end :][:canvas_length]
    elif match is not None:
        ids = np.resize(text[match.end :], canvas_length)
    if match is None or match.length < MIN_MATCH:
        return None
    is_end = np.isin(ids, end_ids)
    count = int(is_end.argmax()) + 1 if is_end.any() else len(ids)
    token_ids = np.full(canvas_length, NOTHING, np.int32)
    token_ids[:count] = ids[:count]
    certain = np.zeros(canvas_length, np.float32)
    certain[:count] = confidences(match.length, count)
    return Proposal(token_ids, certain, "lookup")
