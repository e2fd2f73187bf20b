"""The guess that an answer begins as the announced document does."""

from __future__ import annotations

import numpy as np
import pytest

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.drafting.lookup import MIN_STRENGTH
from dgemma_runtime.drafting.opening import LONGEST_INSTRUCTION, opening
from dgemma_runtime.drafting.proposal import NOTHING, Proposal

END, CANVAS = 0, 40
DOCUMENT = "a document of words"


def ids(text: str) -> Int32Array:
    """A token a character; `|` ends a turn."""
    return np.array([END if character == "|" else ord(character) for character in text], np.int32)


def proposed(prompt: str, canvas_length: int = CANVAS) -> Proposal | None:
    return opening(ids(prompt), canvas_length, (END, 7), chr)


def text_of(proposal: Proposal) -> str:
    return "".join("|" if token_id == END else chr(token_id) for token_id in proposal.token_ids if token_id != NOTHING)


@pytest.mark.parametrize(
    "prompt",
    [
        f"user\nFix this:\n{DOCUMENT}|\nmodel\n",
        f"user\nFix this: \n\n{DOCUMENT}|\nmodel\n",
        f"user\nPlease\nfix\nthis:\n{DOCUMENT}|\nmodel\n",
        f"system\nBe terse:\nvery, very, very terse|\nuser\nFix this:\n{DOCUMENT}|\nmodel\n",
        f"user\nFix that:\nanother document|\nmodel\nDone:\nanother one|\nuser\nNow this:\n{DOCUMENT}|\nmodel\n",
    ],
)
def test_the_document_behind_the_colon(prompt: str) -> None:
    proposal = proposed(prompt)
    assert proposal is not None
    assert text_of(proposal) == DOCUMENT + "|"
    assert len(proposal.token_ids) == CANVAS
    assert ((proposal.confidences > 0) == (proposal.token_ids != NOTHING)).all()


def test_as_much_of_it_as_a_canvas_holds() -> None:
    proposal = proposed(f"user\nFix this:\n{DOCUMENT}|\nmodel\n", 10)
    assert proposal is not None
    assert text_of(proposal) == DOCUMENT[:10]


def test_a_colon_within_the_document_begins_nothing() -> None:
    proposal = proposed(f"user\nFix this:\n{DOCUMENT}:\n{DOCUMENT}|\nmodel\n", 80)
    assert proposal is not None
    assert text_of(proposal) == f"{DOCUMENT}:\n{DOCUMENT}|"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Fix this:\n" + DOCUMENT,  # no turn ends
        f"user\nFix this: {DOCUMENT}|\nmodel\n",  # no line ends there
        f"user\nHow are you?\n{DOCUMENT}|\nmodel\n",
        "user\nFix this:\n|\nmodel\n",
        f"user\nFix this:\n{'x' * (MIN_STRENGTH - 1)}|\nmodel\n",
        f"user\nFix this:\n{DOCUMENT}|\nmodel\nDone|\nuser\nThank you for all of that|\nmodel\n",
        f"user\n{'x' * LONGEST_INSTRUCTION}:\n{DOCUMENT}|\nmodel\n",
    ],
)
def test_nothing_is_announced(prompt: str) -> None:
    assert proposed(prompt) is None
