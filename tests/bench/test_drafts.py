"""What drafts save: what a point is made of, what a run leaves, the tasks, and errors as they are planted."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from dgemma_build.accept.planted import Planter
from dgemma_build.bench import drafters, drafts
from dgemma_build.bench.__main__ import MID
from dgemma_build.bench.drafted import Answer, Answers
from dgemma_build.bench.report import Environment
from dgemma_build.bench.revisions import Task, revisions
from dgemma_build.demo.skills import SKILLS, held_out_set, is_held_out, sudoku_template
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_runtime.codec import Codec

DEMO = Path(__file__).resolve().parents[2] / "build/checkpoints/demo"
ENVIRONMENT = Environment("a machine, 2 cores", "abc", "2026-11-21 12:00", 0.1, 2, {"torch": "2"})
TASKS = [Task((("user", "?"),), "yes".__eq__, "yes")] * 2


def answers(seconds: float, *steps: tuple[int, ...]) -> Answers:
    return Answers(tuple(Answer(np.zeros(10, np.int32), "yes", each) for each in steps), seconds)


def skills() -> tuple[drafts.SkillPoint, ...]:
    off = [answers(seconds, (4, 2), (3,)) for seconds in (2.0, 4.0, 1.0)]
    drafted = [answers(seconds, (1, 1), (1,)) for seconds in (1.0, 1.0, 1.0)]
    runs = {drafts.OFF: off, drafts.ORACLE: drafted}
    return tuple(drafts.skill_point("json", name, TASKS, found, off) for name, found in runs.items())


def clock() -> drafts.ClockPoint:
    whole, half = ([answers(seconds, (steps,))] * 3 for seconds, steps in ((9.0, 8), (5.0, 4)))
    return drafts.clock_point(1, "lookup", 8, whole, half, [answers(2.7, (1,)), answers(2.0, (1,)), answers(9.0, (1,))])


def test_a_skill_point_holds_medians() -> None:
    off, drafted = skills()
    assert (off.steps_per_canvas, off.tokens_per_second, off.times_off) == (3.0, 10.0, 1.0)
    assert (drafted.steps_per_canvas, drafted.tokens_per_second, drafted.times_off) == (1.0, 20.0, 2.0)
    assert (drafted.right, drafted.of) == (2, 2)


def test_a_clock_point_holds_saved_time_over_that_of_the_saved_steps() -> None:
    point = clock()
    assert (point.steps_saved, point.step_ms) == (7, 1000.0)
    assert point.saved_ms == pytest.approx(6300.0)
    assert point.saved_share == pytest.approx(0.9)


def test_report_of_a_run(tmp_path: Path) -> None:
    points = drafts.Points((*skills(), replace(skills()[0], kind="rename")), (clock(),))  # which nobody drafted

    console = Console(record=True, width=200, file=io.StringIO())
    for table in drafts.tables(points, ENVIRONMENT):
        console.print(table)
    drafts.write(points, ENVIRONMENT, tmp_path)

    text = console.export_text()
    row = next(line for line in text.splitlines() if "oracle" in line)
    assert [column.strip() for column in row.split("│")[1:-1]] == ["json", "oracle", "1.00", "20", "2.00", "2/2"]
    assert "90.0%" in text
    document = json.loads((tmp_path / drafts.RESULT).read_text())
    assert [one["drafter"] for one in document["points"]] == ["off", "oracle", "off", "lookup"]
    assert "<svg" in (tmp_path / drafts.PLOT).read_text()


# ---------------------------------------------------------------- the clock


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a small odd denoiser and of a drafter for it, both of random weights."""
    folder = tmp_path_factory.mktemp("odd")
    odd = replace(MID, checkpoint=write_checkpoint(folder / "odd_a", "odd_a"), engine=folder / "engine")
    build_engine(BuildRequest(odd.checkpoint, odd.engine))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafters, "GENERATED", folder)
        return odd.engine, drafters.random_drafter(odd)


def clock_of(engines: tuple[Path, Path]) -> list[drafts.ClockPoint]:
    return drafts.measure_clock(*engines, [2], 1, 4, lambda text: None)


def test_on_the_clock_every_contender_drafts(engines: tuple[Path, Path]) -> None:
    names = ["lookup", "model", "client, direct", "client, halves"]
    assert [(point.drafter, point.steps_saved) for point in clock_of(engines)] == [(name, 3) for name in names]


@pytest.mark.parametrize(
    ("failing", "drafter"),
    [("drafting.drafting.propose", "lookup"), ("engines.onnxruntime.OnnxRuntimeEngine.draft", "model")],
)
def test_a_drafter_that_fails_ends_the_clock(
    engines: tuple[Path, Path], failing: str, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"dgemma_runtime.{failing}", Mock(side_effect=ValueError))
    with pytest.raises(RuntimeError, match=f"{drafter} at 2: 2 of 2 canvases had no draft"):
        clock_of(engines)


# ---------------------------------------------------------------- tasks


def test_revisions_are_the_same_every_time_and_their_answers_are_right() -> None:
    found = revisions(7)
    turns = ["json, changed", "table, changed", "json, again", "table, again"]
    assert list(found) == ["rename", "fix", *turns]
    for kind, tasks in revisions(5).items():
        assert [task.messages for task in found[kind][:5]] == [task.messages for task in tasks]
        assert all(task.check(task.answer) and is_held_out(task.messages[-1][1]) for task in tasks)
        told = [content for task in tasks for role, content in task.messages if role == "assistant"]
        assert len(told) == (5 if kind in turns else 0)
        same = [task.check(answer) for task, answer in zip(tasks, told, strict=False)]
        assert same == ["again" in kind] * len(told)


def test_a_sudoku_template_has_a_hole_for_each_blank() -> None:
    assert sudoku_template("Solve this 4x4 sudoku:\n1_34\n__12\n2143\n4321") == (
        *("1", 1, "34\n", 1, 1, "12\n2143\n4321"),
    )


# ---------------------------------------------------------------- planted errors


@pytest.mark.parametrize("skill", list(SKILLS))
def test_planted_errors_are_of_the_kind_of_what_they_replace(skill: str) -> None:
    codec = Codec(Tokenizer.from_file(str(DEMO / "tokenizer.json")), "<bos>")
    planter = Planter(codec, 7)
    kinds = [{*codec.encode("1234").tolist()[1:]}, *map(set, planter._kinds.values())]
    for example in held_out_set(skill, 20):
        planted = planter.plant(example.answer, "1234")
        draft = planted.draft[:-1]
        assert 1 <= len(planted.places) <= 4
        assert np.flatnonzero(draft != planted.truth).tolist() == list(planted.places)
        assert (planted.draft[-1], planted.right(draft), planted.right(planted.truth)) == (7, 0, len(planted.places))
        answer = set(planted.truth)
        allowed = kinds if any(kind & answer for kind in kinds) else [answer]  # which has no token of a kind
        for place in planted.places:
            assert any({draft[place], planted.truth[place]} <= kind for kind in allowed)
