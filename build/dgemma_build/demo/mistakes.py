"""Drafts of a canvas that are fluent and partly wrong, for training. Knows tokens and kinds of words, no model.

A canvas that started from somebody's draft is unlike one under uniform noise: where it is wrong, it is wrong by a
token of the right kind. A denoiser that never saw such canvases copies those tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dgemma_build.demo.records import CITIES, COLORS, FIELDS, FRUITS, ITEMS, JOBS, NAMES

_KINDS: tuple[Sequence[str], ...] = (
    "0123456789",
    NAMES,
    CITIES,
    COLORS,
    ITEMS,
    FRUITS,
    JOBS,
    tuple(FIELDS),
    ("true", "false"),
    ("a", "b", "x", "y", "n", "m", "p", "q", "u", "w"),
    ("r", "out", "res", "total", "ans"),
    ("▁+▁", "▁-▁", "▁*▁", "▁//▁", "▁%▁"),
    ("▁<▁", "▁>▁"),
)
_MEAN_CHANGES = 3.0  # tokens of a draft that are replaced, on average
_NONE, _SWAPPED, _SHIFTED = (
    0.15,
    0.25,
    0.1,
)  # shares of drafts: nothing replaced, two tokens swapped, one lost or doubled


@dataclass(frozen=True)
class Sources:
    """What a drafter could have taken a canvas from, as token ids; each behind the answer's own place."""

    answer: Sequence[int]  # the right answer, whole
    start: int  # where the canvas begins in it
    documents: Sequence[Sequence[int]]  # texts that the answer revises: a document of the prompt, an answer before
    other: Sequence[int]  # the answer to another question


class Mistakes:
    """Makes drafts in one tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        found = [[tokenizer.token_to_id(word) for word in kind] for kind in _KINDS]
        self._kinds = [[token for token in kind if token is not None] for kind in found]
        self._kind_of = {token: index for index, kind in enumerate(self._kinds) for token in kind}

    def draft(self, sources: Sources, length: int, rng: random.Random) -> list[int]:
        """`length` ids in the place of the right canvas; sometimes they are right."""
        way = rng.random()
        if sources.documents and way < 0.5:
            ids = [*continuation(rng.choice(sources.documents), sources.answer[: sources.start])]
        elif way < 0.9:
            ids = self._changed(list(sources.answer[sources.start : sources.start + length]), rng)
        else:
            ids = list(sources.other[sources.start :])
        return (ids + [0] * length)[:length]

    def _changed(self, ids: list[int], rng: random.Random) -> list[int]:
        places = [place for place, token in enumerate(ids) if token in self._kind_of]
        way = rng.random()
        if way < _NONE or not places:
            return ids
        if way < _NONE + _SWAPPED:
            first = rng.choice(places)
            second = rng.choice([place for place in places if self._kind_of[ids[place]] == self._kind_of[ids[first]]])
            ids[first], ids[second] = ids[second], ids[first]
            return ids
        if way < _NONE + _SWAPPED + _SHIFTED:
            place = rng.choice(places)
            return ids[:place] + ids[place + 1 :] if rng.random() < 0.5 else [*ids[:place], ids[place], *ids[place:]]
        count = min(len(places), 1 + int(rng.expovariate(1 / (_MEAN_CHANGES - 0.5))))
        present = list(dict.fromkeys(ids))
        for place in rng.sample(places, count):
            kind = self._kind_of[ids[place]]
            near = [token for token in present if self._kind_of.get(token) == kind]
            ids[place] = rng.choice(near if rng.random() < 0.5 else self._kinds[kind])
        return ids


def continuation(document: Sequence[int], tail: Sequence[int], longest: int = 8) -> Sequence[int]:
    """What follows the last place in `document` that reads most like `tail`; all of it where there is no tail."""
    if not tail:
        return document
    best, best_end = 0, min(len(tail), len(document))
    for end in range(1, len(document) + 1):
        same = 0
        while same < min(longest, end, len(tail)) and document[end - 1 - same] == tail[-1 - same]:
            same += 1
        if same >= max(best, 1):
            best, best_end = same, end
    return document[best_end:]
