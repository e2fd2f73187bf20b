"""Checkpoints, engines and oracle models for the tests in this folder, each made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.oracle import Model, load_oracle
from dgemma_build.random_checkpoint import write_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "build/checkpoints/demo"

Named = Callable[[str], Path]


def pytest_configure(config: pytest.Config) -> None:
    # torch announces its own deprecations when it first compiles; they are not ours to mend.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Named:
    """Directory of `demo` or of a generated checkpoint."""

    @cache
    def directory(name: str) -> Path:
        return DEMO if name == "demo" else write_checkpoint(tmp_path_factory.mktemp("checkpoints") / name, name)

    return directory


@pytest.fixture(scope="session")
def engine_directory(checkpoint: Named, tmp_path_factory: pytest.TempPathFactory) -> Named:
    """An onnxruntime engine of the named checkpoint."""

    @cache
    def directory(name: str) -> Path:
        output = tmp_path_factory.mktemp("engines") / name
        build_engine(BuildRequest(checkpoint(name), output))
        return output

    return directory


@pytest.fixture(scope="session")
def oracle(checkpoint: Named) -> Callable[[str], Model]:
    """The named checkpoint in transformers; one thread, since these models are too small to share."""

    @cache
    def model(name: str) -> Model:
        return load_oracle(checkpoint(name), threads=1)

    return model
