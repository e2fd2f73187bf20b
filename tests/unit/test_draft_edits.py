"""Copies with edits: what is followed across them, what is done again."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting.edits import LONGEST_EDIT, LOOK_BACK, Copy, Edit, carry_on, look_ahead, look_back
from dgemma_runtime.drafting.lookup import propose

OLD, CANVAS = 7, 16


def ids(values: object) -> Int32Array:
    return np.array(values, np.int32).reshape(-1)


def document(records: int, width: int = 12) -> list[int]:
    """Records of a token that all share, at one place, among tokens of their own."""
    return [OLD if i == 5 else 100 + width * record + i for record in range(records) for i in range(width)]


def renamed(tokens: list[int], new: list[int]) -> list[int]:
    return [token for old in tokens for token in (new if old == OLD else [old])]


def went_on(source: list[int], copy: Copy, count: int) -> list[int]:
    return list(islice(carry_on(ids(source), copy, count), count))


def test_a_plain_copy() -> None:
    source = list(range(100, 150))
    copy = look_back(ids(source), 20, ids([1, 2, *source[:20]]))
    assert copy == Copy(place=20, run=20, agreed=20, edits=0)
    assert went_on(source, copy, 5) == source[20:25]


@pytest.mark.parametrize("new", [[], [8], [8, 9, 10], list(range(8, 8 + LONGEST_EDIT))])
def test_one_edit_is_crossed(new: list[int]) -> None:
    source = list(range(100, 150))
    copy = look_back(ids(source), 30, ids([*source[:12], *new, *source[14:30]]))
    assert copy == Copy(place=30, run=16, agreed=28, edits=1)
    assert copy.strength == 16


def test_a_longer_edit_ends_it() -> None:
    source = list(range(100, 150))
    copy = look_back(ids(source), 30, ids([*source[:12], *range(1, LONGEST_EDIT + 2), *source[12:30]]))
    assert copy == Copy(place=30, run=18, agreed=18, edits=0)


def test_no_more_is_compared_than_the_limit() -> None:
    text = ids(range(2000))
    assert look_back(text, 2000, text).agreed == LOOK_BACK


@pytest.mark.parametrize("new", [[8], [8, 9], [8, 9, 10]])
def test_a_replacement_made_twice_is_made_again(new: list[int]) -> None:
    source = document(6)
    copy = look_back(ids(source), 20, ids(renamed(source[:20], new)))
    assert copy == Copy(20, run=18, agreed=18, edits=0, rules=(Edit((OLD,), tuple(new)),))
    assert went_on(source, copy, 30) == renamed(source[20:], new)[:30]


def test_a_replacement_made_once_is_not() -> None:
    source = document(6)
    copy = look_back(ids(source), 9, ids(renamed(source[:9], [8])))
    assert (copy.rules, copy.edits) == ((), 1)
    assert went_on(source, copy, 9) == source[9:18]


def test_what_is_put_in_without_taking_away_is_no_replacement() -> None:
    source = document(4)
    output = [token for old in source[:20] for token in ((old, 8) if old == OLD else (old,))]
    assert look_back(ids(source), 20, ids(output)).rules == ()


def test_ahead_through_an_edit() -> None:
    source = list(range(100, 150))
    copy = look_ahead(ids(source), Copy(10, run=10, agreed=10, edits=0), ids([110, 1, 2, *range(112, 118)]))
    assert copy == Copy(place=18, run=6, agreed=17, edits=1)


def test_ahead_into_a_replacement() -> None:
    source = document(6)
    rule = Edit((OLD,), (8, 9, 10))
    before = Copy(15, run=9, agreed=12, edits=0, rules=(rule,))
    copy = look_ahead(ids(source), before, ids([*source[15:17], 8]))
    assert copy is not None
    assert copy.pending == (9, 10)
    assert went_on(source, copy, 5) == [9, 10, *source[18:21]]


def test_ahead_where_the_output_goes_its_own_way() -> None:
    source = list(range(100, 150))
    assert look_ahead(ids(source), Copy(10, run=10, agreed=10, edits=0), ids([110, 1, 2, 3, 4])) is None


@given(st.integers(3, 8), st.integers(0, 60), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_renaming_goes_on_wherever_the_canvas_ends(records: int, more: int, new: list[int]) -> None:
    """Once it was made twice and four tokens have followed, every canvas is drafted as it will be."""
    source = document(records)
    answer = renamed(source, new)
    start = min(len(renamed(source[:22], new)) + more, len(answer) - 1)
    prompt = [50, 51, *source, 52, 53]
    proposal = propose(ids(prompt + answer[:start]), len(prompt), CANVAS)
    assert proposal is not None
    expected = [*answer, 52, 53][start : start + CANVAS]
    assert proposal.token_ids.tolist()[: len(expected)] == expected


@pytest.mark.parametrize("start", [22, 28, 29, 30, 31, 60])
def test_a_clients_draft_is_followed_as_the_prompt_is(start: int) -> None:
    source = document(8)
    answer = renamed(source, [8])
    proposal = propose(ids([50, 51, *answer[:start]]), 2, CANVAS, draft=ids(source))
    assert proposal is not None
    expected = answer[start : start + CANVAS]
    assert proposal.token_ids.tolist()[: len(expected)] == expected


tokens = st.lists(st.integers(0, 3), max_size=80)


@given(tokens, tokens, st.integers(0, 80), tokens)
def test_any_tokens_at_all(source: list[int], output: list[int], place: int, rest: list[int]) -> None:
    copy = look_back(ids(source), min(place, len(source)), ids(output))
    assert 0 <= copy.run <= copy.agreed <= len(output)
    assert copy.edits >= 0
    ahead = look_ahead(ids(source), copy, ids(rest))
    if ahead is not None:
        assert copy.place <= ahead.place <= len(source)
        assert set(went_on(source, ahead, CANVAS)) <= {*source, *output, *rest}
