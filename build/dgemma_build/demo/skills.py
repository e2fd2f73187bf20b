"""Skills of the demo checkpoints: for each a generator, a checker and a split. Knows no tokenizer and no model.

An example is a user message and one right answer. The split is by content: the SHA-256 of the user message
decides, so no held-out example can ever be drawn for training, whatever the seed.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from dgemma_build.demo.records import FIELDS, Example, json_value, markdown_table
from dgemma_build.demo.revisions import check_fix, check_rename, make_fix, make_rename

HELD_OUT_ONE_IN = 16


def is_held_out(prompt: str) -> bool:
    """Whether this user message belongs to the held-out split (one in 16, by hash)."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


# ---------------------------------------------------------------- sudoku

_BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # side -> rows and columns of a box


def _peers(side: int) -> list[list[int]]:
    rows, cols = _BOX[side]

    def box(cell: int) -> tuple[int, int]:
        return cell // side // rows, cell % side // cols

    cells = range(side * side)
    return [
        [
            other
            for other in cells
            if other != cell
            and (other // side == cell // side or other % side == cell % side or box(other) == box(cell))
        ]
        for cell in cells
    ]


_PEERS = {side: _peers(side) for side in _BOX}


def solve_sudoku(grid: list[int], side: int, limit: int = 2, rng: random.Random | None = None) -> list[list[int]]:
    """Up to `limit` solutions of `grid` ([side*side] ints, 0 for blank), by most-constrained-cell search."""
    peers = _PEERS[side]
    full = (1 << (side + 1)) - 2
    solutions: list[list[int]] = []

    def search(cells: list[int]) -> bool:
        best, best_mask = -1, 0
        for cell, value in enumerate(cells):
            if value == 0:
                mask = full
                for other in peers[cell]:
                    mask &= ~(1 << cells[other])
                if mask == 0:
                    return False
                if best < 0 or mask.bit_count() < best_mask.bit_count():
                    best, best_mask = cell, mask
                    if best_mask.bit_count() == 1:
                        break
        if best < 0:
            solutions.append(cells.copy())
            return len(solutions) >= limit
        choices = [digit for digit in range(1, side + 1) if best_mask >> digit & 1]
        if rng is not None:
            rng.shuffle(choices)
        for digit in choices:
            cells[best] = digit
            if search(cells):
                return True
        cells[best] = 0
        return False

    search(grid.copy())
    return solutions


def _grid_text(grid: list[int], side: int) -> str:
    digits = ["_" if value == 0 else str(value) for value in grid]
    return "\n".join("".join(digits[row : row + side]) for row in range(0, side * side, side))


def _sudoku(rng: random.Random, side: int, blanks: tuple[int, int]) -> Example:
    solution = solve_sudoku([0] * side * side, side, limit=1, rng=rng)[0]
    puzzle = solution.copy()
    target = rng.randint(*blanks)
    for cell in rng.sample(range(side * side), side * side):
        if target == 0:
            break
        digit, puzzle[cell] = puzzle[cell], 0
        if len(solve_sudoku(puzzle, side)) == 1:
            target -= 1
        else:
            puzzle[cell] = digit
    prompt = f"Solve this {side}x{side} sudoku:\n{_grid_text(puzzle, side)}"
    return Example(f"sudoku{side}", prompt, _grid_text(solution, side))


def make_sudoku4(rng: random.Random) -> Example:
    """4x4 with 4 to 9 blanks and one solution."""
    return _sudoku(rng, 4, (4, 9))


def make_sudoku6(rng: random.Random) -> Example:
    """6x6 (boxes of 2x3) with 8 to 16 blanks and one solution."""
    return _sudoku(rng, 6, (8, 16))


def check_sudoku(prompt: str, answer: str) -> bool:
    """Whether `answer` is the solution of the puzzle in `prompt`, exactly as rows of digits."""
    rows = prompt.split("\n")[1:]
    side = len(rows)
    grid = [0 if char == "_" else int(char) for row in rows for char in row]
    return answer.strip() == _grid_text(solve_sudoku(grid, side)[0], side)


def sudoku_template(prompt: str) -> tuple[str | int, ...]:
    """The answer to a Sudoku's prompt as a template: clues and line ends as texts, a hole of one token per blank."""
    parts: list[str | int] = []
    for character in prompt.split("\n", 1)[1]:
        if character == "_":
            parts.append(1)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += character
        else:
            parts.append(character)
    return tuple(parts)


# ---------------------------------------------------------------- records


def make_json(rng: random.Random) -> Example:
    """Two to five `key: value` lines to one JSON object on one line."""
    keys = rng.sample(sorted(FIELDS), rng.randint(2, 5))
    return json_example([(key, FIELDS[key](rng)) for key in keys])


def json_example(lines: list[tuple[str, str]]) -> Example:
    """The task for these keys and values."""
    prompt = "Convert to JSON:\n" + "\n".join(f"{key}: {value}" for key, value in lines)
    return Example("json", prompt, json.dumps({key: json_value(value) for key, value in lines}))


def check_json(prompt: str, answer: str) -> bool:
    """Whether `answer` parses to exactly the record in `prompt`, types and key order included."""
    lines = (line.split(": ", 1) for line in prompt.split("\n")[1:])
    try:
        parsed = json.loads(answer)
    except ValueError:
        return False
    expected = {key: json_value(value) for key, value in lines}
    return isinstance(parsed, dict) and json.dumps(parsed) == json.dumps(expected)


def make_table(rng: random.Random) -> Example:
    """CSV of two to four columns and three to nine rows to a Markdown table."""
    header = rng.sample(sorted(FIELDS), rng.randint(2, 4))
    return table_example(header, [[FIELDS[key](rng) for key in header] for _ in range(rng.randint(3, 9))])


def table_example(header: list[str], rows: list[list[str]]) -> Example:
    """The task for these columns and rows."""
    prompt = "Convert to a table:\n" + "\n".join(",".join(row) for row in [header, *rows])
    return Example("table", prompt, markdown_table(header, rows))


def check_table(prompt: str, answer: str) -> bool:
    """Whether `answer` is a Markdown table with exactly the cells of the CSV in `prompt`."""
    expected = list(csv.reader(io.StringIO("\n".join(prompt.split("\n")[1:]))))
    lines = answer.strip().split("\n")
    if len(lines) < 2 or set(lines[1]) - set("|- ") or lines[1].count("|") != len(expected[0]) + 1:
        return False
    rows = [lines[0], *lines[2:]]
    if not all(row.startswith("|") and row.endswith("|") for row in rows):
        return False
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows] == expected


