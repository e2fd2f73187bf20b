"""The rows of the acceptance table that take seconds, with fewer examples than `make accept` takes."""

from __future__ import annotations

import pytest

from dgemma_build.accept.__main__ import ROWS
from dgemma_build.accept.streaming import ROWS as TIMED
from dgemma_build.accept.table import Row, Setting

QUICK = tuple(row for row in ROWS if row.quick)


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.what.replace(" ", "-"))
def test_the_figure_holds(row: Row, setting: Setting) -> None:
    tries = 3 if row in TIMED else 1  # a shared machine spoils a time now and then, not three in a row
    results = []
    for _ in range(tries):
        results.append(row.measure(setting))
        if results[-1].passed:
            return
    raise AssertionError(f"{row.bar}: {[result.figure for result in results]}")
