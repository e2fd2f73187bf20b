"""What a context costs: python -m dgemma_build.bench.context [--quick] [--output DIRECTORY].

One canvas of the demo model behind contexts of 1,024 to 262,144 tokens, on the engine in this process. Times are of the
engine's own calls; a step's is the least of several, so that a busy machine shows less. Its split is taken in a second
engine with ONNX Runtime's profiler on: kernels that touch an array as long as the context are the full layers'
attention; the rest are all other kernels and the engine's own work around the library's, with the profiler's cost.
Pages are filled with keys and values of random tokens, in chunks without a context: how long a step takes does not
depend on what they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from dgemma_build.bench.__main__ import DEMO, ROOT, THREADS, prepare
from dgemma_build.bench.figure import GREEN, svg_figure
from dgemma_build.bench.report import Environment, points_line
from dgemma_build.signals import exit_on_sigterm
from dgemma_runtime.contract import CommitRow, DenoiseRow, EncodeRow, EngineLimits, SequencePages
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.engines.ort_rows import slots_for

RESULT, PLOT = "context.json", "context.svg"
CONTEXTS = (1024, 4096, 16_384, 65_536, 262_144)  # tokens, canvas included
QUICK_CONTEXTS = (1024, 4096, 16_384)
_CHUNK, _PAGE = 512, 64  # tokens, the runtime's defaults


@dataclass(frozen=True)
class Point:
    """One context; milliseconds."""

    context: int  # tokens, canvas included
    step_ms: float
    attention_ms: float  # of a step: the full layers' attention, masks included
    rest_ms: float  # of a step: other kernels, and the engine around the library; less what passes between kernels
    lay_out_ms: float  # once a sequence: the first step's time above a step's
    next_canvas_ms: float  # the same of the canvas behind a commit, whose context is there
    commit_ms: float  # of a canvas, alone in its call
    prefill_tokens_per_s: float  # of a chunk that ends at this context


class _Profiled(OnnxRuntimeEngine):
    """With ONNX Runtime's profiler, which costs as much as small kernels do."""

    def _options(self, threads: int) -> ort.SessionOptions:
        options = super()._options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.gettempdir()) / "dgemma-context")
        return options

    def profile(self) -> list[dict[str, Any]]:
        """All events so far; there are none after it."""
        path = Path(self._session.end_profiling())
        events: list[dict[str, Any]] = json.loads(path.read_text())
        path.unlink()
        return events


