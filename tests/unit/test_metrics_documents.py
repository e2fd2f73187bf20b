"""The page about metrics and the Grafana dashboard name exactly what is published."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dgemma_runtime.metric_families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/observability.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docker/grafana/dgemma.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", [])]
PUBLISHED = {name: family for family in FAMILIES for name in family.published}
_METRIC = re.compile(r"\b(?:dgemma_|nv_trt_llm_|vllm:)\w+")
_SELECTED = re.compile(r"((?:dgemma_|nv_trt_llm_|vllm:)\w+)\{([^}]*)\}")


def row(family: Family) -> str:
    label = f"`{family.label}`: {', '.join(family.values)}" if family.label else ""
    return f"| `{family.name}` | {family.kind} | {family.unit} | {label} | {family.meaning} |"


def test_the_page_has_the_table() -> None:
    expected = [row(family) for family in FAMILIES]
    found = [line for line in PAGE.splitlines() if re.match(r"\| `(dgemma_|nv_trt_llm_|vllm:)", line)]
    assert found == expected


def test_the_page_names_nothing_else() -> None:
    modules = {"dgemma_runtime", "dgemma_build"}
    assert set(_METRIC.findall(PAGE)) - modules <= {family.name for family in FAMILIES} | set(PUBLISHED)


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_queries_name_what_is_published(title: str, query: str) -> None:
    selected = _SELECTED.findall(query)
    assert selected, title
    assert {name for name, _ in selected} == set(_METRIC.findall(query))  # each with the model's labels
    for name, text in selected:
        family = PUBLISHED[name]
        labels = dict(re.findall(r'(\w+)=~?"([^"]*)"', text))
        model = "model_name" if name.startswith("vllm:") else "model"
        assert labels.pop(model) == "$model"
        assert labels.pop("instance") == "$instance"
        assert set(labels) <= {family.label}, name
        for value in labels.values():
            assert set(value.split("|")) <= set(family.values), name
    assert query.count("(") == query.count(")")
    grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
    own = {PUBLISHED[name].label for name, _ in selected} | {"le"}
    assert grouped <= own
    if "histogram_quantile" in query:
        assert all(name.endswith("_bucket") for name, _ in selected)
        assert "by (le)" in query
    if any(PUBLISHED[name].kind != "gauge" for name, _ in selected):
        assert "rate(" in query or "increase(" in query


def test_the_dashboard_shows_every_family_of_ours() -> None:
    shown = {PUBLISHED[name].name for _, query in QUERIES for name in _METRIC.findall(query)}
    ours = {family.name for family in FAMILIES if family.name.startswith("dgemma_")}
    assert ours - shown == {"dgemma_page_size_tokens"}


def test_panels_have_titles_data_and_a_place_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
        assert one["x"] + one["w"] <= 24


def test_variables_ask_for_what_is_published() -> None:
    variables = {item["name"]: item for item in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "instance"}
    for name in ("model", "instance"):
        assert set(_METRIC.findall(variables[name]["query"]["query"])) <= set(PUBLISHED)
