"""The measurement of what watching costs: every hook of a running request has a figure."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from dgemma_build.bench import observers


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("dgemma_runtime", "opentelemetry")]
    before = [(logger.handlers, logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.level = handlers, level


def test_every_hook_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(observers, "_ROUNDS", 1)
    monkeypatch.setattr(observers, "_REQUESTS", 3)
    observers.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures.pop("unit") == "us per call"
    assert list(figures) == ["metrics", "metrics and log", "metrics, log and spans"]
    hooks = {"submitted", "admitted", "prefilled", "stepped", "committed", "encoded", "finished"}
    for times in figures.values():
        assert set(times) == hooks
        assert all(0 <= time < 5000 for time in times.values())