# ---------------------------------------------------------------- code

HOLE = "___"
_ARGS = "a b x y n m p q u w".split()
_OUTS = "r out res total ans".split()
_BINARY = {"add": "+", "subtract": "-", "multiply": "*", "divide": "//", "modulo": "%"}
_UNARY = {"double": "{0} * 2", "triple": "{0} * 3", "square": "{0} * {0}", "increment": "{0} + 1", "halve": "{0} // 2"}
_FOLDS = {
    "sum": ("0", "{0} += v"),
    "product": ("1", "{0} *= v"),
    "count": ("0", "{0} += 1"),
    "square_sum": ("0", "{0} += v * v"),
}


def _function(head: str, before: list[str], middle: list[str], after: list[str]) -> Example:
    def block(lines: list[str]) -> str:
        return "".join(f"    {line}\n" for line in lines)

    prompt = f"Fill in the middle:\n{head}\n{block(before)}    {HOLE}\n{block(after)}".rstrip("\n")
    return Example("infill", prompt, block(middle).strip("\n")[4:])


def make_infill(rng: random.Random) -> Example:
    """A short function with one or two lines missing; its name says what it computes."""
    first, second = rng.sample(_ARGS, 2)
    out = rng.choice(_OUTS)
    kind = rng.randrange(5)
    if kind == 0:
        verb = rng.choice(sorted(_BINARY))
        return _function(
            f"def {verb}({first}, {second}):", [], [f"{out} = {first} {_BINARY[verb]} {second}"], [f"return {out}"]
        )
    if kind == 1:
        verb = rng.choice(sorted(_UNARY))
        return _function(f"def {verb}({first}):", [], [f"{out} = {_UNARY[verb].format(first)}"], [f"return {out}"])
    if kind == 2:
        verb, then = rng.choice(sorted(_BINARY)), rng.choice(sorted(_UNARY))
        middle = [f"{out} = {first} {_BINARY[verb]} {second}", f"{out} = {_UNARY[then].format(out)}"]
        return _function(f"def {verb}_{then}({first}, {second}):", [], middle, [f"return {out}"])
    if kind == 3:
        name, sign = rng.choice([("larger", "<"), ("smaller", ">")])
        middle = [f"if {first} {sign} {second}:", f"    {first} = {second}"]
        return _function(f"def {name}({first}, {second}):", [], middle, [f"return {first}"])
    name = rng.choice(sorted(_FOLDS))
    start, update = _FOLDS[name]
    plus = rng.randint(1, 9)
    return _function(
        f"def {name}({first}):",
        [f"{out} = {start}"],
        [f"for v in {first}:", f"    {update.format(out)}"],
        [f"return {out} + {plus}"] if rng.random() < 0.5 else [f"return {out}"],
    )


