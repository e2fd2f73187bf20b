"""What the demo's documents are made of: fields, their values, examples. Knows no skill, no tokenizer and no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One task: `prompt` is the user message, `answer` a right reply."""

    skill: str
    prompt: str
    answer: str


NAMES = (
    "Ada Bo Cleo Dan Eve Finn Gus Hana Ivan June Kai Lena Max Nora Otto Pia Quinn Rosa Sam Tess Uma Vera Will Yuki Zoe"
).split()
CITIES = "Oslo Paris Lima Cairo Kyoto Delhi Quito Turin Basel Perth Accra Dubai Seoul Tunis Malmo Porto".split()
COLORS = "red blue green black white pink gray gold teal brown".split()
ITEMS = "pen cup lamp desk chair book shoe hat bag ball clock fork spoon plate brush rope".split()
FRUITS = "apple pear plum fig grape lemon mango peach kiwi melon".split()
JOBS = "cook nurse pilot baker judge clerk miner actor guard coach".split()


def _integer(rng: random.Random) -> str:
    return str(rng.randint(0, 999) if rng.random() < 0.5 else rng.randint(0, 99))


def _word(words: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(words)


FIELDS: dict[str, Callable[[random.Random], str]] = {
    "name": _word(NAMES),
    "friend": _word(NAMES),
    "owner": _word(NAMES),
    "city": _word(CITIES),
    "from": _word(CITIES),
    "to": _word(CITIES),
    "color": _word(COLORS),
    "item": _word(ITEMS),
    "fruit": _word(FRUITS),
    "job": _word(JOBS),
    "age": _integer,
    "price": _integer,
    "count": _integer,
    "size": _integer,
    "score": _integer,
    "year": _integer,
    "active": _word(["true", "false"]),
    "done": _word(["true", "false"]),
}

# Fields whose values are words, with these words.
WORD_FIELDS: dict[str, list[str]] = {
    **dict.fromkeys(("name", "friend", "owner"), NAMES),
    **dict.fromkeys(("city", "from", "to"), CITIES),
    "color": COLORS,
    "item": ITEMS,
    "fruit": FRUITS,
    "job": JOBS,
}


def json_value(text: str) -> str | int | bool:
    """The JSON value that a field's text stands for."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, one line per row."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
