"""Tasks whose answer is the document of the prompt with one thing changed. Knows no split, no tokenizer, no model."""

from __future__ import annotations

import json
import random
import re

from dgemma_build.demo.records import FIELDS, WORD_FIELDS, Example, json_value, markdown_table

_RENAME = re.compile(r'Rename the key "(\w+)" to "(\w+)":\n(.*)', re.DOTALL)
_FIX = re.compile(r"Change (\w+) to (\w+):\n(.*)", re.DOTALL)


def _rename_prompt(old: str, new: str, document: str) -> str:
    return f'Rename the key "{old}" to "{new}":\n{document}'


def _fix_prompt(old: str, new: str, document: str) -> str:
    return f"Change {old} to {new}:\n{document}"


def _rename_example(document: str, rng: random.Random) -> Example:
    keys = list(json.loads(document)[0])
    old, new = rng.choice(keys), rng.choice([key for key in sorted(FIELDS) if key not in keys])
    return Example("rename", _rename_prompt(old, new, document), document.replace(f'"{old}":', f'"{new}":'))


def make_rename(rng: random.Random) -> Example:
    """A JSON array of two to four records of two to four fields, a record a line; one key gets another name."""
    keys = rng.sample(sorted(FIELDS), rng.randint(2, 4))
    records = [{key: json_value(FIELDS[key](rng)) for key in keys} for _ in range(rng.randint(2, 4))]
    return _rename_example("[" + ",\n".join(json.dumps(record) for record in records) + "]", rng)


def again_rename(first: Example, rng: random.Random) -> Example:
    """The same task on the document of `first` or on its answer, with another key or another name."""
    match = _RENAME.fullmatch(first.prompt)
    assert match
    return _rename_example(rng.choice((match[3], first.answer)), rng)


def check_rename(prompt: str, answer: str) -> bool:
    """Whether `answer` is the prompt's document with every such key renamed in its place and nothing else changed."""
    match = _RENAME.fullmatch(prompt)
    if match is None:
        return False
    old, new, document = match.groups()
    records = [
        json.dumps({new if key == old else key: value for key, value in record.items()})
        for record in json.loads(document)
    ]
    return answer.strip() == "[" + ",\n".join(records) + "]"


def _cells(document: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a Markdown table."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in document.split("\n")]
    return lines[0], lines[2:]


def _fix_example(document: str, rng: random.Random) -> Example | None:
    """None if no word stands in one cell alone, or the field has no word that is new here."""
    header, rows = _cells(document)
    columns = [place for place, key in enumerate(header) if key in WORD_FIELDS]
    words = [row[place] for row in rows for place in range(len(header))] + header
    cells = [(row, place) for row in range(len(rows)) for place in columns if words.count(rows[row][place]) == 1]
    if not cells:
        return None
    row, place = rng.choice(cells)
    others = [word for word in WORD_FIELDS[header[place]] if word not in words]
    if not others:
        return None
    old, new = rows[row][place], rng.choice(others)
    prompt = _fix_prompt(old, new, document)
    rows[row][place] = new
    return Example("fix", prompt, markdown_table(header, rows))


def make_fix(rng: random.Random) -> Example:
    """A Markdown table of three to six rows and two to four columns, one of words at least; a word is changed."""
    example = None
    while example is None:
        header = rng.sample(sorted(FIELDS), rng.randint(2, 4))
        rows = [[FIELDS[key](rng) for key in header] for _ in range(rng.randint(3, 6))]
        example = _fix_example(markdown_table(header, rows), rng)
    return example


def again_fix(first: Example, rng: random.Random) -> Example:
    """The same task on the table of `first` or on its answer, with another word."""
    match = _FIX.fullmatch(first.prompt)
    assert match
    example = _fix_example(rng.choice((match[3], first.answer)), rng)
    return first if example is None else example


def check_fix(prompt: str, answer: str) -> bool:
    """Whether `answer` is the prompt's table with that word changed and nothing else."""
    match = _FIX.fullmatch(prompt)
    if match is None:
        return False
    old, new, document = match.groups()
    return answer.strip() == re.sub(rf"\b{old}\b", new, document)
