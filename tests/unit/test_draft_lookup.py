"""Prompt lookup beside a search by hand, on texts of every kind."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting.lookup import (
    MAX_MATCH,
    MIN_MATCH,
    MIN_STRENGTH,
    Match,
    confidences,
    longest_match,
    propose,
)
from dgemma_runtime.drafting.proposal import NOTHING

CANVAS = 16
END = 99
LINE = list(range(1, MIN_STRENGTH + 1))


def ids(values: object) -> Int32Array:
    return np.array(values, np.int32).reshape(-1)


def by_hand(corpus: list[int], text: list[int], most: int) -> Match | None:
    """Every place and every length, the longest and then the latest first."""
    for length in range(min(most, len(text), len(corpus)), 0, -1):
        for end in range(len(corpus) - 1, length - 1, -1):
            if corpus[end - length : end] == text[-length:]:
                return Match(end, length)
    return None


few_tokens = st.lists(st.integers(0, 2), max_size=60)
repeats = st.builds(lambda unit, times, rest: unit * times + rest, few_tokens, st.integers(0, 5), few_tokens)
texts = st.one_of(few_tokens, repeats)


@given(texts, st.sampled_from([1, 3, MAX_MATCH]))
def test_the_longest_and_latest_match_in_the_text_itself(text: list[int], most: int) -> None:
    assert longest_match(ids(text), ids(text), most) == by_hand(text, text, most)


@given(texts, texts)
def test_the_longest_and_latest_match_in_another_text(corpus: list[int], text: list[int]) -> None:
    assert longest_match(ids(corpus), ids(text)) == by_hand(corpus, text, MAX_MATCH)


@given(texts)
def test_what_is_proposed_followed_the_match(text: list[int]) -> None:
    proposal, match = propose(ids(text), 0, CANVAS), by_hand(text, text, MAX_MATCH)
    if match is None or match.length < MIN_STRENGTH:
        assert proposal is None
        return
    assert proposal is not None
    expected = list(text)
    for index in range(CANVAS):
        expected.append(expected[match.end + index])
    assert proposal.token_ids.tolist() == expected[len(text) :]
    assert proposal.source == "lookup"


@pytest.mark.parametrize("text", [[], [5], [5, 5], LINE, [*LINE[1:], 50, *LINE[1:]]])
def test_too_little_is_repeated(text: list[int]) -> None:
    assert propose(ids(text), 0, CANVAS) is None


def test_what_followed_the_end_of_the_text_before() -> None:
    proposal = propose(ids([*LINE, 50, 51, 52, *LINE]), 0, 5)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [50, 51, 52, 1, 2]


def test_the_latest_of_equal_matches() -> None:
    proposal = propose(ids([*LINE, 50, *LINE, 60, *LINE]), 0, 1)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [60]


def test_the_longest_match_before_the_latest() -> None:
    proposal = propose(ids([9, *LINE, 50, *LINE, 60, 9, *LINE]), 0, 1)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [50]


def test_a_period_goes_on() -> None:
    proposal = propose(ids([8, 9, *[1, 2, 3] * 7]), 0, 8)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_one_token_throughout_a_long_text() -> None:
    proposal = propose(np.full(100_000, 7, np.int32), 0, CANVAS)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [7] * CANVAS


def test_every_word_of_a_few_letters_once() -> None:
    """A de Bruijn sequence: no word of its order occurs twice, all shorter ones do."""
    order, letters = 6, 4
    sequence = de_bruijn(letters, order)
    assert len(sequence) == letters**order
    found = longest_match(ids(sequence), ids(sequence))
    assert found is not None
    assert found.length == order - 1
    assert found == by_hand(sequence, sequence, MAX_MATCH)


def de_bruijn(letters: int, order: int) -> list[int]:
    """All Lyndon words whose length divides the order, in order."""
    words = []
    for length in (n for n in range(1, order + 1) if order % n == 0):
        for word in product(range(letters), repeat=length):
            if all(word < word[i:] + word[:i] for i in range(1, length)):
                words.append(word)
    return [letter for word in sorted(words) for letter in word]


@pytest.mark.parametrize(
    "text",
    [
        [7] * 500,
        [1, 7] * 400 + [7],
        [1, 2, 7] * 300 + [9] + [1, 2, 7] * 20,
        np.random.default_rng(0).integers(0, 2, 3000).tolist(),
    ],
)
def test_many_places(text: list[int]) -> None:
    """More than are compared one by one."""
    assert longest_match(ids(text), ids(text)) == by_hand(text, text, MAX_MATCH)


def test_a_match_counts_up_to_the_limit() -> None:
    text = ids([*range(200), *range(200)])
    assert longest_match(text, text) == Match(200, MAX_MATCH)
    assert longest_match(text, text, 200) == Match(200, 200)


def test_nothing_is_proposed_behind_an_end_token() -> None:
    proposal = propose(ids([*LINE, 50, END, 51, *LINE]), 0, CANVAS, end_ids=(98, END))
    assert proposal is not None
    assert proposal.token_ids.tolist() == [50, END] + [NOTHING] * (CANVAS - 2)
    assert (proposal.confidences > 0).tolist() == [True, True] + [False] * (CANVAS - 2)


def test_the_clients_draft_wins_while_it_is_copied() -> None:
    text, draft = ids([7, *LINE, 50, 7, *LINE]), ids([*LINE, 60, 61])
    proposal = propose(text, 0, 4, draft=draft)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [60, 61, NOTHING, NOTHING]
    assert proposal.source == "client"


def test_the_clients_draft_wins_ties() -> None:
    text, draft = ids([*LINE, 50, *LINE]), ids([*LINE, 60, 61])
    proposal = propose(text, 0, 4, draft=draft)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [60, 61, NOTHING, NOTHING]


def test_a_strong_match_in_the_text_wins_over_a_weak_one_with_the_clients_draft() -> None:
    text, draft = ids([*LINE, 50, *LINE]), ids([*LINE[-MIN_MATCH:], 60, 61])
    proposal = propose(text, 0, 1, draft=draft)
    assert proposal is not None
    assert proposal.token_ids.tolist() == [50]
    assert proposal.source == "lookup"


def test_the_draft_alone_where_nothing_else_may_be_looked_at() -> None:
    text, draft = ids([*LINE, 50, *LINE]), ids([*LINE[-MIN_MATCH:], 60, 61])
    proposal = propose(text, 0, 1, draft=draft, own=False)
    assert proposal is not None
    assert (proposal.token_ids.tolist(), proposal.source) == ([60], "client")
    assert propose(text, 0, 1, own=False) is None


def test_the_clients_draft_where_the_text_repeats_nothing() -> None:
    proposal = propose(ids([20, 21, 1, 2, 3, 4]), 0, 2, draft=ids([1, 2, 3, 4, 60, 61]))
    assert proposal is not None
    assert proposal.token_ids.tolist() == [60, 61]


def test_a_draft_that_is_at_its_end() -> None:
    draft = ids([*LINE, 30, 31, 32, 33, 34, 35, 36, 37])
    assert propose(ids([20, 21, *draft]), 2, CANVAS, draft=draft) is None


def test_a_draft_that_has_nothing_to_do_with_the_text() -> None:
    assert propose(ids([20, 21, 22, 23, 24]), 0, 2, draft=ids([1, 2, 3, 4, 60])) is None
    assert propose(ids([20, 21, 22, 23, 24]), 0, 2, draft=ids([])) is None


@given(st.integers(MIN_MATCH, 500), st.integers(2, 256))
def test_confidence_rises_with_the_match_and_falls_with_distance(length: int, count: int) -> None:
    values = confidences(length, count)
    assert ((values > 0) & (values < 1)).all()
    assert (np.diff(values) < 0).all()
    assert (confidences(length + 1, count) > values).all()


def test_confidences_are_laid_along_the_proposal() -> None:
    proposal = propose(ids([*LINE, 50, 51, 52, *LINE]), 0, CANVAS)
    assert proposal is not None
    assert proposal.confidences.tolist() == confidences(MIN_STRENGTH, CANVAS).tolist()
