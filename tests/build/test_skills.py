"""The demo's skills: generators and checkers agree, checkers refuse wrong answers, the splits share nothing."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from dgemma_build.demo.revisions import check_fix, check_rename
from dgemma_build.demo.skills import (
    HOLE,
    TASKS,
    check_infill,
    check_json,
    check_sudoku,
    check_table,
    draw,
    held_out_set,
    is_held_out,
    solve_sudoku,
)


@pytest.mark.parametrize("skill", sorted(TASKS))
def test_the_generated_answer_is_right_and_others_are_not(skill: str) -> None:
    rng = random.Random(1)
    examples = [draw(skill, rng, held_out=False) for _ in range(50)]
    check = TASKS[skill].check
    for example, other in pairwise(examples):
        assert check(example.prompt, example.answer)
        assert not check(example.prompt, "")
        assert not check(example.prompt, example.answer[:-2])
        if skill != "infill" and other.answer != example.answer:  # two prompts may share a line of code
            assert not check(example.prompt, other.answer)


@pytest.mark.parametrize("skill", sorted(TASKS))
def test_the_splits_share_no_prompt(skill: str) -> None:
    held_out = {example.prompt for example in held_out_set(skill, 40)}
    assert len(held_out) == 40
    assert all(is_held_out(prompt) for prompt in held_out)
    rng = random.Random(2)
    assert not held_out & {draw(skill, rng, held_out=False).prompt for _ in range(300)}


def test_the_held_out_set_is_always_the_same_and_a_prefix_of_a_longer_one() -> None:
    assert held_out_set("json", 20) == held_out_set("json", 20) == held_out_set("json", 30)[:20]


def test_every_sudoku_has_one_solution() -> None:
    rng = random.Random(3)
    for skill, side in (("sudoku4", 4), ("sudoku6", 6)):
        for _ in range(10):
            rows = draw(skill, rng, held_out=True).prompt.split("\n")[1:]
            grid = [0 if char == "_" else int(char) for row in rows for char in row]
            assert grid.count(0) >= 4
            assert len(solve_sudoku(grid, side, limit=3)) == 1


def test_sudoku_checker_wants_the_clues_kept() -> None:
    prompt = "Solve this 4x4 sudoku:\n1_3_\n34__\n_14_\n432_"
    solution = "1234\n3412\n2143\n4321"
    assert check_sudoku(prompt, solution)
    assert not check_sudoku(prompt, "2134\n3412\n1243\n4321")


def test_json_checker_wants_types_and_order() -> None:
    prompt = "Convert to JSON:\nage: 36\nname: Ada\ndone: true"
    assert check_json(prompt, '{"age": 36, "name": "Ada", "done": true}')
    assert not check_json(prompt, '{"age": "36", "name": "Ada", "done": true}')
    assert not check_json(prompt, '{"age": 36, "name": "Ada", "done": 1}')
    assert not check_json(prompt, '{"name": "Ada", "age": 36, "done": true}')
    assert not check_json(prompt, '{"age": 36, "name": "Ada", "done": true')


def test_table_checker_wants_every_cell() -> None:
    prompt = "Convert to a table:\nitem,size\npen,4\ncup,12"
    assert check_table(prompt, "| item | size |\n|---|---|\n| pen | 4 |\n| cup | 12 |")
    assert not check_table(prompt, "| item | size |\n|---|---|\n| pen | 4 |")
    assert not check_table(prompt, "| item | size |\n| pen | 4 |\n| cup | 12 |")
    assert not check_table(prompt, "| item | size |\n|---|---|\n| pen | 4 |\n| cup | 21 |")


def test_infill_checker_runs_the_code_and_accepts_another_way_to_say_it() -> None:
    prompt = f"Fill in the middle:\ndef double(n):\n    {HOLE}\n    return out"
    assert check_infill(prompt, "out = n * 2")
    assert check_infill(prompt, "out = n + n")
    assert not check_infill(prompt, "out = n * 3")
    assert not check_infill(prompt, "out = m * 2")
    assert not check_infill(prompt, "out = n *")


@pytest.mark.parametrize(
    "answer", ["out = __import__('os').getpid()", "out = n ** 9 ** 9", "while 1: pass", "import os"]
)
def test_infill_checker_runs_nothing_but_arithmetic(answer: str) -> None:
    assert not check_infill(f"Fill in the middle:\ndef double(n):\n    {HOLE}\n    return out", answer)


def test_rename_checker_wants_the_key_renamed_everywhere_and_nothing_else_touched() -> None:
    document = '[{"age": 36, "to": "Lima"},\n{"age": 7, "to": "Oslo"}]'
    prompt = f'Rename the key "age" to "years":\n{document}'
    right = document.replace("age", "years")
    assert check_rename(prompt, right)
    assert check_rename(prompt, right + "\n")
    for wrong in (
        document,
        right.replace("years", "age", 1),
        right.replace("36", "63"),
        right.replace('"to"', '"from"'),
        right.replace("\n", " "),
        '[{"to": "Lima", "years": 36},\n{"to": "Oslo", "years": 7}]',
    ):
        assert not check_rename(prompt, wrong)
    assert not check_rename(document, right)


def test_fix_checker_wants_one_cell_changed() -> None:
    table = "| name | city | price |\n|---|---|---|\n| Eve | Oslo | 12 |\n| Bo | Lima | 12 |"
    prompt = f"Change Bo to Max:\n{table}"
    assert check_fix(prompt, table.replace("Bo", "Max"))
    for wrong in (table, table.replace("Eve", "Max"), table.replace("Bo", "Ada"), table.replace("Lima", "Max")):
        assert not check_fix(prompt, wrong)
    assert not check_fix(table, table)
