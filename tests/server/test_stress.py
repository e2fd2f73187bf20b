"""The short form of `make stress`: the demo checkpoint, 16 clients of every kind, with enough pages and with few."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_build.bench.report import Environment
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.stress.clients import Outcome
from dgemma_build.stress.load import WEIGHTS
from dgemma_build.stress.report import document, plot, tables
from dgemma_build.stress.run import Load, Variant, memory_check, request_checks, stress, variants
from dgemma_build.stress.watch import Sample, parse_metrics

CHECKPOINT = Path(__file__).resolve().parents[2] / "build/checkpoints/demo"
LOAD = Load(clients=16, seconds=7.0, seed=0)


@pytest.fixture(scope="module")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "demo"
    build_engine(BuildRequest(CHECKPOINT, directory))
    return directory


@pytest.mark.parametrize("variant", variants(LOAD.clients), ids=lambda variant: variant.name)
def test_nothing_is_lost_under_load(demo_engine: Path, tmp_path: Path, variant: Variant) -> None:
    run = stress(demo_engine, variant, LOAD)

    short = [check for check in run.checks if not check.passed]
    assert short == [], [outcome.problem for outcome in run.outcomes if outcome.problem is not None][:10]
    environment = Environment.here(threads=2)
    record = document([run], environment)["runs"][0]
    assert sum(row["requests"] for row in record["requests"]) == len(run.outcomes) > len(WEIGHTS)
    ends, _ = tables(run)
    assert ends.row_count == len(WEIGHTS)
    plot([run], environment, tmp_path / "stress.svg")
    assert "<svg" in (tmp_path / "stress.svg").read_text()


def outcomes() -> list[Outcome]:
    """One good request of each manner, and one refused for a full queue."""
    good = [Outcome(manner, "stop", 0.1, None, compared=True) for manner in WEIGHTS]
    return [*good, Outcome("stream", "overloaded", 0.0)]


def test_a_problem_fails_the_run_and_is_shown() -> None:
    assert all(check.passed for check in request_checks(outcomes()))
    first, *rest = request_checks([*outcomes(), Outcome("stream", "wrong", 1.0, "sudoku4 0, stream: hangs")])
    assert not first.passed
    assert "1 of 11" in first.figure
    assert "hangs" in first.figure
    assert all(check.passed for check in rest)


def test_a_kind_that_never_came_fails_the_run() -> None:
    without = [outcome for outcome in outcomes() if outcome.manner != "whole"]
    (short,) = [check for check in request_checks(without) if not check.passed]
    assert (short.what, short.figure) == ("requests of every kind", "whole")


def test_memory_may_grow_while_it_warms_up_and_hardly_after() -> None:
    def samples(*megabytes: float) -> list[Sample]:
        return [Sample(second, int(1e6 * size), 0, 0, 0) for second, size in enumerate(megabytes)]

    assert memory_check(samples(100, 150, 200, 200, 190, 208)).passed
    assert not memory_check(samples(100, 150, 200, 200, 205, 211)).passed


def test_metrics_are_summed_over_their_labels() -> None:
    text = '# HELP a b\n# TYPE a gauge\na{model="x",kind="full"} 2\na{model="x",kind="sliding"} 0.5\nb 1e3\n'
    assert parse_metrics(text) == {"a": 2.5, "b": 1000.0}
