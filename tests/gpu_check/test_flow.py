"""The whole check from kernels to file, at tiny sizes; what it says of wrong numbers, of failures and of short bars."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dgemma_build.gpu_check import cases, command, measure
from dgemma_build.gpu_check.cases import Prepared, all_cases
from dgemma_build.gpu_check.machine import Machine, Timing
from dgemma_build.gpu_check.measure import Bench
from dgemma_build.gpu_check.report import Report, line, row_json
from dgemma_build.gpu_check.results import Bar, Card, Check, Row, Work
from dgemma_build.gpu_check.sizes import PRECISIONS, RELEASED, WHOLE, ModelSizes, Scope
from dgemma_build.kernels.attention import paged_attention
from dgemma_build.kernels.experts import grouped_experts

CARD = Card(copy=2e12, read=3e12, bf16_flops=7e14, fp8_flops=1.4e15, launch_ms=0.004)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensorrt_rtx does is tested by itself."""
    monkeypatch.setattr(command, "try_in_own_process", lambda: {"answer": "not asked"})


def test_the_whole_flow(machine: Machine, tiny: ModelSizes, little: Scope, tmp_path: Path) -> None:
    output = tmp_path / "made" / "gpu_check.json"
    report = command.check(machine, tiny, little, "", output)

    assert report.complete
    for row in report.rows:
        assert row.numbers_hold, row
        assert row.checks, row
    names = [row.name for row in report.rows]
    steps = ["2 canvases and 1 commit", "1 canvas behind 40", "1 canvas and 1 commit behind 40"]
    assert names == [case.name for case in all_cases(tiny, little)] + [
        f"step {precision}, 2 layers, {step}" for precision in PRECISIONS for step in steps
    ]
    held = json.loads(output.read_text())
    assert held["complete"] is True
    assert held["numbers_hold"] is True
    assert [row["name"] for row in held["rows"]] == names
    assert held["tensorrt_rtx"] == {"answer": "not asked"}
    assert {"device", "sm", "driver", "torch", "triton", "commit", "date"} <= set(held)
    with_bar = {row["name"] for row in held["rows"] if row["bar"]}
    assert with_bar == {
        "head, 1 canvas",
        *(f"experts {precision}, 1 canvas" for precision in PRECISIONS),
        "step fp8, 2 layers, 1 canvas behind 40",
    }
    step = next(row for row in held["rows"] if row["name"] == "step int4, 2 layers, 1 canvas behind 40")
    assert set(step["details"]["parts_ms"]) == {"experts", "attention", "products", "head", "between"}
    assert step["details"]["experts_reached_least"] == tiny.experts.experts
    assert json.dumps(report.summary())


