"""Command line of the acceptance table: every row beside its bar, or some of them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dgemma_build.accept import (
    builds,
    chart,
    clients,
    context,
    drafts,
    faults,
    front,
    fuzz,
    image,
    many,
    parity,
    precisions,
    served,
    sizes,
    speed,
    streaming,
    transcripts,
)
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.bench.__main__ import PLOT, RESULT, ROOT, THREADS
from dgemma_build.bench.report import Environment, json_line, plot, table
from dgemma_build.signals import exit_on_sigterm

ROWS: tuple[Row, ...] = (
    *parity.ROWS,
    *served.ROWS,
    *streaming.ROWS,
    *precisions.ROWS,
    *drafts.ROWS,
    *builds.ROWS,
    *sizes.ROWS,
    *speed.ROWS,
    *faults.ROWS,
    *context.ROWS,
    *many.ROWS,
    *front.ROWS,
    *fuzz.ROWS,
    *transcripts.ROWS,
    *chart.ROWS,
    *image.ROWS,
    *clients.ROWS,
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
    parser.add_argument("--only", action="append", help="only rows with this text in their name; again for more")
    parser.add_argument("--update", action="store_true", help="put the rows of --only into the last whole run's file")
    parser.add_argument("--output", type=Path, help=f"JSON file; {OUTPUT.relative_to(ROOT)} after a whole run")
    arguments = parser.parse_args()
    if arguments.update and (arguments.quick or not arguments.only or arguments.output):
        parser.error("--update goes with --only, and without --quick and --output")
    return arguments


def _merged(rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run's rows with those measured again, in the table's order."""
    by_name = {row["what"]: row for row in (*rows, *measured)}
    return [by_name[row.what] for row in ROWS if row.what in by_name]


def _record(row: Row, setting: Setting) -> dict[str, Any]:
    """The row measured, with where and when."""
    here = Environment.here(THREADS)
    started = time.perf_counter()
    setting.console.print(f"[dim]measuring:[/] {row.what}", highlight=False)
    result = _measure(row, setting)
    seconds = time.perf_counter() - started
    setting.console.print(f"  {_verdict(result.passed)}: {result.figure} ({row.bar}; {seconds:.0f} s)", highlight=False)
    taken = {"seconds": round(seconds, 1), "commit": here.commit, "date": here.date, "load": here.load}
    return {"what": row.what, "bar": row.bar, **asdict(result), **taken}


def _verdict(passed: bool) -> str:
    return "pass" if passed else "SHORT"


def _show(console: Console, environment: Environment, records: Sequence[Mapping[str, Any]]) -> None:
    shown = Table(
        "what", "figure", "bar", "", title=f"{environment.device}, commit {environment.commit}", show_lines=True
    )
    for record in records:
        style = "green" if record["passed"] else "bold red"
        shown.add_row(record["what"], record["figure"], record["bar"], f"[{style}]{_verdict(record['passed'])}")
    console.print(shown)


def main() -> int:
    """Measure row after row; exit status 1 where a figure is short of its bar."""
    arguments = _parse()
    console = Console(stderr=True, width=150)
    wanted = arguments.only or [""]
    rows = [row for row in ROWS if any(text in row.what for text in wanted) and (row.quick or not arguments.quick)]
    setting = Setting(arguments.quick, console)
    environment = Environment.here(THREADS)
    records = [_record(row, setting) for row in rows]
    _show(console, environment, records)
    document = {"quick": arguments.quick, **asdict(environment), "rows": records}
    if arguments.update:
        document = json.loads(OUTPUT.read_text())
        document["rows"] = _merged(document["rows"], records)
    whole = not arguments.quick and not arguments.only
    if output := arguments.output or (OUTPUT if whole or arguments.update else None):
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
