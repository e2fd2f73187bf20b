"""A run as JSON and as a table in plain text. Knows no tensors.

The file is written whenever a row is ready, so that a run that is cut off leaves what it had, with `complete` false.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dgemma_build.gpu_check.results import Card, Row

HEADER = f"{'':58} {'ms':>9} {'GB':>8} {'TFLOP':>7} {'of bytes':>9} {'of FLOPs':>9}  numbers, bar"


@dataclass
class Report:
    """Grows by rows."""

    facts: dict[str, Any]
    card: Card
    tensorrt_rtx: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0

    @property
    def numbers_hold(self) -> bool:
        return all(row.numbers_hold for row in self.rows)

    @property
    def short(self) -> list[str]:
        """Names of rows that miss their bar."""
        return [row.name for row in self.rows if row.bar and not row.bar.holds]

    def as_json(self) -> dict[str, Any]:
        return {
            **self.facts,
            "complete": self.complete,
            "seconds": round(self.seconds, 1),
            "numbers_hold": self.numbers_hold,
            "short": self.short,
            "card": asdict(self.card) | {"bandwidth": self.card.bandwidth},
            "tensorrt_rtx": self.tensorrt_rtx,
            "rows": [row_json(row) for row in self.rows],
        }

    def write(self, path: Path) -> None:
        """Replaces what was there at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        partial.replace(path)

    def summary(self) -> dict[str, Any]:
        """The last line of a run."""
        bars = {row.name: [round(row.bar.value, 3), row.bar.limit] for row in self.rows if row.bar}
        steps = {row.name: round(row.median_ms, 3) for row in self.rows if row.median_ms and row.details}
        failed = [row.name for row in self.rows if not row.numbers_hold]
        kept = {name: self.facts[name] for name in ("device", "commit", "date")}
        return {**kept, "numbers_hold": self.numbers_hold, "failed": failed, "bars": bars, "steps_ms": steps}


def row_json(row: Row) -> dict[str, Any]:
    """With what is computed from it."""
    made = asdict(row) | {"numbers_hold": row.numbers_hold, "share": row.share}
    made["checks"] = [asdict(check) | {"holds": check.holds} for check in row.checks]
    if row.bar:
        made["bar"] = asdict(row.bar) | {"result": "pass" if row.bar.holds else "short"}
    return made


def commit() -> str:
    """Short hash of the checkout, with `+` where files differ from it; says so where there is none."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--match="]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "no git here"
    return run.stdout.strip() if run.returncode == 0 else "not a git checkout"


def now() -> str:
    """UTC."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime())


def card_lines(facts: dict[str, Any], card: Card, tensorrt_rtx: dict[str, Any]) -> str:
    """What stands above the table."""
    rtx = ", ".join(str(value) for value in tensorrt_rtx.values())
    return (
        f"{facts['device']}, SM {facts['sm']}, driver {facts['driver']}, torch {facts['torch']}, triton "
        f"{facts['triton']}, commit {facts['commit']}, {facts['date']}\n"
        f"measured: read {card.read / 1e9:,.0f} GB/s, copy {card.copy / 1e9:,.0f} GB/s, bf16 "
        f"{card.bf16_flops / 1e12:,.0f} TFLOPS, fp8 {card.fp8_flops / 1e12:,.0f} TFLOPS, an empty call "
        f"{1e3 * card.launch_ms:.1f} us\n"
        f"tensorrt_rtx on this card: {rtx}\n"
    )


def line(row: Row) -> str:
    """One row of the table."""
    if row.error:
        return f"{row.name:58} FAILED: {row.error}"

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    gigabytes, teraflop = (row.work.bytes / 1e9, row.work.flops / 1e12) if row.work else (None, None)
    figures = (
        f"{number(row.median_ms, '9.3f'):>9} {number(gigabytes, '8.3f'):>8} "
        f"{number(teraflop, '7.3f'):>7} {number(row.bandwidth_share, '9.1%'):>9} "
        f"{number(row.flops_share, '9.1%'):>9}"
    )
    wrong = [f"{check.name} {check.error:.2g} over {check.tolerance:g}" for check in row.checks if not check.holds]
    said = [f"WRONG: {'; '.join(wrong)}" if wrong else "right"]
    if row.bar:
        said.append(
            f"{'pass' if row.bar.holds else 'SHORT'}: {row.bar.value:.3g} {row.bar.text}, bar {row.bar.limit:g}"
        )
    elif "times_floor" in row.details:
        said.append(f"{row.details['times_floor']:.3g} times the weight-read floor")
    if parts := row.details.get("parts_ms"):
        said.append("ms: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    return f"{row.name:58} {figures}  {', '.join(said)}"
