"""Command line of the acceptance table: python -m dgemma_build.accept [--quick] [--only WORDS] [--output FILE]."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dgemma_build.accept import builds, context, faults, many, parity, precisions, served, sizes, speed, streaming
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.bench.__main__ import PLOT, RESULT, ROOT, THREADS
from dgemma_build.bench.report import Environment, json_line, plot, table
from dgemma_build.signals import exit_on_sigterm

ROWS: tuple[Row, ...] = (
    *parity.ROWS,
    *served.ROWS,
    *streaming.ROWS,
    *precisions.ROWS,
    *builds.ROWS,
    *sizes.ROWS,
    *speed.ROWS,
    *faults.ROWS,
    *context.ROWS,
    *many.ROWS,
)
OUTPUT = ROOT / "benchmarks/accept.json"


def _measure(row: Row, setting: Setting) -> Result:
    """A row that cannot be measured is short of its bar, and the table goes on."""
    try:
        return row.measure(setting)
    except Exception as error:  # noqa: BLE001 - the other rows are worth having
        setting.console.print_exception()
        return Result(f"failed: {type(error).__name__}: {error}", False)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.accept", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what CI measures too, with fewer examples")
    parser.add_argument("--only", default="", help="only rows with this text in their name")
    parser.add_argument("--output", type=Path, help=f"JSON file; {OUTPUT.relative_to(ROOT)} after a whole run")
    return parser.parse_args()


def main() -> int:
    """Measure row after row; exit status 1 where a figure is short of its bar."""
    arguments = _parse()
    console = Console(stderr=True, width=150)
    rows = [row for row in ROWS if arguments.only in row.what and (row.quick or not arguments.quick)]
    setting = Setting(arguments.quick, console)
    environment = Environment.here(THREADS)
    shown = Table(
        "what", "figure", "bar", "", title=f"{environment.device}, commit {environment.commit}", show_lines=True
    )
    records = []
    for row in rows:
        started = time.perf_counter()
        console.print(f"[dim]measuring:[/] {row.what}", highlight=False)
        result = _measure(row, setting)
        seconds = time.perf_counter() - started
        verdict = "pass" if result.passed else "SHORT"
        console.print(f"  {verdict}: {result.figure} ({row.bar}; {seconds:.0f} s)", highlight=False)
        shown.add_row(
            row.what, result.figure, row.bar, f"[green]{verdict}" if result.passed else f"[bold red]{verdict}"
        )
        records.append({"what": row.what, "bar": row.bar, **asdict(result), "seconds": round(seconds, 1)})
    console.print(shown)
    document = {"quick": arguments.quick, **asdict(environment), "rows": records}
    whole = not arguments.quick and not arguments.only
    if output := arguments.output or (OUTPUT if whole else None):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"wrote {output}")
    if whole:
        console.print(table(setting.cells, environment))
        (OUTPUT.parent / RESULT).write_text(json_line(setting.cells, environment) + "\n")
        plot(setting.cells, environment, OUTPUT.parent / PLOT)
    return 0 if all(record["passed"] for record in records) else 1


if __name__ == "__main__":
    exit_on_sigterm()
    raise SystemExit(main())
