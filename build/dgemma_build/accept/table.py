"""What a row of the acceptance table is, and what rows are measured with. Knows no row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from dgemma_build.bench.__main__ import ROOT, run
from dgemma_build.bench.scenario import Cell
from dgemma_build.drafter.export import DrafterRequest, build_drafter
from dgemma_build.emulation import build_emulated
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.oracle import Model, load_oracle
from dgemma_build.random_checkpoint import write_checkpoint

GENERATED = ROOT / "artifacts/accept"
NAMES = ("demo", "odd_a", "odd_b")


@dataclass(frozen=True)
class Result:
    """A figure beside its bar."""

    figure: str
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)  # for the JSON file


class Setting:
    """Checkpoints, engines, oracles and the benchmark, each made once when a row first asks for it."""

    def __init__(self, quick: bool, console: Console) -> None:
        self.quick = quick
        self.console = console
        self._engines: dict[str, Path] = {}
        self._oracles: dict[str, Model] = {}

    def checkpoint(self, name: str) -> Path:
        """Those of the repository by their names, or a generated one; of `real`, a sliding layer and a full one."""
        if name.startswith("demo"):
            return ROOT / "build/checkpoints" / name
        if name == "real":
            directory = GENERATED / "checkpoints" / name
            return directory if directory.exists() else write_checkpoint(directory, name, layers=2, vocab_size=8192)
        return write_checkpoint(GENERATED / "checkpoints" / name, name)

    def engine(self, name: str, precision: str = "fp32") -> Path:
        """Built from the present sources."""
        key = f"{name}-{precision}"
        if key not in self._engines:
            output = GENERATED / "engines" / key
            output.parent.mkdir(parents=True, exist_ok=True)
            build_engine(BuildRequest(self.checkpoint(name), output, precision=precision))
            self._engines[key] = output
        return self._engines[key]

    def drafter(self, name: str) -> Path:
        """The engine of the drafter that lies beside the checkpoint."""
        key = f"{name}-drafter"
        if key not in self._engines:
            output = GENERATED / "engines" / key
            output.parent.mkdir(parents=True, exist_ok=True)
            build_drafter(DrafterRequest(ROOT / "build/checkpoints" / key, self.checkpoint(name), output))
            self._engines[key] = output
        return self._engines[key]

    def emulated(self, name: str, precision: str, kv_precision: str = "bf16") -> Path:
        """TensorRT's graph in that precision, to run on ONNX Runtime."""
        key = f"{name}-tensorrt-{precision}-{kv_precision}"
        if key not in self._engines:
            self._engines[key] = build_emulated(
                self.checkpoint(name), GENERATED / "engines" / key, precision, kv_precision
            )
        return self._engines[key]

    def oracle(self, name: str) -> Model:
        """One thread: these models are too small to share, and its numbers depend on it."""
        if name not in self._oracles:
            self._oracles[name] = load_oracle(self.checkpoint(name), threads=1)
        return self._oracles[name]

    @cached_property
    def cells(self) -> list[Cell]:
        """The whole benchmark; takes minutes."""
        return run(quick=False, compiled=True, console=self.console)


@dataclass(frozen=True)
class Row:
    """One line: what is measured, the bar, and how; quick rows also run in CI."""

    what: str
    bar: str
    measure: Callable[[Setting], Result]
    quick: bool = True
