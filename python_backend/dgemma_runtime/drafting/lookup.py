"""Prompt lookup: drafts a canvas from what the prompt, the output or a client repeats. Knows token ids, no request.

There is no index. A canvas begins once in a dozen denoising steps, and scans with numpy find the longest match in 0.1
to 0.3 ms for 262,144 tokens of text, in 10 to 25 ms where one token is repeated all through it (python -m
dgemma_build.bench.lookup). An automaton would make every prompt pay at its arrival for what most requests never use,
and would need tens of megabytes beside a long one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dgemma_runtime.contract import Float32Array, Int32Array
from dgemma_runtime.drafting.edits import Copy, carry_on, look_ahead, look_back
from dgemma_runtime.drafting.proposal import Proposal, lay_out

MIN_MATCH = 4  # tokens, to look at a place at all
MIN_STRENGTH = 16  # tokens, of all but a client's draft; what follows less is wrong too often, and that costs steps
MAX_MATCH = 64  # tokens; longer matches count as long as this
_CUTS = (0, 8)  # tokens left off the text's end: behind a fresh edit nothing matches
_FEW = 256  # places; so many at most are compared one by one


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
    while length < most and count > _FEW:
        longer = found[length:] & (corpus[: last - length] == text[-1 - length])
        if not (count := np.count_nonzero(longer)):
            return Match(int(np.flatnonzero(found)[-1]) + 1, length)
        found[:length] = False
        found[length:] = longer
        length += 1
    ends, back = np.flatnonzero(found), np.arange(length, most)
    places = ends[:, None] - back  # of the tokens before, place by place
    same = (corpus[places] == text[-1 - back]) & (places >= 0)
    more = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    return Match(int(ends[more == more.max()][-1]) + 1, length + int(more.max()))


def confidences(strength: int, count: int) -> Float32Array:
    """[count]: rises with the tokens that agreed before, falls with the distance from them, in tokens.

    Of the form of the rule of succession; the constants are those of texts and programs as they were edited.
    """
    distance = np.arange(count, dtype=np.float32)
    return np.float32(strength) / (np.float32(strength + 2) + distance / np.float32(4))


def propose(
    text: Int32Array,
    prompt_length: int,
    canvas_length: int,
    end_ids: Sequence[int] = (),
    draft: Int32Array | None = None,
    own: bool = True,
) -> Proposal | None:
    """A canvas for the end of `text` [n], prompt and output so far; None where too little of its end was there before.

    While the output copies the client's `draft`, edits aside, that goes on. Otherwise the strongest of: it goes on
    copying the prompt; it repeats itself, again and again where the match reaches its end; a weak match with the draft.
    Without `own` only the draft is looked at. What is found there is the client's, the rest lookup's. Nothing is
    proposed behind an end token.

    Chats repeat the marker in front of every answer; alone it is too short to bring back the answer before.
    """
    written = len(text) - prompt_length
    found, source = ([] if draft is None else _copied(draft, text, written, canvas_length)), "client"
    if own and (not found or found[0][0] < MIN_STRENGTH):
        others = _copied(text[:prompt_length], text, written, canvas_length) + _repeated(text, canvas_length)
        if strong := [other for other in others if other[0] >= MIN_STRENGTH]:
            found, source = strong, "lookup"
    if not found:
        return None
    strength, following = max(found, key=lambda item: item[0])
    if not (ids := list(_until_end(islice(following, canvas_length), end_ids))):
        return None
    return lay_out(np.array(ids, np.int32), confidences(strength, len(ids)), canvas_length, source)


def _copied(source: Int32Array, text: Int32Array, written: int, length: int) -> list[tuple[int, Iterator[int]]]:
    """How strongly the text copies the source, and what comes next; nothing where it does not."""
    copy = _followed(source, text, written)
    return [] if copy is None else [(copy.strength, carry_on(source, copy, length))]


def _repeated(text: Int32Array, length: int) -> list[tuple[int, Iterator[int]]]:
    """How strongly the text repeats itself, and what comes next."""
    match = longest_match(text, text)
    return [] if match is None else [(match.length, iter(np.resize(text[match.end :], length).tolist()))]


def _followed(source: Int32Array, text: Int32Array, written: int) -> Copy | None:
    """The strongest way in which the text goes on from a place of the source."""
    copies: list[Copy] = []
    for cut in _CUTS:
        if cut and written <= cut:
            continue
        known, rest = text[: len(text) - cut], text[len(text) - cut :]
        match = longest_match(source, known)
        if match is not None and match.length >= MIN_MATCH:
            before = look_back(source, match.end, known)
            copies += [copy for copy in [look_ahead(source, before, rest)] if copy is not None]
    return max(copies, key=lambda copy: copy.strength, default=None)


def _until_end(ids: Iterator[int], end_ids: Sequence[int]) -> Iterator[int]:
    for token_id in ids:
        yield token_id
        if token_id in end_ids:
            return
