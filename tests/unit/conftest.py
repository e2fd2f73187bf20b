"""A service on a scripted engine, checked for leaks at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from dgemma_runtime.contract import Engine
from dgemma_runtime.service import Service
from dgemma_runtime.settings import RuntimeSettings
from dgemma_runtime.testing import start_service

Start = Callable[..., Service]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start_service`, stopped at the end of the test; every test ends with all pages back."""
    services: list[Service] = []

    def build(engine: Engine, settings: RuntimeSettings | None = None) -> Service:
        services.append(start_service(engine, settings))
        return services[-1]

    yield build
    for service in services:
        service.stop()
        if service.failure is None:
            statistics = service.statistics()
            assert (statistics.full_pages_used, statistics.sliding_pages_used) == (0, 0)
            assert (statistics.requests_running, statistics.requests_waiting) == (0, 0)
