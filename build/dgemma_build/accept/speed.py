"""Rows about speed, all from one run of the benchmark."""

from __future__ import annotations

from dataclasses import asdict

from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.bench.report import SERVER, ratios


def faster(scenario: str, concurrency: int, baseline: str, times: float) -> Row:
    """Our server's tokens per second over transformers'; both median over interleaved rounds."""

    def measure(setting: Setting) -> Result:
        found = next(
            ratio
            for ratio in ratios(setting.cells)
            if (ratio.scenario, ratio.concurrency, ratio.contender, ratio.baseline)
            == (scenario, concurrency, SERVER, baseline)
        )
        figure = f"{found.times:.1f}x ({found.least:.1f} to {found.largest:.1f})"
        return Result(figure, found.times >= times, asdict(found))

    what = f"our server against {baseline}, {scenario}, {concurrency} at once, fixed steps"
    return Row(what, f"at least {times:g}x", measure, quick=False)


def _outside_engine(setting: Setting) -> Result:
    cells = [cell for cell in setting.cells if cell.scenario == "mid-size" and cell.contender == SERVER]
    shares = {cell.concurrency: cell.outside_engine for cell in cells if cell.outside_engine is not None}
    figure = ", ".join(f"{share:.1%} at {concurrency}" for concurrency, share in shares.items())
    return Result(figure, bool(shares) and max(shares.values()) <= 0.10, {"shares": shares})


ROWS: tuple[Row, ...] = (
    faster("demo", 1, "transformers", 8),
    faster("demo", 1, "transformers, compiled", 4),
    faster("demo", 4, "transformers", 6),
    faster("mid-size", 1, "transformers", 1.5),
    faster("mid-size", 4, "transformers", 1.5),
    Row("time outside the engine, mid-size", "at most 10%", _outside_engine, quick=False),
)
