"""Second turns of the demo's skills: right, of the asked split, and near the first where the task is to revise."""

from __future__ import annotations

import random
from difflib import SequenceMatcher

import pytest

from dgemma_build.demo.records import JOBS, Example, markdown_table
from dgemma_build.demo.revisions import again_fix
from dgemma_build.demo.skills import TASKS, is_held_out
from dgemma_build.demo.turns import draw_chat, held_out_chats


@pytest.mark.parametrize("skill", sorted(TASKS))
@pytest.mark.parametrize("held_out", [True, False])
def test_both_turns_have_right_answers_and_the_second_is_of_the_asked_split(skill: str, held_out: bool) -> None:
    rng = random.Random(4)
    for _ in range(20):
        first, second = draw_chat(skill, rng, held_out)
        assert first.prompt != second.prompt
        assert first.skill == second.skill == skill
        assert not is_held_out(first.prompt)
        assert is_held_out(second.prompt) == held_out
        assert all(TASKS[skill].check(turn.prompt, turn.answer) for turn in (first, second))


@pytest.mark.parametrize("skill", ["fix", "json", "rename", "table"])
def test_the_second_answer_is_the_first_with_little_changed(skill: str) -> None:
    chats = held_out_chats(skill, 20)
    likeness = [SequenceMatcher(a=a.answer, b=b.answer, autojunk=False).ratio() for a, b in chats]
    assert sorted(likeness)[len(likeness) // 4] > 0.8


def test_a_table_with_every_word_of_its_field_cannot_be_fixed() -> None:
    table = markdown_table(["job"], [[job] for job in JOBS])
    first = Example("fix", f"Change baker to cook:\n{table}", table)
    assert again_fix(first, random.Random(0)) is first, "no word is left, and draw_chat draws again"


def test_held_out_chats_are_always_the_same() -> None:
    assert held_out_chats("fix", 5) == held_out_chats("fix", 8)[:5]
