"""Chats of two turns for the demo's skills: a task, and the same kind of task again with one thing changed."""

from __future__ import annotations

import random
from collections.abc import Callable

from dgemma_build.demo.records import FIELDS, Example
from dgemma_build.demo.revisions import again_fix, again_rename
from dgemma_build.demo.skills import TASKS, draw, is_held_out, json_example, table_example

Again = Callable[[Example, random.Random], Example]


def _again_json(first: Example, rng: random.Random) -> Example:
    lines = [(key, value) for key, value in (line.split(": ", 1) for line in first.prompt.split("\n")[1:])]
    place = rng.randrange(len(lines))
    key = lines[place][0]
    lines[place] = (key, FIELDS[key](rng))
    return json_example(lines)


def _again_table(first: Example, rng: random.Random) -> Example:
    header, *rows = (line.split(",") for line in first.prompt.split("\n")[1:])
    column = rng.randrange(len(header))
    rng.choice(rows)[column] = FIELDS[header[column]](rng)
    return table_example(header, rows)


# Of the other skills, another example altogether: their answers are new however little of the question changes.
_AGAIN: dict[str, Again] = {
    "json": _again_json,
    "table": _again_table,
    "rename": again_rename,
    "fix": again_fix,
}


def draw_chat(skill: str, rng: random.Random, held_out: bool) -> tuple[Example, Example]:
    """Two different tasks of one skill; the second is of the asked split, the first may always be trained on."""
    while True:
        first = draw(skill, rng, held_out=False)
        second = _AGAIN[skill](first, rng) if skill in _AGAIN else TASKS[skill].make(rng)
        if second.prompt != first.prompt and is_held_out(second.prompt) == held_out:
            return first, second


def held_out_chats(skill: str, count: int, seed: int = 20261122) -> list[tuple[Example, Example]]:
    """`count` chats of `skill` with different held-out second tasks, always the same for one seed."""
    rng = random.Random(f"{seed}:{skill}")
    seen: dict[str, tuple[Example, Example]] = {}
    while len(seen) < count:
        chat = draw_chat(skill, rng, held_out=True)
        seen.setdefault(chat[1].prompt, chat)
    return list(seen.values())
