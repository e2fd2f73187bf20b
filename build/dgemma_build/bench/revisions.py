"""Tasks for measuring drafts: the demo's held-out skills, and chats that ask for a text again with one change.

Knows no service. A task is a chat and a checker of its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dgemma_build.demo.skills import FIELDS, SKILLS, draw, held_out_set, is_held_out

EDITING_SKILLS = ("rename", "fix")  # whose answers repeat most of their prompts
SECOND_TURNS = ("json", "table")  # skills whose answers can be asked for again


@dataclass(frozen=True)
class Task:
    """One chat that waits for an answer."""

    messages: tuple[tuple[str, str], ...]  # role and content
    check: Callable[[str], bool]  # whether an answer is right
    answer: str  # a right one; "" where only the checker knows

    def chat(self) -> list[dict[str, str]]:
        """As chat templates take it."""
        return [{"role": role, "content": content} for role, content in self.messages]


def skill_tasks(skill: str, count: int) -> list[Task]:
    """Held-out prompts of a skill of the demo."""
    return [
        Task((("user", example.prompt),), partial(SKILLS[skill].check, example.prompt), example.answer)
        for example in held_out_set(skill, count)
    ]


def second_turns(skill: str, count: int) -> list[Task]:
    """A record or table was converted; the same with one value changed is to be. Always the same tasks."""
    rng = random.Random(f"second turn:{skill}")
    tasks: list[Task] = []
    while len(tasks) < count:
        first = draw(skill, rng, held_out=True)
        changed = _CHANGES[skill](first.prompt, rng)
        if is_held_out(changed):
            turns = (("user", first.prompt), ("assistant", first.answer), ("user", changed))
            tasks.append(Task(turns, partial(SKILLS[skill].check, changed), ""))
    return tasks


def revisions(count: int) -> dict[str, list[Task]]:
    """`count` tasks of every kind whose answers repeat most of what stands in the chat."""
    turns = {f"{skill}, changed": second_turns(skill, count) for skill in SECOND_TURNS}
    return turns | {skill: skill_tasks(skill, count) for skill in EDITING_SKILLS if skill in SKILLS}


def _other(field: str, value: str, rng: random.Random) -> str:
    while (found := FIELDS[field](rng)) == value:
        pass
    return found


def _changed_record(prompt: str, rng: random.Random) -> str:
    lines = prompt.split("\n")
    place = rng.randrange(1, len(lines))
    key, value = lines[place].split(": ")
    lines[place] = f"{key}: {_other(key, value, rng)}"
    return "\n".join(lines)


def _changed_table(prompt: str, rng: random.Random) -> str:
    lines = prompt.split("\n")
    header: Sequence[str] = lines[1].split(",")
    row, column = rng.randrange(2, len(lines)), rng.randrange(len(header))
    cells = lines[row].split(",")
    cells[column] = _other(header[column], cells[column], rng)
    lines[row] = ",".join(cells)
    return "\n".join(lines)


_CHANGES: dict[str, Callable[[str, random.Random], str]] = {"json": _changed_record, "table": _changed_table}
