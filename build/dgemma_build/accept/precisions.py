"""Rows about what a precision costs, on the demo checkpoint: skills, distributions, steps."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.quality import Skills, compare_distributions, measure_skills

POINTS = 2.0  # of 100


@cache
def _skills(directory: Path, count: int) -> Skills:
    return measure_skills(directory, count)


def cost(precision: str) -> Row:
    """Held-out accuracy over all skills beside that of fp32."""

    def measure(setting: Setting) -> Result:
        count, compared = (20, 1) if setting.quick else (100, 10)
        reference, engine = setting.engine("demo"), setting.engine("demo", precision)
        before, after = _skills(reference, count), _skills(engine, count)
        distributions = compare_distributions(reference, engine, compared)
        figure = (
            f"{before.percent:.1f} -> {after.percent:.1f} of 100, KL {distributions.mean_kl:.1e} nats, argmax "
            f"{distributions.argmax_agreement:.1%} equal, steps {before.steps_per_canvas:.2f} -> "
            f"{after.steps_per_canvas:.2f}"
        )
        details = {"fp32": asdict(before), precision: asdict(after), "distributions": asdict(distributions)}
        return Result(figure, before.percent - after.percent <= POINTS, details)

    return Row(f"demo skills in {precision} on ONNX Runtime", f"at most {POINTS:g} points under fp32", measure)


ROWS: tuple[Row, ...] = (cost("int8"), cost("int4"))
