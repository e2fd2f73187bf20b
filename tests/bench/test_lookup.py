"""The measurement of what a prompt-lookup draft costs: every text and length has a figure."""

from __future__ import annotations

import json

import pytest

from dgemma_build.bench import lookup


def test_every_text_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lookup, "LENGTHS", (1000, 2000))
    lookup.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures.pop("unit") == "ms per draft"
    assert set(figures) == set(lookup.TEXTS)
    assert all(set(of_text) == {"1000", "2000"} and min(of_text.values()) > 0 for of_text in figures.values())