class _Sequence:
    """The only one in an engine, which has pages for `context` tokens."""

    def __init__(self, engine: OnnxRuntimeEngine, context: int, filled_pages: int) -> None:
        self.engine, self._random = engine, np.random.default_rng(0)
        self._canvas, pages = engine.spec.canvas_length, context // _PAGE
        held = np.arange(pages, dtype=np.int32) % filled_pages
        self.pages = SequencePages(held, held)
        per_chunk = _CHUNK // _PAGE
        for first in range(0, filled_pages, per_chunk):
            part = SequencePages(*(2 * [np.arange(first, first + per_chunk, dtype=np.int32)]))
            engine.encode([EncodeRow(self._ids(_CHUNK), 0, part)])

    def _ids(self, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return self._random.integers(0, self.engine.spec.vocab_size, count, np.int32)

    def step(self, position: int, first: bool) -> None:
        uniforms = self._random.random(self._canvas, np.float32)
        self.engine.denoise([DenoiseRow(0, self._ids(self._canvas), uniforms, 0.8, position, self.pages, first)])

    def commit(self, position: int) -> None:
        self.engine.denoise([], [CommitRow(0, self._ids(self._canvas), position, self.pages)])

    def chunk(self, position: int) -> None:
        self.engine.encode([EncodeRow(self._ids(_CHUNK), position, self.pages)])


def _ms(call: Callable[..., None], *arguments: Any) -> float:
    started = time.perf_counter()
    call(*arguments)
    return 1000 * (time.perf_counter() - started)


def _limits(context: int) -> EngineLimits:
    return EngineLimits(1, _CHUNK, _PAGE, context // _PAGE, context // _PAGE)


def _steps(context: int) -> int:
    """How many are timed."""
    return 30 if context <= 4096 else 12 if context <= 65_536 else 6


def _times(directory: Path, contexts: Sequence[int]) -> Iterator[tuple[int, dict[str, float]]]:
    """Of every context, without the profiler."""
    longest = max(contexts)
    engine = OnnxRuntimeEngine(directory, _limits(longest), THREADS)
    sequence = _Sequence(engine, longest, longest // _PAGE)
    canvas = engine.spec.canvas_length
    for context in contexts:
        position = context - 2 * canvas
        sequence.chunk(context - 2 * _CHUNK)  # lays out
        chunk = _ms(sequence.chunk, context - _CHUNK)
        first = _ms(sequence.step, position, True)
        steps = [_ms(sequence.step, position, False) for _ in range(_steps(context))]
        commit = _ms(sequence.commit, position)
        behind = _ms(sequence.step, position + canvas, True)
        engine.release(0)
        step = min(steps)
        yield (
            context,
            {
                "step_ms": step,
                "lay_out_ms": max(first - step, 0.0),
                "next_canvas_ms": max(behind - step, 0.0),
                "commit_ms": commit,
                "prefill_tokens_per_s": 1000 * _CHUNK / chunk,
            },
        )
    engine.close()


def _split(directory: Path, context: int) -> tuple[float, float]:
    """Milliseconds of a step in full layers' attention, and in everything else."""
    engine = _Profiled(directory, _limits(context), THREADS)
    sequence = _Sequence(engine, context, _CHUNK // _PAGE)
    position = context - engine.spec.canvas_length
    sequence.step(position, True)
    whole = [_ms(sequence.step, position, False) for _ in range(_steps(context))]
    events = engine.profile()
    engine.close()
    runs = _kernels(events, slots_for(context))[-len(whole) :]
    rest = [run.others_ms + total - run.ms for total, run in zip(whole, runs, strict=True)]
    return min(run.attention_ms for run in runs), min(rest)


@dataclass
class _Run:
    """One run of the session, by the profiler."""

    start: int  # microseconds
    ms: float
    attention_ms: float = 0.0  # of kernels over an array with an axis as long as the caches
    others_ms: float = 0.0  # of all other kernels


def _kernels(events: Sequence[dict[str, Any]], slots: int) -> list[_Run]:
    """In the order of time."""
    runs = sorted((_Run(each["ts"], each["dur"] / 1000) for each in events if each["name"] == "model_run"), key=_start)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            given = event["args"]["input_type_shape"] + event["args"]["output_type_shape"]
            run = runs[bisect(runs, event["ts"], key=_start) - 1]
            if any(slots in shape for shapes in given for shape in shapes.values()):
                run.attention_ms += event["dur"] / 1000
            else:
                run.others_ms += event["dur"] / 1000
    return runs


def _start(run: _Run) -> int:
    return run.start


def measure(directory: Path, contexts: Sequence[int], say: Callable[[str], None]) -> list[Point]:
    """All points of an onnxruntime engine."""
    points = []
    for context, times in _times(directory, contexts):
        say(f"{context} tokens: split of a step")
        attention, rest = _split(directory, context)
        points.append(Point(context=context, attention_ms=attention, rest_ms=rest, **times))
        say(f"{context} tokens: {times['step_ms']:.1f} ms a step")
    return points


# ---------------------------------------------------------------- report


def table(points: Sequence[Point], environment: Environment) -> Table:
    """One row per context."""
    result = Table(title=f"{environment}, {environment.threads} threads", title_justify="left")
    headings = ("context", "step ms", "attention ms", "per 1,024", "rest ms", "lay out ms", "next canvas ms")
    for heading in (*headings, "commit ms", "prefill tokens/s"):
        result.add_column(heading, justify="right")
    for point in points:
        result.add_row(
            f"{point.context:,}",
            f"{point.step_ms:,.1f}",
            f"{point.attention_ms:,.1f}",
            f"{1024 * point.attention_ms / point.context:.2f}",
            f"{point.rest_ms:,.1f}",
            f"{point.lay_out_ms:,.1f}",
            f"{point.next_canvas_ms:,.1f}",
            f"{point.commit_ms:,.1f}",
            f"{point.prefill_tokens_per_s:,.0f}",
        )
    return result


def plot(points: Sequence[Point], environment: Environment, path: Path) -> None:
    """A step's two parts over the context, and what happens once a canvas or once a sequence."""
    contexts = [point.context for point in points]
    with svg_figure(path, f"Demo model, one canvas; {environment}", (11, 3.2), columns=3) as axes:
        panels: tuple[tuple[str, str, dict[str, list[float]]], ...] = (
            (
                "one denoising step",
                "ms",
                {
                    "full layers' attention": [point.attention_ms for point in points],
                    "everything else": [point.rest_ms for point in points],
                },
            ),
            (
                "once",
                "ms",
                {
                    "a sequence: context laid out": [point.lay_out_ms for point in points],
                    "a canvas: commit": [point.commit_ms for point in points],
                },
            ),
            ("prefill", "tokens/s", {"a chunk of 512": [point.prefill_tokens_per_s for point in points]}),
        )
        for axis, (title, unit, lines) in zip(axes[0], panels, strict=True):
            for (label, values), colour in zip(lines.items(), (GREEN, "#52616f"), strict=False):
                axis.plot(contexts, values, "o-", label=label, color=colour, markersize=4)
            axis.set(title=title, xlabel="context, tokens", ylabel=unit, xscale="log", yscale="log")
            axis.set_xticks(contexts, [f"{context // 1024}k" for context in contexts], fontsize=7)
            axis.minorticks_off()
            axis.legend(fontsize=7)


def write(points: Sequence[Point], environment: Environment, directory: Path) -> None:
    """The JSON line and the plot as files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RESULT).write_text(points_line("context", points, environment) + "\n")
    plot(points, environment, directory / PLOT)


def main() -> None:
    """Table on stderr, the JSON line on stdout and, but for a quick run, both it and the plot as files."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.bench.context", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 16,384 tokens; writes nothing without --output")
    parser.add_argument("--output", type=Path, help=f"directory for {RESULT} and {PLOT}; the repository's benchmarks/")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=140)
    environment = Environment.here(THREADS)
    prepare(DEMO)
    with console.status("starting") as status:
        points = measure(DEMO.engine, QUICK_CONTEXTS if arguments.quick else CONTEXTS, status.update)
    console.print(table(points, environment))
    print(points_line("context", points, environment))
    if output := arguments.output or (None if arguments.quick else ROOT / "benchmarks"):
        write(points, environment, output)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
