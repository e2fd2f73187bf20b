"""Canvases completed from the text that they copy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting.anchors import REACH, complete
from dgemma_runtime.drafting.proposal import NOTHING, BoolArray

CANVAS, ANYTHING = 24, 5
SOURCE = list(range(100, 160))


def ids(values: object) -> Int32Array:
    return np.array(values, np.int32).reshape(-1)


def step(answer: list[int], known: list[int]) -> tuple[Int32Array, BoolArray]:
    """A step's argmax that is certain, and right, at the known positions only."""
    certain = np.isin(np.arange(len(answer)), known)
    return np.where(certain, answer, ANYTHING).astype(np.int32), certain


def test_what_lies_between_certain_tokens() -> None:
    proposal = complete(ids([7, 8, *SOURCE, 9]), *step(SOURCE[:CANVAS], [4, 5, 10, 11, 16, 17]))
    assert proposal is not None
    assert proposal.token_ids[4:18].tolist() == SOURCE[4:18]
    assert (proposal.confidences[4:18] >= 0.5).all()
    assert proposal.source == "lookup"


def test_it_reaches_so_far_and_fades() -> None:
    proposal = complete(ids(SOURCE), *step(SOURCE[20 : 20 + CANVAS], [10, 11, 12]))
    assert proposal is not None
    proposed = np.flatnonzero(proposal.token_ids != NOTHING)
    assert (proposed.min(), proposed.max()) == (10 - REACH, 12 + REACH)
    assert (np.diff(proposal.confidences[12:]) <= 0).all()
    assert ((proposal.confidences > 0) == (proposal.token_ids != NOTHING)).all()


def test_behind_an_edit_the_copy_goes_on_elsewhere() -> None:
    answer = [*SOURCE[:8], 1, 2, 3, *SOURCE[9:]][:CANVAS]
    known = [2, 3, 5, 6, 8, 9, 10, 13, 14, 18, 19]
    proposal = complete(ids(SOURCE), *step(answer, known))
    assert proposal is not None
    assert proposal.token_ids[2:7].tolist() == answer[2:7]
    assert proposal.token_ids[8:11].tolist() == [NOTHING] * 3
    assert proposal.token_ids[13:20].tolist() == answer[13:20]


@pytest.mark.parametrize("known", [[], [3], [3, 5, 7, 9], [3, 4]])
def test_too_little_is_certain(known: list[int]) -> None:
    """No neighbours, or only one pair."""
    assert complete(ids(SOURCE), *step(SOURCE[:CANVAS], known)) is None


@pytest.mark.parametrize("text", [[], [100], list(range(500, 600))])
def test_a_text_without_it(text: list[int]) -> None:
    assert complete(ids(text), *step(SOURCE[:CANVAS], list(range(CANVAS)))) is None


def test_one_token_throughout() -> None:
    assert complete(np.full(100_000, 7, np.int32), np.full(CANVAS, 7, np.int32), np.ones(CANVAS, np.bool_)) is None


tokens = st.lists(st.integers(0, 5), max_size=80)
canvases = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=CANVAS)


@given(tokens, canvases)
def test_any_tokens_at_all(text: list[int], canvas: list[tuple[int, bool]]) -> None:
    """A certain token is never contradicted, and all that is proposed stands in the text."""
    argmax, certain = ids([token for token, _ in canvas]), np.array([sure for _, sure in canvas], np.bool_)
    proposal = complete(ids(text), argmax, certain)
    if proposal is None:
        return
    proposed = proposal.token_ids != NOTHING
    assert set(proposal.token_ids[proposed].tolist()) <= set(text)
    assert (proposal.token_ids == argmax)[proposed & certain].all()
    assert ((proposal.confidences >= 0) & (proposal.confidences < 1)).all()
    assert ((proposal.confidences > 0) == proposed).all()
