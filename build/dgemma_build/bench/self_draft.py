"""Whether a cheaper denoiser pays as a drafter: python -m dgemma_build.bench.self_draft [--quick] [--output DIRECTORY].

Drafters are engines of the same checkpoint: its large matrices in 8 or 4 bits, or half as many experts a token. Each
makes whole canvases by itself, in all its steps or cut short after one or two; its answers are then the client's drafts
of the full denoiser. What that costs is counted in steps of the full denoiser:

    cost = drafter's steps * (its step's time / a full step's time) + the full denoiser's steps with the draft

and pays where it is less than the steps without a draft. The mid-size model's weights are random and its canvases do
not settle, so only its times and the share of equal tokens are taken, canvases of a few steps from the same noise.
Keys and values of the context count for nothing here: a drafter with weights of its own needs them too, so the true
cost is higher.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dgemma_build.bench.__main__ import DEMO, GENERATED, MID, ROOT, THREADS, prepare
from dgemma_build.bench.drafted import QUEUE_SIZE, Answers, ask
from dgemma_build.bench.inprocess import running_service
from dgemma_build.bench.report import Environment, points_line
from dgemma_build.bench.revisions import skill_tasks
from dgemma_build.bench.scenario import Scenario
from dgemma_build.demo.skills import SKILLS
from dgemma_build.demo.tokenizer import render_turn
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.signals import exit_on_sigterm
from dgemma_runtime.contract import Int32Array, Manifest
from dgemma_runtime.service import Service

RESULT = "self_draft.json"
SETTINGS: dict[str, Any] = {"threads": THREADS, "queue_size": QUEUE_SIZE, "prefix_cache": False}
CHEAPER = ("int8", "int4", "half the experts")
CUTS = (None, 2, 1)  # steps that a drafter may take; None: until its canvas has settled
_STEPS = 4  # of a timed canvas


@dataclass(frozen=True)
class Cost:
    """One cheaper denoiser under one model."""

    model: str
    drafter: str
    concurrency: int
    step_ms: float  # of all canvases together; median over the rounds, as the next
    of_full_step: float  # of the time of the full denoiser's, of the same round
    equal_tokens: float  # share of the canvases' tokens that are the full denoiser's, same noise and steps


@dataclass(frozen=True)
class Gain:
    """The demo's skills, drafted by a cheaper denoiser."""

    drafter: str
    most_steps: int  # of the drafter's canvas; 0: until it has settled
    draft_steps: float  # a canvas, that the drafter took
    steps: float  # a canvas, of the full denoiser behind it
    steps_off: float  # without a draft
    of_full_step: float  # what a drafter's step costs
    cost_steps: float  # a canvas, all of it in steps of the full denoiser
    break_even: float  # `of_full_step` below which it would pay; 0 or less: never
    right: int  # answers
    right_off: int
    of: int


def engines(scenario: Scenario) -> dict[str, Path]:
    """The full denoiser's engine first, then the cheaper ones."""
    prepare(scenario)
    found = {"full": scenario.engine}
    for name in CHEAPER:
        checkpoint, precision = scenario.checkpoint, name
        if name == CHEAPER[-1]:
            checkpoint, precision = _fewer_experts(scenario), "fp32"
        found[name] = scenario.engine.with_name(f"{scenario.engine.name}-{name.replace(' ', '-')}")
        build_engine(BuildRequest(checkpoint, found[name], precision=precision))
    return found


