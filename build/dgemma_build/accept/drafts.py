"""Rows about drafts: what one pass accepts, what is repaired, what lookup, a network and pins save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_build.accept.canvas_audit import Audit, audited
from dgemma_build.accept.planted import Planter
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.bench.__main__ import MID, prepare
from dgemma_build.bench.drafted import QUEUE_SIZE, Answers, ask
from dgemma_build.bench.drafters import random_drafter
from dgemma_build.bench.drafts import STEPS, measure_clock
from dgemma_build.bench.inprocess import running_service
from dgemma_build.bench.revisions import Task, revisions, skill_tasks
from dgemma_build.demo.skills import SKILLS, sudoku_template
from dgemma_runtime.chat import ChatTemplate
from dgemma_runtime.parameters import VERIFICATIONS, GenerationParameters
from dgemma_runtime.service import Service

ONE_PASS, REPAIRED_POINTS, LOOKUP_STEPS, DRAFTER_STEPS, POINTS, CLOCK_SHARE = 0.95, 2.0, 0.5, 0.6, 1.0, 0.95
DEFAULT = GenerationParameters.draft_verification
THREADS = 2


def _count(setting: Setting) -> int:
    return 10 if setting.quick else 100


@contextmanager
def _audited_service(directory: Path, draft_model: Path | None = None) -> Iterator[tuple[Service, Audit]]:
    """On the demo's engine; every canvas is held to the rule."""
    drafter = {} if draft_model is None else {"draft_model": str(draft_model)}
    with audited() as audit, running_service(directory, 8, THREADS, queue_size=QUEUE_SIZE, **drafter) as service:
        yield service, audit


@dataclass(frozen=True)
class _Scored:
    """Answers to tasks of one kind."""

    answers: Answers
    right: int

    @staticmethod
    def of(tasks: Sequence[Task], answers: Answers) -> _Scored:
        right = sum(task.check(answer.text) for task, answer in zip(tasks, answers.each, strict=True))
        return _Scored(answers, right)


def _prompts(directory: Path, tasks: Sequence[Task]) -> list[str]:
    template = ChatTemplate.load(directory)
    return [
        template.render(task.chat(), None, add_generation_prompt=True, continue_final_message=False) for task in tasks
    ]


def _percent(scored: Mapping[str, _Scored]) -> float:
    """Right answers, of 100."""
    return 100 * sum(one.right for one in scored.values()) / sum(len(one.answers.each) for one in scored.values())


def _steps(scored: Mapping[str, _Scored]) -> int:
    return sum(int(one.answers.steps.sum()) for one in scored.values())


def _canvases(scored: Mapping[str, _Scored]) -> int:
    return sum(len(one.answers.steps) for one in scored.values())


def _by_kind(scored: Mapping[str, _Scored]) -> dict[str, Any]:
    return {
        kind: {"right": one.right, "of": len(one.answers.each), "steps_per_canvas": one.answers.steps_per_canvas}
        for kind, one in scored.items()
    }


@cache
def _skills(count: int) -> dict[str, list[Task]]:
    return {skill: skill_tasks(skill, count) for skill in SKILLS}


@cache
def _plain(directory: Path, count: int) -> dict[str, _Scored]:
    """The demo's skills without drafts."""
    with running_service(directory, 8, THREADS, queue_size=QUEUE_SIZE) as service:
        return {
            kind: _Scored.of(tasks, ask(service, _prompts(directory, tasks), drafter="off"))
            for kind, tasks in _skills(count).items()
        }


def _audit_result(figure: str, passed: bool, audit: Audit, details: dict[str, Any]) -> Result:
    """No figure is worth anything where a canvas broke the rule."""
    faults = "; ".join(dict.fromkeys(audit.faults))
    return Result(f"{figure}; {faults}" if faults else figure, passed and not faults, details)


# ---------------------------------------------------------------- oracle, planted errors


def _oracle(setting: Setting) -> Result:
    """Every answer is offered as a draft of itself. One that was wrong may become another."""
    directory, count = setting.engine("demo"), _count(setting)
    plain, figures, details = _plain(directory, count), [], {}
    shares, changed = {}, {}
    with _audited_service(directory) as (service, audit):
        for mode in VERIFICATIONS:
            again = {
                kind: _Scored.of(
                    tasks,
                    ask(
                        service,
                        _prompts(directory, tasks),
                        drafts=[answer.token_ids for answer in plain[kind].answers.each],
                        draft_verification=mode,
                    ),
                )
                for kind, tasks in _skills(count).items()
            }
            steps = np.concatenate([one.answers.steps for one in again.values()])
            shares[mode] = float((steps == 1).mean())
            changed[mode] = _changed(_skills(count), plain, again)
            figures.append(
                f"{mode} {shares[mode]:.1%} of {len(steps)} canvases in one pass, {len(changed[mode])} texts changed, "
                f"{sum(changed[mode])} of them right before"
            )
            details[mode] = _by_kind(again)
    passed = shares[DEFAULT] >= ONE_PASS and not any(changed[DEFAULT])
    return _audit_result("; ".join(figures), passed, audit, details)


