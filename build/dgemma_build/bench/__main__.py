"""Command line of the benchmark: python -m dgemma_build.bench [--quick] [--output DIRECTORY]."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dgemma_build.bench.measure import measure
from dgemma_build.bench.report import Environment, json_line, plot, table
from dgemma_build.bench.scenario import Cell, Level, Scenario
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_build.signals import exit_on_sigterm

ROOT = Path(__file__).resolve().parents[3]
GENERATED = ROOT / "artifacts/bench"
RESULT, PLOT = "benchmark.json", "benchmark.svg"
THREADS = 2  # of every contender

DEMO = Scenario(
    name="demo",
    checkpoint=ROOT / "build/checkpoints/demo",
    engine=GENERATED / "engines/demo",
    prompt_tokens=40,
    levels=(Level(1, canvases=4, steps=16, rounds=5), Level(4, canvases=4, steps=16, rounds=5)),
)
MID = Scenario(
    name="mid-size",
    checkpoint=GENERATED / "checkpoints/mid",
    engine=GENERATED / "engines/mid",
    prompt_tokens=64,
    levels=(
        Level(1, canvases=2, steps=4, rounds=3),
        Level(4, canvases=1, steps=4, rounds=2),
        Level(8, canvases=1, steps=4, rounds=2, compiled=False),
    ),
)
QUICK_LEVELS = {
    "demo": (Level(1, canvases=2, steps=8, rounds=2), Level(4, canvases=2, steps=8, rounds=2)),
    "mid-size": (Level(1, canvases=1, steps=2, rounds=1),),
}


def scenarios(quick: bool) -> list[Scenario]:
    """Both models, with less of everything when quick."""
    return [replace(item, levels=QUICK_LEVELS[item.name]) if quick else item for item in (DEMO, MID)]


def prepare(scenario: Scenario) -> None:
    """Build the engine from the present sources; generate the mid-size checkpoint."""
    if scenario.checkpoint.is_relative_to(GENERATED):
        write_checkpoint(scenario.checkpoint, scenario.checkpoint.name)
    scenario.engine.parent.mkdir(parents=True, exist_ok=True)
    build_engine(BuildRequest(scenario.checkpoint, scenario.engine))


def run(quick: bool, compiled: bool, console: Console) -> list[Cell]:
    """Measure everything; progress goes to `console`."""
    cells: list[Cell] = []
    with console.status("starting") as status:
        for scenario in scenarios(quick):
            status.update(f"{scenario.name}: building")
            prepare(scenario)
            cells += measure(scenario, THREADS, compiled, status.update)
    return cells


def main() -> None:
    """Table on stderr, the JSON line on stdout and, with --output, both it and the plot as files."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer steps, no torch.compile")
    parser.add_argument("--output", type=Path, help=f"directory for {RESULT} and {PLOT}; the repository's benchmarks/")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=140)
    environment = Environment.here(THREADS)
    cells = run(arguments.quick, not arguments.quick, console)
    console.print(table(cells, environment))
    line = json_line(cells, environment)
    print(line)
    if output := arguments.output or (None if arguments.quick else ROOT / "benchmarks"):
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULT).write_text(line + "\n")
        plot(cells, environment, output / PLOT)
        console.print(f"wrote {output / RESULT} and {output / PLOT}")


if __name__ == "__main__":
    exit_on_sigterm()
    main()
