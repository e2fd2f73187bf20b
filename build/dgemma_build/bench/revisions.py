"""Tasks for measuring drafts: the demo's held-out skills, and those that ask for a text again, changed or as it was.

Knows no service. A task is a chat and a checker of its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dgemma_build.demo.records import Example
from dgemma_build.demo.skills import REVISIONS, TASKS, held_out_set
from dgemma_build.demo.turns import held_out_chats

SECOND_TURNS = ("json", "table")  # skills whose answers are asked for again


@dataclass(frozen=True)
class Task:
    """One chat that waits for an answer."""

    messages: tuple[tuple[str, str], ...]  # role and content
    check: Callable[[str], bool]  # whether an answer is right
    answer: str  # a right one

    def chat(self) -> list[dict[str, str]]:
        """As chat templates take it."""
        return [{"role": role, "content": content} for role, content in self.messages]


def _task(example: Example, told: tuple[Example, ...] = ()) -> Task:
    messages = [turn for one in told for turn in (("user", one.prompt), ("assistant", one.answer))]
    check = partial(TASKS[example.skill].check, example.prompt)
    return Task((*messages, ("user", example.prompt)), check, example.answer)


def skill_tasks(skill: str, count: int) -> list[Task]:
    """Held-out prompts of a skill."""
    return [_task(example) for example in held_out_set(skill, count)]


def changed(skill: str, count: int) -> list[Task]:
    """A record or table was converted; the same with one value changed is to be."""
    return [_task(second, (first,)) for first, second in held_out_chats(skill, count)]


def again(skill: str, count: int) -> list[Task]:
    """A record or table was converted; the same is asked again, as it is where a client tries again."""
    return [_task(example, (example,)) for example in held_out_set(skill, count)]


def revisions(count: int) -> dict[str, list[Task]]:
    """`count` tasks of every kind whose answers repeat most or all of what stands in the chat."""
    kinds = {skill: skill_tasks(skill, count) for skill in REVISIONS}
    kinds |= {f"{skill}, changed": changed(skill, count) for skill in SECOND_TURNS}
    return kinds | {f"{skill}, again": again(skill, count) for skill in SECOND_TURNS}
