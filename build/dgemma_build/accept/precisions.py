"""Rows about what a precision costs, on the demo checkpoint: skills, distributions, steps."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

from dgemma_build.accept.table import NAMES, Result, Row, Setting
from dgemma_build.layer_errors import layer_errors
from dgemma_build.quality import Skills, compare_distributions, measure_skills

POINTS = 2.0  # of 100
LAYER_BARS = {"bf16": 2e-2, "fp8": 0.1, "int4": 0.25}


@cache
def _skills(directory: Path, count: int) -> Skills:
    return measure_skills(directory, count)


def cost(precision: str, recipe: tuple[str, str] | None = None) -> Row:
    """Held-out accuracy over all skills beside that of fp32. `recipe`: TensorRT's, of weights and of the cache."""

    def measure(setting: Setting) -> Result:
        count, compared = (20, 1) if setting.quick else (100, 10)
        reference = setting.engine("demo")
        engine = setting.emulated("demo", *recipe) if recipe else setting.engine("demo", precision)
        before, after = _skills(reference, count), _skills(engine, count)
        distributions = compare_distributions(reference, engine, compared)
        figure = (
            f"{before.percent:.1f} -> {after.percent:.1f} of 100, KL {distributions.mean_kl:.1e} nats, argmax "
            f"{distributions.argmax_agreement:.1%} equal, steps {before.steps_per_canvas:.2f} -> "
            f"{after.steps_per_canvas:.2f}"
        )
        details = {"fp32": asdict(before), precision: asdict(after), "distributions": asdict(distributions)}
        return Result(figure, before.percent - after.percent <= POINTS, details)

    where = "TensorRT's graph" if recipe else "ONNX Runtime"
    return Row(f"demo skills in {precision} on {where}", f"at most {POINTS:g} points under fp32", measure)


def layers(name: str) -> Row:
    """Each layer of TensorRT's graphs by itself, from float32's own input."""

    def measure(setting: Setting) -> Result:
        reference = setting.emulated(name, "fp32", "fp32")
        errors = {
            precision: layer_errors(reference, setting.emulated(name, precision), threads=2) for precision in LAYER_BARS
        }
        worst = {precision: max(found, key=lambda error: error.median) for precision, found in errors.items()}
        figure = ", ".join(f"{precision} {one.median:.1e} ({one.tenth:.1e})" for precision, one in worst.items())
        passed = all(one.median <= LAYER_BARS[precision] for precision, one in worst.items())
        details = {precision: [asdict(one) for one in found] for precision, found in errors.items()}
        return Result(figure, passed, details)

    bar = ", ".join(f"{precision} {bar:g}" for precision, bar in LAYER_BARS.items())
    return Row(
        f"relative error of a layer by itself, {name}: median token (one in ten exceeds)", bar, measure, name != "real"
    )


ROWS: tuple[Row, ...] = (
    cost("int8"),
    cost("int4"),
    cost("bf16", ("bf16", "bf16")),
    cost("fp8", ("fp8", "bf16")),
    cost("int4", ("int4", "bf16")),
    cost("bf16 with fp8 keys and values", ("bf16", "fp8")),
    *(layers(name) for name in (*NAMES, "real")),
)
