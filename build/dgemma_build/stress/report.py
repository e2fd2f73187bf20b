"""What a stress run leaves: tables for the terminal, a JSON document, a picture. Knows no server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dgemma_build.bench.figure import GREEN, GREY, svg_figure
from dgemma_build.bench.report import Environment
from dgemma_build.stress.load import WEIGHTS
from dgemma_build.stress.run import Stressed


def tables(run: Stressed) -> tuple[Table, Table]:
    """How requests ended, and what had to hold."""
    load = run.load
    ends = Table(
        title=f"{run.variant}: {load.clients} clients, {load.seconds:g} s, seed {load.seed}", title_justify="left"
    )
    for heading in ("asked", "requests", "p50 s", "p95 s", "ended"):
        ends.add_column(heading, justify="left" if heading in ("asked", "ended") else "right")
    for row in by_manner(run):
        found = ", ".join(f"{count} {end}" for end, count in row["ends"].items())
        ends.add_row(row["manner"], str(row["requests"]), f"{row['p50_s']:.2f}", f"{row['p95_s']:.2f}", found)
    checks = Table("what must hold", "figure", "")
    for check in run.checks:
        checks.add_row(check.what, check.figure, "[green]pass" if check.passed else "[bold red]SHORT")
    return ends, checks


def by_manner(run: Stressed) -> list[dict[str, Any]]:
    """Per kind of request: how many, how they ended, and their times."""
    rows = []
    for manner in WEIGHTS:
        chosen = [outcome for outcome in run.outcomes if outcome.manner == manner]
        times = [outcome.seconds for outcome in chosen if outcome.end not in ("overloaded", "refused")] or [0.0]
        p50, p95 = np.percentile(times, (50, 95))
        ends = dict(Counter(outcome.end for outcome in chosen).most_common())
        rows.append(
            {"manner": manner, "requests": len(chosen), "ends": ends, "p50_s": round(p50, 4), "p95_s": round(p95, 4)}
        )
    return rows


def document(runs: Sequence[Stressed], environment: Environment) -> dict[str, Any]:
    """For the JSON file."""
    return {**asdict(environment), "runs": [_record(run) for run in runs]}


def _record(run: Stressed) -> dict[str, Any]:
    problems = [outcome.problem for outcome in run.outcomes if outcome.problem is not None]
    samples = [
        [round(one.seconds, 2), one.resident_bytes, one.running, one.waiting, round(one.pages, 4)]
        for one in run.samples
    ]
    return {
        "variant": run.variant,
        **asdict(run.load),
        "passed": run.passed,
        "checks": [asdict(check) for check in run.checks],
        "requests": by_manner(run),
        "problems": problems[:50],
        "samples": {"columns": ["seconds", "resident_bytes", "running", "waiting", "pages"], "rows": samples},
    }


def plot(runs: Sequence[Stressed], environment: Environment, path: Path) -> None:
    """Memory, requests and pages over time, a column per variant."""
    size = (4.5 * len(runs), 5.2)
    with svg_figure(path, str(environment), size, rows=3, columns=len(runs), sharex="col", sharey="row") as axes:
        for column, run in enumerate(runs):
            seconds = [one.seconds for one in run.samples]
            memory, requests, pages = axes[:, column]
            memory.set_title(f"{run.variant}, {run.load.clients} clients", fontsize=9)
            memory.plot(seconds, [one.resident_bytes / 1e6 for one in run.samples], color=GREEN)
            requests.plot(seconds, [one.waiting for one in run.samples], color=GREY, label="waiting")
            requests.plot(seconds, [one.running for one in run.samples], color=GREEN, label="running")
            pages.plot(seconds, [100 * one.pages for one in run.samples], color=GREEN)
            pages.set_xlabel("seconds", fontsize=8)
        for axis, label in zip(axes[:, 0], ("resident MB", "requests", "pages in use, %"), strict=True):
            axis.set_ylabel(label, fontsize=8)
        for axis in axes.flat:
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
        axes[1][0].legend(fontsize=7, frameon=False)