def test_a_failure_is_a_row_and_the_others_still_run(
    machine: Machine, tiny: ModelSizes, little: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("an illegal\nmemory access")

    monkeypatch.setattr(cases, "fused_head", broken)
    chosen = [case for case in all_cases(tiny, little) if case.name in ("head, 1 canvas", "experts fp8, 1 canvas")]
    monkeypatch.setattr(measure, "all_cases", lambda sizes, scope: iter(chosen))
    monkeypatch.setattr(measure, "PRECISIONS", ())
    head, experts = Bench(machine, tiny, little, CARD).rows()
    assert head.error == "RuntimeError: an illegal memory access"
    assert not head.numbers_hold
    assert "FAILED: RuntimeError: an illegal memory access" in line(head)
    assert experts.numbers_hold


def test_one_context_of_whole_steps_can_be_asked_for(machine: Machine, tiny: ModelSizes, little: Scope) -> None:
    scope = replace(little, step_contexts=(40, 24))
    (row,) = Bench(machine, tiny, scope, CARD).rows("step fp8, 2 layers, 1 canvas behind 24")
    assert row.numbers_hold
    assert row.bar is None, "the bar is for the first context"


def test_wrong_numbers_are_found(
    machine: Machine, tiny: ModelSizes, little: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = grouped_experts
    monkeypatch.setattr(cases, "grouped_experts", lambda *given: right(*given) * 1.02)
    (row,) = Bench(machine, tiny, little, CARD).rows("experts bf16, 1 canvas")
    assert not row.numbers_hold
    assert row.checks[0].error == pytest.approx(0.02, rel=0.05)
    assert "WRONG: output" in line(row)


@pytest.mark.parametrize("change", ["attention", "experts"])
def test_a_step_that_leaves_something_out_is_found(
    machine: Machine, tiny: ModelSizes, little: Scope, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    name = {"attention": "paged_attention", "experts": "grouped_experts"}[change]
    monkeypatch.setattr(f"dgemma_build.gpu_check.step.{name}", lambda x, *rest: torch.ones_like(x))
    row = next(Bench(machine, tiny, little, CARD).rows("step fp8, 2 layers, 2 canvases and 1 commit"))
    assert not next(check for check in row.checks if check.name == "hidden").holds


def test_a_commit_taken_for_a_canvas_is_found(
    machine: Machine, tiny: ModelSizes, little: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything_seen(*given: Any) -> torch.Tensor:
        *others, is_canvas, window = given
        arguments: list[Any] = [*others, torch.ones_like(is_canvas), window]
        return paged_attention(*arguments)

    monkeypatch.setattr("dgemma_build.gpu_check.step.paged_attention", everything_seen)
    row = next(Bench(machine, tiny, little, CARD).rows("step bf16, 2 layers, 2 canvases and 1 commit"))
    assert not next(check for check in row.checks if check.name == "hidden").holds


def test_shares_come_from_work_and_time(
    machine: Machine, tiny: ModelSizes, little: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 GB in 1.25 ms are 80% of 3 TB/s."""

    monkeypatch.setattr(machine, "time", lambda run, repetitions: Timing(1.25, 1.0, repetitions))
    prepared = Prepared(lambda: None, lambda: (Check("output", 0.0, 1.0),), Work(bytes=3e9, flops=7e11))
    case = cases.Case("one", lambda machine: prepared, bandwidth_bar=0.8)
    monkeypatch.setattr(measure, "all_cases", lambda sizes, scope: iter([case]))
    (row,) = Bench(machine, tiny, little, CARD).rows("one")
    assert row.bandwidth_share == pytest.approx(0.8)
    assert row.flops_share == pytest.approx(0.8)
    assert row_json(row)["share"] == pytest.approx(0.8)
    assert row.bar
    assert (row.bar.value, row.bar.limit, row.bar.at_least) == (row.bandwidth_share, 0.8, True)


def test_bars_of_both_kinds() -> None:
    for value, at_least, holds in ((0.81, True, True), (0.79, True, False), (1.2, False, True), (1.3, False, False)):
        assert Bar("x", value, 0.8 if at_least else 1.25, at_least).holds is holds
    short = Row("slow", bar=Bar("share of the measured bandwidth", 0.5, 0.8, at_least=True))
    report = Report({"device": "d", "commit": "c", "date": "t"}, CARD, {}, [short])
    assert report.short == ["slow"]
    assert report.numbers_hold  # a speed is not a number that is wrong
    assert "SHORT: 0.5" in line(short)
    assert row_json(short)["bar"]["result"] == "short"


def test_what_is_not_a_number_does_not_hold() -> None:
    assert not Check("x", float("nan"), 1.0).holds


def test_the_released_work_is_as_the_model_s_cost_on_paper() -> None:
    """One canvas: 0.76 TFLOP and 3.2 GB in the head; 0.76 GB of fp8 experts a layer."""

    names = [case.name for case in all_cases(RELEASED, WHOLE)]
    assert len(set(names)) == len(names)
    assert "attention full fp8 cache, 1 canvas behind 261,888" in names
    rows, vocabulary, hidden = RELEASED.canvas, RELEASED.vocabulary, RELEASED.hidden
    assert 4 * rows * vocabulary * hidden == pytest.approx(0.76e12, rel=0.01)
    shape = RELEASED.experts
    assert 3 * shape.experts * shape.inner * shape.hidden == pytest.approx(0.76e9, rel=0.01)
