"""The chart's values as a table, and the cases that exercise them: which leaves they set, what they render to.

Golden renders lie beside the cases; `python -m dgemma_build.chart --write` makes them again, and with them the table
in the chart's README.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dgemma_build.chart import helm
from dgemma_build.chart.helm import CHART, ROOT
from dgemma_build.chart.kinds import VERSIONS, errors_of, read_objects

CASES = tuple(sorted((ROOT / "tests/kubernetes/cases").glob("*.yaml")))
GOLDEN = ROOT / "tests/kubernetes/golden"
SAMPLES = tuple(sorted((ROOT / "docker/kubernetes").glob("*.yaml")))
README = ROOT / "docker/helm/README.md"
TABLE_BEGIN, TABLE_END = "<!-- values: made by python -m dgemma_build.chart --write -->\n", "<!-- end of values -->\n"

Values = dict[str, Any]
Keys = tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """A documented value of the chart."""

    path: Keys
    meaning: str
    default: Any

    @property
    def name(self) -> str:
        return ".".join(part.replace(".", "\\.") for part in self.path)


@cache
def defaults() -> Values:
    loaded: Values = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


@cache
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return loaded


def leaves(values: Values, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Keys and value of everything that is not an object with something in it."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def documented() -> list[Value]:
    """What the schema describes, in the order of values.yaml."""
    found = []
    for path, meaning in _described(schema(), ()):
        value: Any = defaults()
        for part in path:
            value = value[part]
        found.append(Value(path, meaning, value))
    order = list(defaults())
    return sorted(found, key=lambda value: order.index(value.path[0]))


def _described(node: dict[str, Any], path: Keys) -> Iterator[tuple[Keys, str]]:
    if path and "description" in node:
        yield path, node["description"]
    else:
        for name, child in node.get("properties", {}).items():
            yield from _described(child, (*path, name))


def exercised() -> dict[Keys, list[str]]:
    """For each leaf of values.yaml the cases that set it to something else."""
    given = {case.stem: dict(leaves(yaml.safe_load(case.read_text()))) for case in CASES}
    return {
        path: [name for name, case in given.items() if _differs(path, value, case)]
        for path, value in leaves(defaults())
    }


def _differs(path: Keys, default: Any, case: dict[Keys, Any]) -> bool:
    """Set there to another value, or (an empty object) filled."""
    if path in case:
        return bool(case[path] != default)
    return any(key[: len(path)] == path for key in case)


def table() -> str:
    """All documented values as a Markdown table."""
    rows = [f"| `{each.name}` | {_cell(each.meaning)} | `{json.dumps(each.default)}` |\n" for each in documented()]
    return "| value | meaning | default |\n|---|---|---|\n" + "".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def readme() -> str:
    """The chart's README with the present table."""
    before, _, rest = README.read_text().partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    return before + TABLE_BEGIN + table() + TABLE_END + after


def golden(case: Path) -> Path:
    return GOLDEN / case.name


@dataclass(frozen=True)
class Report:
    """What a check of all cases and samples found."""

    cases: int
    objects: int
    values: int  # leaves of values.yaml
    problems: tuple[str, ...]


def check() -> Report:
    """Lints, renders, compares and validates everything; takes seconds."""
    problems = [f"{'.'.join(path)} is in no case" for path, cases in exercised().items() if not cases]
    objects = 0
    for case in CASES:
        try:
            helm.lint(case)
            text = helm.render(case)
        except helm.HelmError as error:
            problems.append(f"{case.stem}: {error}")
            continue
        if not golden(case).exists() or golden(case).read_text() != text:
            problems.append(f"{case.stem}: {golden(case).relative_to(ROOT)} is not what is rendered now")
        found = read_objects(text)
        objects += len(found)
        problems += [
            f"{case.stem}: {error}" for item in found for version in VERSIONS for error in errors_of(item, version)
        ]
    for sample in SAMPLES:
        found = read_objects(sample.read_text())
        objects += len(found)
        problems += [
            f"{sample.name}: {error}" for item in found for version in VERSIONS for error in errors_of(item, version)
        ]
    return Report(len(CASES), objects, len(exercised()), tuple(problems))


def write() -> None:
    """Makes golden renders and the README's table again."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        golden(case).write_text(helm.render(case))
    for old in set(GOLDEN.glob("*.yaml")) - {golden(case) for case in CASES}:
        old.unlink()
    README.write_text(readme())
