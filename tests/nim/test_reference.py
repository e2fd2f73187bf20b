"""The page about containers says what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_nim.reference import with_tables
from dgemma_nim.settings import SETTINGS
from dgemma_nim.variables import OTHERS

PAGE = Path(__file__).resolve().parents[2] / "docker" / "README.md"


def test_the_tables_are_those_of_the_code() -> None:
    text = PAGE.read_text()
    assert with_tables(text) == text, "run: python -m dgemma_nim.reference docker/README.md"
    for name in (variable for setting in SETTINGS for variable in setting.variables):
        assert f"`{name}`" in text
    for other in OTHERS:
        assert f"`{other.name}`" in text


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="settings"):
        with_tables("no markers")


def test_no_setting_is_there_twice() -> None:
    spellings = [word for setting in SETTINGS for word in (*setting.flags, *setting.off, *setting.variables)]
    assert len(spellings) == len(set(spellings))
    assert not {other.name for other in OTHERS} & set(spellings)
