"""The row about the container image: built from nothing, started by its own entry point. Needs root and buildah."""

from __future__ import annotations

import subprocess
import sys
import time

from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.bench.__main__ import ROOT

_CHECK = ROOT / "build/tooling/check-image"
_LIMIT_S = 1800.0


def _image(setting: Setting) -> Result:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, _CHECK], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    seconds = time.perf_counter() - started
    said = [line.removeprefix("check-image: ") for line in done.stderr.splitlines() if line.startswith("check-image: ")]
    told = [line for line in said if line.startswith(("alive", "answer", "stopped"))]
    figure = "; ".join(told) if done.returncode == 0 else f"failed: {said[-1] if said else done.stderr[-300:]}"
    return Result(f"{figure}; {seconds:.0f} s in all", done.returncode == 0)


ROWS: tuple[Row, ...] = (
    Row(
        "image: built on a minimal Debian, serves the demo checkpoint on the CPU",
        "serves and stops",
        _image,
        quick=False,
    ),
)
