"""Engines and oracle models for the tests in this folder, each made once."""

from __future__ import annotations

import pytest
from rich.console import Console

from dgemma_build.accept.table import Setting


def pytest_configure(config: pytest.Config) -> None:
    # torch announces its own deprecations when it first compiles; they are not ours to mend.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="session")
def setting() -> Setting:
    return Setting(quick=True, console=Console(stderr=True))
