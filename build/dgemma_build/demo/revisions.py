"""Tasks whose answer is the document of the prompt with one thing changed. Knows no split, no tokenizer, no model."""

from __future__ import annotations

import json
import random
import re

from dgemma_build.demo.records import FIELDS, Example, json_value, markdown_table

# Names that a key is renamed to, beside those of the fields; the tokenizer has to spell some of them.
NEW_KEYS = "years title town cost rank label code state mark tone".split()
_RENAME = re.compile(r'Rename the key "(\w+)" to "(\w+)":\n(.*)', re.DOTALL)
_FIX = re.compile(r'Change row (\d+), column "(\w+)" to (\w+):\n(.*)', re.DOTALL)
_NUMBER = "row"  # the first column of a table to fix, which numbers the rows


def _rename_prompt(old: str, new: str, document: str) -> str:
    return f'Rename the key "{old}" to "{new}":\n{document}'


def _fix_prompt(row: int, column: str, value: str, document: str) -> str:
    return f'Change row {row}, column "{column}" to {value}:\n{document}'


def _rename_example(document: str, rng: random.Random) -> Example:
    keys = list(json.loads(document)[0])
    old, new = rng.choice(keys), rng.choice([key for key in (*sorted(FIELDS), *NEW_KEYS) if key not in keys])
    return Example("rename", _rename_prompt(old, new, document), document.replace(f'"{old}":', f'"{new}":'))


def make_rename(rng: random.Random) -> Example:
    """A JSON array of two to five records of two to six fields, a record a line; one key gets another name."""
    keys = rng.sample(sorted(FIELDS), rng.randint(2, 6))
    records = [{key: json_value(FIELDS[key](rng)) for key in keys} for _ in range(rng.randint(2, 5))]
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


def _fix_example(document: str, rng: random.Random) -> Example:
    header, rows = _cells(document)
    row, column = rng.randrange(len(rows)), rng.randrange(1, len(header))
    field = FIELDS.get(header[column])
    present = rows[row][column]
    value = present
    while value == present:
        value = field(rng) if field else rng.choice(rows)[column]
    prompt = _fix_prompt(row + 1, header[column], value, document)
    rows[row][column] = value
    return Example("fix", prompt, markdown_table(header, rows))


def make_fix(rng: random.Random) -> Example:
    """A Markdown table of three to nine numbered rows and two to four columns; one cell gets another value."""
    header = rng.sample(sorted(FIELDS), rng.randint(2, 4))
    rows = [[str(number + 1), *(FIELDS[key](rng) for key in header)] for number in range(rng.randint(3, 9))]
    return _fix_example(markdown_table([_NUMBER, *header], rows), rng)


def again_fix(first: Example, rng: random.Random) -> Example:
    """The same task on the table of `first` or on its answer, with another cell or another value."""
    match = _FIX.fullmatch(first.prompt)
    assert match
    return _fix_example(rng.choice((match[4], first.answer)), rng)


def check_fix(prompt: str, answer: str) -> bool:
    """Whether `answer` is the prompt's table with that cell changed and nothing else."""
    match = _FIX.fullmatch(prompt)
    if match is None:
        return False
    number, column, value, document = match.groups()
    lines = document.split("\n")
    header = lines[0].split(" | ")
    place = [name.strip("| ") for name in header].index(column)
    row = lines[1 + int(number)].split(" | ")
    row[place] = f"{value} |" if place == len(row) - 1 else value
    lines[1 + int(number)] = " | ".join(row)
    return answer.strip() == "\n".join(lines)