def _changed(
    kinds: Mapping[str, Sequence[Task]], before: Mapping[str, _Scored], after: Mapping[str, _Scored]
) -> list[bool]:
    """Of every answer whose tokens are not the same, whether it was right before."""
    return [
        task.check(one.text)
        for kind, tasks in kinds.items()
        for task, one, other in zip(tasks, before[kind].answers.each, after[kind].answers.each, strict=True)
        if not np.array_equal(one.token_ids, other.token_ids)
    ]


def _planted(setting: Setting) -> Result:
    """One to four fluent errors in a right answer, offered as the client's draft with full confidence."""
    directory, count = setting.engine("demo"), _count(setting)
    plain = _plain(directory, count)
    with _audited_service(directory) as (service, audit):
        (end_id, *_) = service.defaults.end_ids
        planter = Planter(service.codec, end_id)
        planted = {
            kind: [planter.plant(task.answer, _digits(kind)) for task in tasks]
            for kind, tasks in _skills(count).items()
        }
        runs = {"plain": plain}
        for mode in VERIFICATIONS:
            runs[mode] = {
                kind: _Scored.of(
                    tasks,
                    ask(
                        service,
                        _prompts(directory, tasks),
                        drafts=[one.draft for one in planted[kind]],
                        draft_verification=mode,
                    ),
                )
                for kind, tasks in _skills(count).items()
            }
    total = sum(len(one.places) for items in planted.values() for one in items)
    repaired = {
        name: sum(
            one.right(answer.token_ids)
            for kind, items in planted.items()
            for one, answer in zip(items, run[kind].answers.each, strict=True)
        )
        for name, run in runs.items()
    }
    shown = [f"{name} {100 * right / total:.1f}" for name, right in repaired.items()]
    accuracy = [f"{name} {_percent(run):.1f}" for name, run in runs.items()]
    figure = f"of 100 of {total} tokens right: {', '.join(shown)}; answers: {', '.join(accuracy)}"
    passed = 100 * (repaired["plain"] - repaired[DEFAULT]) / total <= REPAIRED_POINTS
    details = {name: _by_kind(run) for name, run in runs.items()} | {"planted": total, "repaired": repaired}
    return _audit_result(figure, passed, audit, details)


def _unfinished(setting: Setting) -> Result:
    """What the denoiser itself would say after one step: fluent, and wrong as a denoiser is."""
    directory, count = setting.engine("demo"), _count(setting)
    runs = {"plain": _plain(directory, count)}
    with _audited_service(directory) as (service, audit):
        prompts = {kind: _prompts(directory, tasks) for kind, tasks in _skills(count).items()}
        drafts = {kind: ask(service, each, drafter="off", max_denoising_steps=1) for kind, each in prompts.items()}
        runs["one step"] = {kind: _Scored.of(tasks, drafts[kind]) for kind, tasks in _skills(count).items()}
        for mode in VERIFICATIONS:
            runs[mode] = {
                kind: _Scored.of(
                    tasks,
                    ask(
                        service,
                        prompts[kind],
                        drafts=[answer.token_ids for answer in drafts[kind].each],
                        draft_verification=mode,
                    ),
                )
                for kind, tasks in _skills(count).items()
            }
    figure = "right, of 100: " + ", ".join(f"{name} {_percent(run):.1f}" for name, run in runs.items())
    passed = _percent(runs["plain"]) - _percent(runs[DEFAULT]) <= REPAIRED_POINTS
    return _audit_result(figure, passed, audit, {name: _by_kind(run) for name, run in runs.items()})


def _digits(kind: str) -> str:
    """That may stand in an answer of this skill."""
    return "123456789"[: int(kind[-1])] if kind.startswith("sudoku") else "0123456789"


# ---------------------------------------------------------------- drafters


def _with_and_without(
    directory: Path,
    kinds: Mapping[str, list[Task]],
    drafter: str,
    draft_model: Path | None = None,
) -> tuple[dict[str, _Scored], dict[str, _Scored], Audit]:
    """Every kind's tasks, with no drafter and with one."""
    with _audited_service(directory, draft_model) as (service, audit):
        prompts = {kind: _prompts(directory, tasks) for kind, tasks in kinds.items()}
        off, on = (
            {kind: _Scored.of(tasks, ask(service, prompts[kind], drafter=one)) for kind, tasks in kinds.items()}
            for one in ("off", drafter)
        )
    return off, on, audit


def _lookup(setting: Setting) -> Result:
    """On the checkpoint that revises; the steps a canvas are of all tasks together, every kind's own are shown, too."""
    off, on, audit = _with_and_without(setting.engine("demo-revisions"), revisions(_count(setting)), "lookup")
    before, after = _steps(off) / _canvases(off), _steps(on) / _canvases(on)
    kinds = [f"{kind} {on[kind].answers.steps_per_canvas / off[kind].answers.steps_per_canvas:.0%}" for kind in on]
    figure = (
        f"{after / before:.0%} of the steps ({before:.2f} -> {after:.2f} a canvas; {', '.join(kinds)}), right "
        f"{_percent(off):.1f} -> {_percent(on):.1f} of 100"
    )
    passed = after <= LOOKUP_STEPS * before and _percent(off) - _percent(on) <= POINTS
    return _audit_result(figure, passed, audit, {"off": _by_kind(off), "lookup": _by_kind(on)})