def _fewer_experts(scenario: Scenario) -> Path:
    """The same weights under a config with half as many experts a token."""
    target = GENERATED / "checkpoints" / f"{scenario.checkpoint.name}-half-experts"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(scenario.checkpoint, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["top_k_experts"] //= 2
    path.write_text(json.dumps(config))
    return target


def _services(directories: dict[str, Path], stack: ExitStack, slots: int) -> dict[str, Service]:
    return {
        name: stack.enter_context(running_service(directory, slots, max_model_len=2048, **SETTINGS))
        for name, directory in directories.items()
    }


# ---------------------------------------------------------------- times


def measure_costs(
    model: str, directories: dict[str, Path], levels: Sequence[int], rounds: int, say: Callable[[str], None]
) -> list[Cost]:
    """Every engine at every number of requests at once, in turns."""
    length = Manifest.load(directories["full"]).model.canvas_length
    prompts = _prompts(model, directories["full"], max(levels))
    costs = []
    with ExitStack() as stack:
        services = _services(directories, stack, max(levels))
        for concurrency in levels:
            say(f"{model}: {concurrency} at once")
            runs: dict[str, list[tuple[float, Answers]]] = {}
            for _ in range(rounds):
                for name, service in services.items():
                    runs.setdefault(name, []).append(_timed(service, prompts[:concurrency], length))
            costs += [_cost(model, name, concurrency, runs[name], runs["full"]) for name in directories]
    return costs


def _prompts(model: str, directory: Path, count: int) -> list[str | Int32Array]:
    """Held-out ones of the demo, which knows nothing else; random ones."""
    if model == DEMO.name:
        return [render_turn(task.messages[0][1]) for task in skill_tasks("table", count)]
    vocabulary = Manifest.load(directory).model.vocab_size
    return list(np.random.default_rng(0).integers(20, vocabulary, (count, 64), np.int32))


def _timed(service: Service, prompts: Sequence[str | Int32Array], length: int) -> tuple[float, Answers]:
    """Seconds a step, and the answers of the longer of two runs."""
    fixed: dict[str, Any] = {"drafter": "off", "max_tokens": length, "end_id": -1, "stability_threshold": -1}
    short, long = (ask(service, prompts, max_denoising_steps=steps, **fixed) for steps in (1, 1 + _STEPS))
    return (long.seconds - short.seconds) / _STEPS, long


def _cost(
    model: str,
    name: str,
    concurrency: int,
    runs: Sequence[tuple[float, Answers]],
    full: Sequence[tuple[float, Answers]],
) -> Cost:
    pairs = list(zip(runs, full, strict=True))
    equal = [
        float((mine.token_ids == theirs.token_ids).mean())
        for mine, theirs in zip(runs[0][1].each, full[0][1].each, strict=True)
    ]
    step_ms = 1000 * median(seconds for seconds, _ in runs)
    ratio = median(mine[0] / theirs[0] for mine, theirs in pairs)
    return Cost(model, name, concurrency, step_ms, ratio, float(np.mean(equal)))


# ---------------------------------------------------------------- gains


def measure_gains(
    directories: dict[str, Path], costs: Sequence[Cost], count: int, say: Callable[[str], None]
) -> list[Gain]:
    """Every cheaper engine, whole and cut short, on `count` held-out prompts of every skill."""
    ratios = {cost.drafter: cost.of_full_step for cost in costs if cost.concurrency == 1}
    tasks = [task for skill in SKILLS for task in skill_tasks(skill, count)]
    prompts = [render_turn(task.messages[0][1]) for task in tasks]

    def right(answers: Answers) -> int:
        return sum(task.check(answer.text) for task, answer in zip(tasks, answers.each, strict=True))

    gains = []
    with ExitStack() as stack:
        services = _services(directories, stack, 8)
        off = ask(services["full"], prompts, drafter="off")
        for name in CHEAPER:
            for most in CUTS:
                say(f"demo: {name}, {most or 'all'} steps")
                limit: dict[str, Any] = {} if most is None else {"max_denoising_steps": most}
                drafts = ask(services[name], prompts, drafter="off", **limit)
                drafted = ask(services["full"], prompts, drafts=[answer.token_ids for answer in drafts.each])
                gains.append(gain(name, most, drafts, drafted, off, ratios[name], (right(drafted), right(off))))
    return gains


def gain(
    name: str,
    most: int | None,
    drafts: Answers,
    drafted: Answers,
    off: Answers,
    of_full_step: float,
    right: tuple[int, int],
) -> Gain:
    """All of it per canvas of the answers without a draft; `right` with the draft and without."""
    canvases = len(off.steps)
    draft_steps, steps, steps_off = (int(one.steps.sum()) / canvases for one in (drafts, drafted, off))
    return Gain(
        drafter=name,
        most_steps=most or 0,
        draft_steps=draft_steps,
        steps=steps,
        steps_off=steps_off,
        of_full_step=of_full_step,
        cost_steps=draft_steps * of_full_step + steps,
        break_even=(steps_off - steps) / draft_steps,
        right=right[0],
        right_off=right[1],
        of=len(off.each),
    )


# ---------------------------------------------------------------- report


def tables(costs: Sequence[Cost], gains: Sequence[Gain], environment: Environment) -> tuple[Table, Table]:
    """One row per engine and number of requests; one per drafter."""
    first = Table(title=f"{environment}, {environment.threads} threads", title_justify="left")
    for heading in ("model", "denoiser"):
        first.add_column(heading)
    for heading in ("at once", "ms/step", "of a full step", "equal tokens"):
        first.add_column(heading, justify="right")
    for cost in costs:
        figures = (f"{cost.step_ms:,.1f}", f"{cost.of_full_step:.2f}", f"{cost.equal_tokens:.1%}")
        first.add_row(cost.model, cost.drafter, str(cost.concurrency), *figures)
    second = Table(title="demo's skills, drafted; steps are per canvas", title_justify="left")
    second.add_column("drafter")
    for heading in ("its steps", "steps behind", "steps off", "cost in steps", "breaks even at", "right", "right off"):
        second.add_column(heading, justify="right")
    for item in gains:
        cut = f", {item.most_steps} at most" if item.most_steps else ""
        figures = (f"{item.draft_steps:.2f}", f"{item.steps:.2f}", f"{item.steps_off:.2f}")
        rest = (
            f"{item.cost_steps:.2f}",
            f"{item.break_even:.2f}",
            f"{item.right}/{item.of}",
            f"{item.right_off}/{item.of}",
        )
        second.add_row(item.drafter + cut, *figures, *rest)
    return first, second


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line; `count` is what it comes to."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.bench.self_draft", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the demo alone, fewer tasks; writes nothing without --output"
    )
    parser.add_argument("--output", type=Path, help=f"directory for {RESULT}; the repository's benchmarks/")
    parser.add_argument("--count", type=int, help="of prompts of every skill; 40, quick 5")
    arguments = parser.parse_args(words)
    if arguments.count is None:
        arguments.count = 5 if arguments.quick else 40
    if arguments.count < 1:
        parser.error(f"--count {arguments.count}: must be at least 1")
    return arguments


def main() -> None:
    """Tables on stderr, the JSON line on stdout and, but for a quick run, as a file."""
    arguments = options()
    console = Console(stderr=True, width=140)
    environment = Environment.here(THREADS)
    with console.status("starting") as status:
        demo = engines(DEMO)
        costs = measure_costs("demo", demo, (1, 8), 3 if arguments.quick else 7, status.update)
        gains = measure_gains(demo, costs, arguments.count, status.update)
        if not arguments.quick:
            costs += measure_costs("mid-size", engines(MID), (1, 8), 3, status.update)
    for table in tables(costs, gains, environment):
        console.print(table)
    print(line := points_line("self_draft", [*costs, *gains], environment))
    if output := arguments.output or (None if arguments.quick else ROOT / "benchmarks"):
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULT).write_text(line + "\n")


if __name__ == "__main__":
    exit_on_sigterm()
    main()
