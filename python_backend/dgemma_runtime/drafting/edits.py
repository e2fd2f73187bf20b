"""Follows an output that copies a source and edits it on the way. Knows token ids, no canvas and no request.

A suffix match ends at the last edit, and right behind an edit there is nothing to match. So the copy is followed back
across its edits, to see how much of it agrees, and which replacement it makes again and again: a name that is renamed
will be renamed in what comes, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import Int32Array

LONGEST_EDIT = 8  # tokens, taken away or put in
LOOK_BACK = 512  # tokens of the output that are compared
_IN_STEP = 3  # tokens behind or before an edit that must agree
_SEEN = 2  # times that a replacement must have been made to be made again
_GAPS = sorted(  # tokens that an edit has put in, and taken away: the smallest edits first
    ((put, taken) for put in range(LONGEST_EDIT + 1) for taken in range(LONGEST_EDIT + 1) if put or taken),
    key=lambda gap: (sum(gap), abs(gap[0] - gap[1])),
)


@dataclass(frozen=True)
class Edit:
    """A replacement."""

    old: tuple[int, ...]  # in the source
    new: tuple[int, ...]  # in the output


@dataclass(frozen=True)
class Copy:
    """How an output copied a source."""

    place: int  # index in the source of what comes next
    run: int  # tokens that agree since the last edit of another kind than `rules`
    agreed: int  # tokens that agree, edits aside
    edits: int  # other than of `rules`
    rules: tuple[Edit, ...] = ()  # replacements made again and again
    pending: tuple[int, ...] = ()  # the rest of a replacement that the output ends in

    @property
    def strength(self) -> int:
        """Tokens that agree from one edit to the next, on average, or since the last one."""
        return max(self.run, self.agreed // (1 + self.edits))


def look_back(source: Int32Array, place: int, output: Int32Array) -> Copy:
    """How the output [n], whose next token would be the source's at `place`, came there."""
    at, end = place, len(output)
    runs: list[int] = []
    edits: list[Edit] = []
    while True:
        runs.append(_common(source[:at][::-1], output[:end][::-1]))
        at, end = at - runs[-1], end - runs[-1]
        if sum(runs) >= LOOK_BACK or len(edits) == LOOK_BACK // _IN_STEP:
            break
        gap = _gap(output[:end][::-1], source[:at][::-1])
        if gap is None:
            break
        put, taken = gap
        edits.append(Edit(tuple(source[at - taken : at].tolist()), tuple(output[end - put : end].tolist())))
        at, end = at - taken, end - put
    rules = {edit: count for edit, count in Counter(edits).items() if count >= _SEEN and edit.old}
    run = runs[0]
    for edit, before in zip(edits, runs[1:], strict=False):  # where the look back ends, an edit has no run before it
        if edit not in rules:
            break
        run += before
    return Copy(place, run, sum(runs), len(edits) - sum(rules.values()), tuple(rules))


def look_ahead(source: Int32Array, copy: Copy, rest: Int32Array) -> Copy | None:
    """The same copy after `rest` [n] more tokens of the output; None where they are not a copy."""
    place, run, agreed, edits = copy.place, copy.run, copy.agreed, copy.edits
    while True:
        common = _common(source[place:], rest)
        place, run, agreed, rest = place + common, run + common, agreed + common, rest[common:]
        if not len(rest):
            return Copy(place, run, agreed, edits, copy.rules)
        if (rule := _begun(copy.rules, source[place:], rest)) is not None:
            place += len(rule.old)
            if len(rest) < len(rule.new):
                return Copy(place, run, agreed, edits, copy.rules, rule.new[len(rest) :])
            rest = rest[len(rule.new) :]
            continue
        gap = _gap(rest, source[place:])
        if gap is None:
            return None
        place, run, rest, edits = place + gap[1], 0, rest[gap[0] :], edits + 1


def carry_on(source: Int32Array, copy: Copy, count: int) -> Iterator[int]:
    """What comes next if the copy goes on as before, with its replacements: `count` tokens or a little more, or less
    where the source ends.
    """
    yield from copy.pending
    ahead = source[copy.place : copy.place + LONGEST_EDIT * count].tolist()
    index = 0
    while index < len(ahead):
        rule = next((rule for rule in copy.rules if tuple(ahead[index : index + len(rule.old)]) == rule.old), None)
        if rule is None:
            yield ahead[index]
            index += 1
        else:
            yield from rule.new
            index += len(rule.old)


def _common(first: Int32Array, second: Int32Array) -> int:
    """Tokens in which both begin alike, LOOK_BACK at most."""
    length = min(len(first), len(second), LOOK_BACK)
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def _gap(output: Int32Array, source: Int32Array) -> tuple[int, int] | None:
    """How many tokens of either, both read away from an edit, are the edit; None where they do not meet again."""
    most = LONGEST_EDIT + _IN_STEP
    out, src = output[:most].tolist(), source[:most].tolist()
    for put, taken in _GAPS:
        in_step = out[put : put + _IN_STEP]
        if len(in_step) == _IN_STEP and in_step == src[taken : taken + _IN_STEP]:
            return put, taken
    return None


def _begun(rules: Sequence[Edit], source: Int32Array, output: Int32Array) -> Edit | None:
    """The rule whose old tokens the source has here, and whose new ones the output has, as far as it goes."""
    for rule in rules:
        common = min(len(rule.new), len(output))
        replaced = np.array_equal(source[: len(rule.old)], rule.old)
        if replaced and np.array_equal(output[:common], rule.new[:common]):
            return rule
    return None