_ALLOWED = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.AugAssign, ast.Name, ast.Load, ast.Store),
    *(ast.Constant, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Compare, ast.Lt, ast.Gt),
    *(ast.If, ast.For, ast.Return),
)
_SCALARS = [(7, 3), (2, 5), (12, 4), (9, 9), (20, 6)]
_LISTS = [[3, 1, 4], [2], [5, 5, 2, 7]]


def _run(source: str) -> list[object] | None:
    """Results of the one function in `source` on fixed inputs; None if it is not plain arithmetic or fails."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if len(functions) != 1 or len(tree.body) != 1 or not all(isinstance(node, _ALLOWED) for node in ast.walk(tree)):
        return None
    namespace: dict[str, object] = {"__builtins__": {}}
    try:
        exec(compile(tree, "<infill>", "exec"), namespace)
        function = namespace[functions[0].name]
        if len(functions[0].args.args) == 2:
            return [function(*pair) for pair in _SCALARS]  # type: ignore[operator]
        loops = any(isinstance(node, ast.For) for node in ast.walk(tree))
        return [function(value) for value in (_LISTS if loops else [pair[0] for pair in _SCALARS])]  # type: ignore[operator]
    except (ArithmeticError, NameError, TypeError, ValueError):
        return None


def _reference_infill(prompt: str) -> str:
    """The function the prompt's name asks for, written from the name alone."""
    lines = prompt.split("\n")[1:]
    name, arguments = lines[0].removeprefix("def ").removesuffix("):").split("(")
    args = arguments.split(", ")
    result = lines[-1].removeprefix("    return ")
    out = result.split(" + ")[0]
    if name in ("larger", "smaller"):
        body = [f"    if {args[0]} {'<' if name == 'larger' else '>'} {args[1]}:", f"        {args[0]} = {args[1]}"]
    elif name in _FOLDS:
        start, update = _FOLDS[name]
        body = [f"    {out} = {start}", f"    for v in {args[0]}:", f"        {update.format(out)}"]
    elif name in _UNARY:
        body = [f"    {out} = {_UNARY[name].format(args[0])}"]
    else:
        verb, _, then = name.partition("_")
        body = [f"    {out} = {args[0]} {_BINARY[verb]} {args[1]}"]
        body += [f"    {out} = {_UNARY[then].format(out)}"] if then else []
    return "\n".join([lines[0], *body, lines[-1]])


def check_infill(prompt: str, answer: str) -> bool:
    """Whether the completed function computes what its name says on every test input."""
    expected = _run(_reference_infill(prompt))
    completed = prompt.split("\n", 1)[1].replace(HOLE, answer)
    return expected is not None and _run(completed) == expected


@dataclass(frozen=True)
class Skill:
    """A generator and a checker of (prompt, answer)."""

    make: Callable[[random.Random], Example]
    check: Callable[[str, str], bool]


SKILLS: dict[str, Skill] = {
    "sudoku4": Skill(make_sudoku4, check_sudoku),
    "sudoku6": Skill(make_sudoku6, check_sudoku),
    "json": Skill(make_json, check_json),
    "table": Skill(make_table, check_table),
    "infill": Skill(make_infill, check_infill),
}
# Of the revising checkpoint only: what stands in the prompt is to be written again with one thing changed.
REVISIONS: dict[str, Skill] = {"rename": Skill(make_rename, check_rename), "fix": Skill(make_fix, check_fix)}
TASKS: dict[str, Skill] = SKILLS | REVISIONS


def draw(skill: str, rng: random.Random, held_out: bool) -> Example:
    """One example of the asked split, by rejection."""
    while True:
        example = TASKS[skill].make(rng)
        if is_held_out(example.prompt) == held_out:
            return example


def held_out_set(skill: str, count: int, seed: int = 20261121) -> list[Example]:
    """`count` different held-out examples of `skill`, always the same for one seed."""
    rng = random.Random(f"{seed}:{skill}")
    seen: dict[str, Example] = {}
    while len(seen) < count:
        example = draw(skill, rng, held_out=True)
        seen.setdefault(example.prompt, example)
    return list(seen.values())
