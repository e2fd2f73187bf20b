"""Command line: python -m dgemma_build.stress [--seconds S] [--clients N] [--seed N] [--engine DIR] [--output DIR]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from dgemma_build.bench.report import Environment
from dgemma_build.signals import exit_on_sigterm
from dgemma_build.stress.report import document, plot, tables
from dgemma_build.stress.run import Load, stress, variants

ROOT = Path(__file__).resolve().parents[3]
RESULT, PLOT, THREADS = "stress.json", "stress.svg", 2


def main() -> int:
    """Both variants, one after the other; exit status 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load per variant (default: 120)")
    parser.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do (default: 0)")
    parser.add_argument("--engine", type=Path, default=ROOT / "artifacts/engines/demo", help="default: the demo's")
    parser.add_argument(
        "--output", type=Path, help=f"directory for {RESULT} and {PLOT} (default: benchmarks, of a whole run)"
    )
    arguments = parser.parse_args()
    console = Console(stderr=True, width=150)
    environment = Environment.here(THREADS)
    load = Load(arguments.clients, arguments.seconds, arguments.seed)
    runs = []
    for variant in variants(load.clients):
        with console.status(f"{variant.name}: {load.clients} clients for {load.seconds:g} s"):
            runs.append(stress(arguments.engine, variant, load))
        for shown in tables(runs[-1]):
            console.print(shown)
    whole = load == Load(clients=64, seconds=120.0, seed=0)
    if output := arguments.output or (ROOT / "benchmarks" if whole else None):
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULT).write_text(json.dumps(document(runs, environment)) + "\n")
        plot(runs, environment, output / PLOT)
        console.print(f"wrote {output / RESULT} and {output / PLOT}")
    return 0 if all(run.passed for run in runs) else 1


if __name__ == "__main__":
    exit_on_sigterm()
    raise SystemExit(main())
