"""Each case rendered once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from dgemma_build.chart import helm
from dgemma_build.chart.cases import CASES
from dgemma_build.chart.kinds import Object, read_objects

RENDERED = cache(helm.render)


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Object]]:
    """The objects of every case, by its name."""
    return {case.stem: read_objects(RENDERED(case)) for case in CASES}


@pytest.fixture(params=[case.stem for case in CASES])
def objects(request: pytest.FixtureRequest, rendered: dict[str, list[Object]]) -> list[Object]:
    """The objects of one case after the other."""
    found: list[dict[str, Any]] = rendered[request.param]
    return found
