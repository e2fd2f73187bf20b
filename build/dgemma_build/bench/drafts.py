"""What drafts save: python -m dgemma_build.bench.drafts [--quick] [--output DIRECTORY].

Two parts, both on our service in this process, in interleaved rounds.

The demo's held-out skills and the revisions of the checkpoint beside it, eight requests at once, with no drafter, with
each drafter, and with the answers themselves as the client's drafts (`oracle`): steps per canvas, tokens per second,
right answers.

The clock, on the mid-size model at 1 and 8 at once: seconds that a draft saves beside the steps that it saves. The
model's weights and its drafter's are random, so no draft could be right; every draft is shown, and the stopping rule is
loosened until it counts as right, which changes nothing of what a pass costs. A canvas that had no draft ends the run.
Without a draft a canvas takes a fixed number of steps; what a step takes is the difference to half as many.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dgemma_build.bench.__main__ import DEMO, GENERATED, MID, ROOT, THREADS, prepare
from dgemma_build.bench.drafted import QUEUE_SIZE, Answers, ask
from dgemma_build.bench.drafters import demo_drafter, random_drafter
from dgemma_build.bench.figure import GREEN, GREY, svg_figure
from dgemma_build.bench.inprocess import running_service
from dgemma_build.bench.report import Environment, points_line
from dgemma_build.bench.revisions import Task, revisions, skill_tasks
from dgemma_build.demo.skills import SKILLS
from dgemma_build.signals import exit_on_sigterm
from dgemma_runtime.chat import ChatTemplate
from dgemma_runtime.contract import Int32Array, Manifest, ModelSpec
from dgemma_runtime.parameters import VERIFICATIONS
from dgemma_runtime.service import Service

RESULT, PLOT = "drafts.json", "drafts.svg"
OFF, ORACLE, CLIENT, LOOKUP, MODEL = "off", "oracle", "client", "lookup", "model"
SETTINGS: dict[str, Any] = {"threads": THREADS, "queue_size": QUEUE_SIZE, "prefix_cache": False}
REVISIONS = replace(
    DEMO, checkpoint=ROOT / "build/checkpoints/demo-revisions", engine=GENERATED / "engines/demo-revisions"
)
STEPS = 8  # of a canvas without a draft, on the mid-size model
_ANY_DRAFT_COUNTS: dict[str, Any] = {"stability_threshold": 0, "confidence_threshold": 1e3, "draft_confidence": 0}


@dataclass(frozen=True)
class SkillPoint:
    """One kind of task under one drafter; medians over the rounds."""

    kind: str
    drafter: str
    steps_per_canvas: float
    tokens_per_second: float
    times_off: float  # tokens per second over those without a drafter, of the same round
    right: int
    of: int


@dataclass(frozen=True)
class ClockPoint:
    """The mid-size model under one drafter; medians over the rounds."""

    concurrency: int
    drafter: str
    steps_saved: int  # a canvas
    step_ms: float  # of all canvases together, without a draft
    saved_ms: float  # of a canvas of every request
    saved_share: float  # of what the saved steps would have taken


# ---------------------------------------------------------------- skills


def measure_skills(
    directory: Path,
    drafter: Path | None,
    kinds: Mapping[str, Sequence[Task]],
    rounds: int,
    say: Callable[[str], None],
) -> list[SkillPoint]:
    """Every kind of task."""
    points = []
    template = ChatTemplate.load(directory)
    with running_service(directory, 8, draft_model=drafter and str(drafter), **SETTINGS) as service:
        for kind, tasks in kinds.items():
            say(f"demo: {kind}")
            prompts = [
                template.render(task.chat(), None, add_generation_prompt=True, continue_final_message=False)
                for task in tasks
            ]
            points += _kind(service, kind, tasks, prompts, (OFF, LOOKUP, *([MODEL] if drafter else [])), rounds)
    return points


def _kind(
    service: Service, kind: str, tasks: Sequence[Task], prompts: list[str], drafters: Sequence[str], rounds: int
) -> list[SkillPoint]:
    own = [answer.token_ids for answer in ask(service, prompts, drafter=OFF).each]  # warms up, too
    runs: dict[str, list[Answers]] = {}
    for _ in range(rounds):
        for drafter in drafters:
            runs.setdefault(drafter, []).append(ask(service, prompts, drafter=drafter))
        runs.setdefault(ORACLE, []).append(ask(service, prompts, drafts=own))
    return [skill_point(kind, drafter, tasks, found, runs[OFF]) for drafter, found in runs.items()]


def skill_point(
    kind: str, drafter: str, tasks: Sequence[Task], runs: Sequence[Answers], off: Sequence[Answers]
) -> SkillPoint:
    """Of all rounds."""
    last = runs[-1]
    return SkillPoint(
        kind=kind,
        drafter=drafter,
        steps_per_canvas=median(run.steps_per_canvas for run in runs),
        tokens_per_second=median(run.tokens_per_second for run in runs),
        times_off=median(run.tokens_per_second / other.tokens_per_second for run, other in zip(runs, off, strict=True)),
        right=sum(task.check(answer.text) for task, answer in zip(tasks, last.each, strict=True)),
        of=len(tasks),
    )


# ---------------------------------------------------------------- the clock


def measure_clock(
    directory: Path, drafter: Path, levels: Sequence[int], rounds: int, steps: int, say: Callable[[str], None]
) -> list[ClockPoint]:
    """Every number of requests at once; one canvas each."""
    points, model = [], Manifest.load(directory).model
    for concurrency in levels:
        # halves want a second slot per canvas
        settings = {**SETTINGS, "max_model_len": 2048, "draft_model": str(drafter)}
        with running_service(directory, 2 * concurrency, **settings) as service:
            say(f"mid-size: {concurrency} at once")
            points += _clock(service, model, concurrency, rounds, steps)
    return points


def _clock(service: Service, model: ModelSpec, concurrency: int, rounds: int, steps: int) -> list[ClockPoint]:
    length, vocabulary = model.canvas_length, model.vocab_size
    text = np.random.default_rng(concurrency).integers(20, vocabulary, (concurrency, 48), np.int32)
    prompts: list[Int32Array] = [np.tile(row, 2) for row in text]  # so that lookup finds what follows
    fixed: dict[str, Any] = {"max_tokens": length, "end_id": -1}

    def off(most: int) -> Answers:
        return ask(service, prompts, drafter=OFF, stability_threshold=-1, max_denoising_steps=most, **fixed)

    own = [answer.token_ids for answer in off(steps).each]
    contenders: dict[str, dict[str, Any]] = {name: {"drafter": name} for name in (LOOKUP, MODEL)}
    contenders |= {f"{CLIENT}, {mode}": {"drafts": own, "draft_verification": mode} for mode in VERIFICATIONS}
    runs: dict[str, list[Answers]] = {}
    half, whole = [], []
    for _ in range(rounds):
        whole.append(off(steps))
        for name, options in contenders.items():
            drafted = ask(service, prompts, max_denoising_steps=steps, **fixed, **_ANY_DRAFT_COUNTS, **options)
            if missing := drafted.undrafted(options.get("drafter", CLIENT)):  # it would stop as early, and cost less
                raise RuntimeError(f"{name} at {concurrency}: {missing} of {len(drafted.steps)} canvases had no draft")
            runs.setdefault(name, []).append(drafted)
        half.append(off(steps // 2))
    return [clock_point(concurrency, name, steps, whole, half, found) for name, found in runs.items()]


def clock_point(
    concurrency: int,
    drafter: str,
    steps: int,
    whole: Sequence[Answers],
    half: Sequence[Answers],
    drafted: Sequence[Answers],
) -> ClockPoint:
    """Of all rounds."""
    step_s = median(
        (one.seconds - other.seconds) / (steps - steps // 2) for one, other in zip(whole, half, strict=True)
    )
    saved_s = median(one.seconds - other.seconds for one, other in zip(whole, drafted, strict=True))
    saved = steps - int(drafted[0].steps.max())
    return ClockPoint(concurrency, drafter, saved, 1000 * step_s, 1000 * saved_s, saved_s / (saved * step_s))


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class Points:
    """Of both parts."""

    skills: tuple[SkillPoint, ...]
    clock: tuple[ClockPoint, ...]


def run(quick: bool, say: Callable[[str], None]) -> Points:
    """Build what is missing and measure."""
    prepare(DEMO)
    count, rounds = (8, 2) if quick else (40, 5)
    kinds = {skill: skill_tasks(skill, count) for skill in SKILLS}
    skills = measure_skills(DEMO.engine, demo_drafter(), kinds, rounds, say)
    prepare(REVISIONS)
    skills += measure_skills(REVISIONS.engine, None, revisions(count), rounds, say)
    prepare(MID)
    levels, rounds, steps = ((1,), 1, 4) if quick else ((1, 8), 5, STEPS)
    clock = measure_clock(MID.engine, random_drafter(MID), levels, rounds, steps, say)
    return Points(tuple(skills), tuple(clock))


def tables(points: Points, environment: Environment) -> tuple[Table, Table]:
    """One row per point."""
    skills = Table(title=f"{environment}, {environment.threads} threads", title_justify="left")
    for heading in ("task", "drafter"):
        skills.add_column(heading)
    for heading in ("steps/canvas", "tokens/s", "x off", "right"):
        skills.add_column(heading, justify="right")
    for point in points.skills:
        figures = (f"{point.steps_per_canvas:.2f}", f"{point.tokens_per_second:,.0f}", f"{point.times_off:.2f}")
        skills.add_row(point.kind, point.drafter, *figures, f"{point.right}/{point.of}")
    clock = Table(title="mid-size model: what is saved in steps, in time", title_justify="left")
    clock.add_column("drafter")
    for heading in ("at once", "ms/step", "steps saved", "ms saved", "of their time"):
        clock.add_column(heading, justify="right")
    for item in points.clock:
        clock.add_row(
            item.drafter,
            str(item.concurrency),
            f"{item.step_ms:,.0f}",
            str(item.steps_saved),
            f"{item.saved_ms:,.0f}",
            f"{item.saved_share:.1%}",
        )
    return skills, clock


def plot(points: Points, environment: Environment, path: Path) -> None:
    """Steps per canvas and tokens per second over those without a drafter, by task."""
    kinds = list(dict.fromkeys(point.kind for point in points.skills))
    drafters = list(dict.fromkeys(point.drafter for point in points.skills))
    colours = dict(zip(drafters, (GREY, GREEN, "#52616f", "#c5d8a4"), strict=False))
    panels: Mapping[str, Callable[[SkillPoint], float]] = {
        "steps per canvas": lambda point: point.steps_per_canvas,
        "tokens/s, times those without a drafter": lambda point: point.times_off,
    }
    with svg_figure(path, f"Demo model, drafts; {environment}", (11, 3.2), columns=2) as axes:
        for axis, (title, value) in zip(axes[0], panels.items(), strict=True):
            width = 0.8 / len(drafters)
            for index, drafter in enumerate(drafters):
                mine = [point for point in points.skills if point.drafter == drafter]
                heights = [value(point) for point in mine]
                places = [kinds.index(point.kind) + index * width for point in mine]
                axis.bar(places, heights, width, label=drafter, color=colours[drafter])
            axis.set_xticks(
                [place + 0.4 - width / 2 for place in range(len(kinds))], kinds, fontsize=6, rotation=25, ha="right"
            )
            axis.set_title(title, fontsize=9)
            axis.tick_params(axis="y", labelsize=7)
            axis.legend(fontsize=7)


def write(points: Points, environment: Environment, directory: Path) -> None:
    """The JSON line and the plot as files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RESULT).write_text(line(points, environment) + "\n")
    plot(points, environment, directory / PLOT)


def line(points: Points, environment: Environment) -> str:
    """Everything, on one line."""
    return points_line("drafts", [*points.skills, *points.clock], environment)


def main() -> None:
    """Tables on stderr, the JSON line on stdout and, but for a quick run, both it and the plot as files."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.bench.drafts", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer tasks, one at once; writes nothing without --output"
    )
    parser.add_argument("--output", type=Path, help=f"directory for {RESULT} and {PLOT}; the repository's benchmarks/")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=140)
    environment = Environment.here(THREADS)
    with console.status("starting") as status:
        points = run(arguments.quick, status.update)
    for table in tables(points, environment):
        console.print(table)
    print(line(points, environment))
    if output := arguments.output or (None if arguments.quick else ROOT / "benchmarks"):
        write(points, environment, output)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
