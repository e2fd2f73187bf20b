"""What the clients ask and how they behave, as plain data drawn from a seed. Knows no connection and no server."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from dgemma_build.demo.records import Example
from dgemma_build.demo.skills import SKILLS, held_out_set
from dgemma_client.requests import Message, Parameters

Manner = Literal[
    "stream",  # a response per canvas
    "whole",  # one response
    "previews",  # a response per step
    "cancelled",  # the task is cancelled at a random moment
    "timed out",  # the client's own deadline, at a random moment
    "deadline",  # the server's, `deadline_ms`
    "disconnected",  # the connection is closed at a random moment
    "oversize",  # a prompt, or an answer, longer than the context
    "bad parameter",
]
WEIGHTS: dict[Manner, int] = {
    "stream": 24,
    "whole": 14,
    "previews": 12,
    "cancelled": 12,
    "timed out": 7,
    "deadline": 7,
    "disconnected": 8,
    "oversize": 7,
    "bad parameter": 9,
}
UNDISTURBED: tuple[Manner, ...] = ("stream", "whole", "previews")
LONGEST_WAIT_S = 1.2  # before a disturbance; most answers take less, so some are too late to disturb anything
_SALTED = 0.15  # share of requests that may not use what others have cached
_PRIORITIES = (0, 0, 0, -5, 5)

# What must be refused, and by the name of which field.
BAD: tuple[tuple[Parameters, str], ...] = (
    ({"temperature": -1.0}, "temperature"),
    ({"max_denoising_steps": 0}, "max_denoising_steps"),
    ({"t_min": 2.0, "t_max": 1.0}, "t_min"),
    ({"top_k": 5}, "top_k"),
    ({"stop_words": ["x" * 2000]}, "stop"),
    ({"end_id": 10**6}, "end_id"),
    ({"max_tokens": -3}, "max_tokens"),
)


@dataclass(frozen=True)
class Question:
    """A chat with its seed: everything that decides its answer."""

    name: str
    messages: tuple[Message, ...]
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Ask:
    """One request of one client."""

    manner: Manner
    question: Question
    priority: int
    cache_salt: str  # "" for none
    after_s: float  # when a disturbance comes
    detail: int  # which of the bad parameters, or by how many tokens a prompt is too long


def questions(longest: int) -> list[Question]:
    """Single questions of every skill, and turns of two conversations with up to `longest` turns behind them."""
    found = []
    for seed, skill in enumerate(SKILLS):
        found += [
            _question(f"{skill} {index}", [], example, seed) for index, example in enumerate(held_out_set(skill, 2))
        ]
    for number in range(2):
        told = conversation(number, longest + 1)
        turn = 1
        while turn <= longest:
            found.append(_question(f"conversation {number} after {turn}", told[:turn], told[turn], seed=100 + turn))
            turn *= 2
    return found


def draw(rng: random.Random, asked: list[Question]) -> Ask:
    """The next request of a client."""
    manner = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return Ask(
        manner=manner,
        question=rng.choice(asked),
        priority=rng.choice(_PRIORITIES),
        cache_salt=f"{rng.getrandbits(64):x}" if rng.random() < _SALTED else "",
        after_s=rng.uniform(0.0, LONGEST_WAIT_S) ** 2,
        detail=rng.randrange(1000),
    )


def chat(told: list[Example], asked: str) -> tuple[Message, ...]:
    """Turns with their right answers, and a question at the end."""
    messages: list[Message] = []
    for example in told:
        messages += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
    return (*messages, {"role": "user", "content": asked})


def _question(name: str, told: list[Example], example: Example, seed: int) -> Question:
    return Question(name, chat(told, example.prompt), seed, max_tokens=192)


def conversation(number: int, turns: int) -> list[Example]:
    """Examples of all skills in turn; two conversations share none."""
    each = -(-turns // len(SKILLS))
    by_skill = [held_out_set(skill, each, seed=number) for skill in SKILLS]
    return [example for row in zip(*by_skill, strict=True) for example in row][:turns]
