"""The command: what it takes, what it prints, what it leaves. Knows no kernel."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from dgemma_build.gpu_check import report
from dgemma_build.gpu_check.card import measure_card
from dgemma_build.gpu_check.machine import CudaMachine, Machine, what_is_missing
from dgemma_build.gpu_check.measure import Bench
from dgemma_build.gpu_check.references import exact_products
from dgemma_build.gpu_check.rtx import try_in_own_process
from dgemma_build.gpu_check.sizes import QUICK, RELEASED, WHOLE, ModelSizes, Scope

DESCRIPTION = (
    "Checks the kernels on the GPU at hand: numbers against PyTorch, shares of what the card can do, whole steps."
)
OUTPUT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_check.json"


def check(machine: Machine, sizes: ModelSizes, scope: Scope, only: str, output: Path | None) -> report.Report:
    """Everything, printed as it comes; the report is also left at `output`."""
    started = time.monotonic()
    facts = {**machine.facts(), "commit": report.commit(), "date": report.now()}
    tensorrt_rtx = try_in_own_process()
    with exact_products():
        made = report.Report(facts, measure_card(machine, scope, sizes.dtype), tensorrt_rtx)
        print(report.card_lines(facts, made.card, tensorrt_rtx))
        print(report.HEADER, flush=True)
        for row in Bench(machine, sizes, scope, made.card).rows(only):
            made.rows.append(row)
            made.seconds = time.monotonic() - started
            print(report.line(row), flush=True)
            if output is not None:
                made.write(output)
    made.complete = True
    if output is not None:
        made.write(output)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.gpu_check", description=DESCRIPTION)
    parser.add_argument("--output", type=Path, help=f"where the JSON goes (default for a whole run: {OUTPUT})")
    parser.add_argument("--layers", type=int, help=f"of whole steps (default: {WHOLE.layers}, --quick {QUICK.layers})")
    parser.add_argument("--quick", action="store_true", help="shorter contexts, fewer layers and repetitions")
    parser.add_argument("--only", default="", help="only rows whose name contains this, e.g. experts, 'step fp8'")
    given = parser.parse_args(arguments)
    if given.layers is not None and given.layers < 1:
        parser.error(f"--layers {given.layers}: must be at least 1")
    if missing := what_is_missing():
        print(f"gpu-check: {missing}", file=sys.stderr)
        return 2
    scope = QUICK if given.quick else WHOLE
    whole = not (given.quick or given.only or given.layers)
    if given.layers:
        scope = replace(scope, layers=given.layers)
    made = check(CudaMachine(), RELEASED, scope, given.only, given.output or (OUTPUT if whole else None))
    if not made.rows:
        parser.error(f"--only {given.only}: no row has this in its name")
    print(json.dumps(made.summary()))
    return 0 if made.numbers_hold else 1
