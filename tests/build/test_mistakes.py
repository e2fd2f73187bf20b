"""Drafts with mistakes: as long as a canvas, right where they should be, and wrong by tokens of the same kind."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dgemma_build.demo.mistakes import Mistakes, Sources, continuation

TOKENIZER = Path(__file__).parents[2] / "build" / "checkpoints" / "demo" / "tokenizer.json"
WIDTH = 32


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def test_a_draft_without_documents_is_the_answer_with_a_few_tokens_of_the_same_kind_wrong(tokenizer: Tokenizer) -> None:
    mistakes, rng = Mistakes(tokenizer), random.Random(0)
    answer = ids(tokenizer, "| Ada | 36 | Lima |\n| Bo | 71 | Oslo |<turn|>")
    answer += [0] * (WIDTH - len(answer))
    other = ids(tokenizer, "| Eve | 5 |<turn|>")
    drafts = [mistakes.draft(Sources(answer, 0, [], other), WIDTH, rng) for _ in range(400)]
    assert all(len(draft) == WIDTH for draft in drafts)
    right = sum(draft == answer for draft in drafts)
    foreign = sum(draft[: len(other)] == other for draft in drafts)
    assert 20 < right < 120
    assert 20 < foreign < 70
    words = {tokenizer.token_to_id(word) for word in ("Ada", "Bo", "Lima", "Oslo", *"0123456789")}
    for draft in drafts:
        changed = [place for place in range(WIDTH) if draft[place] != answer[place]]
        if len(changed) <= 2:
            assert all(answer[place] in words and draft[place] != 0 for place in changed)
    assert sum(0 < sum(a != b for a, b in zip(draft, answer, strict=True)) <= 4 for draft in drafts) > 150


def test_a_document_that_is_revised_is_half_of_the_drafts_from_where_the_answer_goes_on(tokenizer: Tokenizer) -> None:
    document = ids(tokenizer, "| Ada | 36 |\n| Bo | 71 |\n| Eve | 9 |<turn|>")
    answer = ids(tokenizer, "| Ada | 36 |\n| Bo | 72 |\n| Eve | 9 |<turn|>")
    answer += [0] * (2 * WIDTH - len(answer))
    start = answer.index(ids(tokenizer, "\n")[0])
    rng, mistakes = random.Random(1), Mistakes(tokenizer)
    expected = (document[start:] + [0] * WIDTH)[:WIDTH]
    drafts = [mistakes.draft(Sources(answer, start, [document], answer), WIDTH, rng) for _ in range(200)]
    assert 70 < drafts.count(expected) < 130


def test_continuation_follows_the_longest_likeness_and_the_last_of_equals() -> None:
    document = [1, 2, 3, 4, 1, 2, 9, 8]
    assert continuation(document, []) == document
    assert continuation(document, [5, 1, 2]) == [9, 8]
    assert continuation(document, [7, 1, 2, 3]) == [4, 1, 2, 9, 8]
    assert continuation(document, [4, 1, 2]) == [9, 8]
    assert continuation(document, [6, 6]) == [3, 4, 1, 2, 9, 8], "nothing alike: the same distance from the start"
