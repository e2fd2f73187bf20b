"""A container's environment without a container: a small checkpoint, an empty cache. Knows no command."""

from __future__ import annotations

from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "build" / "checkpoints" / "demo"


@pytest.fixture
def demo() -> Path:
    """The demo checkpoint; its context is 262,144 tokens."""
    return DEMO


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder
