"""The benchmark over contexts: what it measures and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgemma_build.bench.context import PLOT, RESULT, Point, measure, table, write
from dgemma_build.bench.report import Environment
from dgemma_build.engine import BuildRequest, build_engine

DEMO = Path(__file__).resolve().parents[2] / "build/checkpoints/demo"
CONTEXTS = (1024, 8192)


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    engine = tmp_path_factory.mktemp("engines") / "demo"
    build_engine(BuildRequest(DEMO, engine))
    return measure(engine, CONTEXTS, lambda text: None)


def test_attention_grows_and_the_rest_does_not(points: list[Point]) -> None:
    short, long = points
    assert [point.context for point in points] == list(CONTEXTS)
    assert long.attention_ms > 2 * short.attention_ms > 0
    assert long.rest_ms < 4 * short.rest_ms  # eight times the context; a busy machine is in it
    assert short.prefill_tokens_per_s > long.prefill_tokens_per_s > 0


def test_what_is_left(points: list[Point], tmp_path: Path) -> None:
    environment = Environment.here(2)
    write(points, environment, tmp_path)
    document = json.loads((tmp_path / RESULT).read_text())
    assert document["benchmark"] == "context"
    assert [point["context"] for point in document["points"]] == list(CONTEXTS)
    assert (tmp_path / PLOT).read_text().count("<svg") == 1
    assert table(points, environment).row_count == len(CONTEXTS)
