"""A cheaper denoiser as a drafter: how its cost is counted, and when it would pay."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from dgemma_build.bench import self_draft
from dgemma_build.bench.drafted import Answer, Answers
from dgemma_build.bench.report import Environment

ENVIRONMENT = Environment("a machine, 2 cores", "abc", "2026-11-21 12:00", 0.1, 2, {"torch": "2"})


def answers(*steps: tuple[int, ...], ids: int = 0) -> Answers:
    return Answers(tuple(Answer(np.full(10, ids, np.int32), "yes", each) for each in steps), 1.0)


def made(of_full_step: float) -> self_draft.Gain:
    """Two canvases of six steps each; four of the drafter's and two behind them."""
    return self_draft.gain("int4", 4, answers((4, 4)), answers((2, 2)), answers((6, 6)), of_full_step, (1, 1))


def test_the_cost_is_all_in_steps_of_the_full_denoiser() -> None:
    assert made(0.5).cost_steps == pytest.approx(4 * 0.5 + 2)
    assert made(0.5).steps_off == 6


def test_it_breaks_even_where_its_steps_cost_what_they_save() -> None:
    breaks_even = made(0.5).break_even
    assert breaks_even == pytest.approx((6 - 2) / 4)
    assert made(breaks_even).cost_steps == pytest.approx(6)


def test_the_count_of_prompts_may_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert [self_draft.options(words).count for words in ([], ["--quick"], ["--count", "12"])] == [40, 5, 12]
    with pytest.raises(SystemExit):
        self_draft.options(["--count", "0"])
    assert "--count 0: must be at least 1" in capsys.readouterr().err


def test_tables_show_each_engine_and_each_drafter() -> None:
    runs = [(0.02, answers((5,), ids=1)), (0.04, answers((5,), ids=1))]
    full = [(0.04, answers((5,))), (0.05, answers((5,)))]
    cost = self_draft._cost("demo", "int4", 1, runs, full)
    assert cost.step_ms == pytest.approx(30)
    assert cost.of_full_step == pytest.approx(0.65)
    assert cost.equal_tokens == 0.0

    console = Console(record=True, width=200, file=io.StringIO())
    for table in self_draft.tables([cost], [made(0.5)], ENVIRONMENT):
        console.print(table)
    text = console.export_text()
    assert "0.65" in text
    assert "int4, 4 at most" in text