def _network(setting: Setting) -> Result:
    """The trained drafter that is shipped for the demo."""
    kinds = _skills(_count(setting))
    off, on, audit = _with_and_without(setting.engine("demo"), kinds, "model", setting.drafter("demo"))
    before, after = _steps(off) / _canvases(off), _steps(on) / _canvases(on)
    figure = (
        f"{after / before:.0%} of the steps ({before:.2f} -> {after:.2f} a canvas), right {_percent(off):.1f} -> "
        f"{_percent(on):.1f} of 100"
    )
    passed = after <= DRAFTER_STEPS * before and _percent(off) - _percent(on) <= POINTS
    return _audit_result(figure, passed, audit, {"off": _by_kind(off), "model": _by_kind(on)})


# ---------------------------------------------------------------- pins


def _pinned(setting: Setting) -> Result:
    """Clues and line ends pinned; a text that differs from the puzzle in any of them counts."""
    directory, count = setting.engine("demo"), _count(setting)
    kinds = {kind: tasks for kind, tasks in _skills(count).items() if kind.startswith("sudoku")}
    plain = {kind: _plain(directory, count)[kind] for kind in kinds}
    differ = 0
    pinned: dict[str, _Scored] = {}
    with _audited_service(directory) as (service, audit):
        for kind, tasks in kinds.items():
            templates = [sudoku_template(task.messages[0][1]) for task in tasks]
            answers = ask(service, _prompts(directory, tasks), templates=templates, drafter="off")
            pinned[kind] = _Scored.of(tasks, answers)
            differ += sum(
                not _holds(task.messages[0][1], answer.text) for task, answer in zip(tasks, answers.each, strict=True)
            )
    figure = (
        f"right {_percent(plain):.1f} -> {_percent(pinned):.1f} of 100, {differ} grids with another clue, "
        f"{_steps(plain) / _canvases(plain):.2f} -> {_steps(pinned) / _canvases(pinned):.2f} steps"
    )
    passed = not differ and _percent(pinned) >= _percent(plain)
    return _audit_result(figure, passed, audit, {"plain": _by_kind(plain), "pinned": _by_kind(pinned)})


def _holds(prompt: str, text: str) -> bool:
    """Whether the grid `text` has every clue and line end of the puzzle."""
    grid = "\n".join(prompt.split("\n")[1:])
    return len(text) == len(grid) and all(given in ("_", found) for given, found in zip(grid, text, strict=True))


# ---------------------------------------------------------------- the clock


def _clock(setting: Setting) -> Result:
    """Seconds saved over what the saved steps would have taken; the verification that is not the default is shown."""
    prepare(MID)
    points = measure_clock(MID.engine, random_drafter(MID), (1, 8), 5, STEPS, lambda text: None)
    figure = ", ".join(f"{point.drafter} at {point.concurrency}: {point.saved_share:.0%}" for point in points)
    others = {f"client, {mode}" for mode in VERIFICATIONS if mode != DEFAULT}
    passed = all(point.saved_share >= CLOCK_SHARE for point in points if point.drafter not in others)
    return Result(figure, passed, {"points": [asdict(point) for point in points]})


ROWS: tuple[Row, ...] = (
    Row(
        "oracle drafter: the demo's own answers as drafts",
        f"at least {ONE_PASS:.0%} of canvases in one pass, no right answer changed ({DEFAULT}, the default)",
        _oracle,
    ),
    Row(
        "adversarial drafter: errors planted in right answers",
        f"as many tokens right as without a draft, minus {REPAIRED_POINTS:g} points ({DEFAULT}, the default)",
        _planted,
    ),
    Row(
        "unfinished drafts: the demo's own answers after one step",
        f"as many answers right as without a draft, minus {REPAIRED_POINTS:g} points ({DEFAULT}, the default)",
        _unfinished,
        quick=False,
    ),
    Row(
        "drafts by prompt lookup, revision and copying tasks",
        f"at most {LOOKUP_STEPS:.0%} of the steps a canvas, at most {POINTS:g} point under",
        _lookup,
        quick=False,
    ),
    Row(
        "drafts by the trained drafter, demo skills",
        f"at most {DRAFTER_STEPS:.0%} of the steps a canvas, at most {POINTS:g} point under",
        _network,
        quick=False,
    ),
    Row("pinned drafts: sudoku with its clues pinned", "no pin differs; at least as many right", _pinned),
    Row(
        "drafts on the clock, mid-size: time saved over that of the saved steps",
        f"at least {CLOCK_SHARE:.0%} at 1 and 8 at once, drafter's cost included",
        _clock,
        quick=False,
    ),
)
