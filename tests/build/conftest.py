"""A small odd checkpoint for the build tests, and one engine built from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only; take `checkpoint_copy` to damage it."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "odd_a", "odd_a")


@pytest.fixture
def checkpoint_copy(odd_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(odd_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def odd_engine(odd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "odd_a"
    build_engine(BuildRequest(odd_checkpoint, output))
    return output
