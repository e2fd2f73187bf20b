"""The row about Kubernetes: the chart and the samples, checked without a cluster."""

from __future__ import annotations

from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.chart.cases import check
from dgemma_build.chart.kinds import VERSIONS


def _chart(setting: Setting) -> Result:
    """Lints strictly, renders to the committed files, and validates strictly for the oldest and newest Kubernetes."""
    report = check()
    for problem in report.problems:
        setting.console.print(problem, markup=False, highlight=False)
    figure = (
        f"{report.cases} cases, {report.values} values, {report.objects} objects for Kubernetes "
        f"{' and '.join(VERSIONS)}, {len(report.problems)} problems"
    )
    return Result(figure, not report.problems, {"problems": list(report.problems)})


ROWS = (
    Row(
        "chart",
        "lints, renders as committed and validates strictly with every documented value",
        _chart,
    ),
)
