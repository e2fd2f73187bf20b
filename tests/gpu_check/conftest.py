"""The whole check at tiny sizes in Triton's interpreter, with a clock in place of a card.

Triton chooses between compiler and interpreter when it is imported: see tests/kernels/conftest.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    if "dgemma_build.kernels.catalogue" not in sys.modules:
        for name in list(sys.modules):
            if name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C")):
                del sys.modules[name]
    import dgemma_build.gpu_check.command  # noqa: F401
    from dgemma_build.gpu_check.machine import Timing, scaled_product
    from dgemma_build.gpu_check.sizes import RELEASED, WHOLE, ModelSizes, Scope
    from dgemma_build.kernels.attention import AttentionSizes
    from dgemma_build.kernels.experts import ExpertSizes


class ClockMachine:
    """The CPU: a call is made once, by the clock, and what it made can be asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0

    def time(self, run: Callable[[], object], repetitions: int) -> Timing:
        self.calls += 1
        start = time.perf_counter()
        run()
        taken = 1e3 * (time.perf_counter() - start)
        return Timing(taken, taken, repetitions)

    def fp8_product(self, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: torch.dtype) -> Tensor:
        return scaled_product(x, x_scale, weight, weight_scale, out)

    def release(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {
            "device": "a clock",
            "sm": "none",
            "driver": "none",
            "torch": torch.__version__,
            "triton": "interpreted",
        }


TINY = replace(
    RELEASED,
    hidden=128,
    vocabulary=200,
    canvas=8,
    dense_inner=64,
    experts=ExpertSizes(experts=4, top_k=2, hidden=128, inner=64),
    sliding=AttentionSizes(heads=2, kv_heads=1, head_dim=16, window=24, page=16),
    full=AttentionSizes(heads=2, kv_heads=1, head_dim=32, window=0, page=16),
    period=2,
    group=32,
    dtype=torch.float16,  # the interpreter has no bfloat16 arithmetic
)
LITTLE = replace(
    WHOLE,
    contexts=(64,),
    step_contexts=(40,),
    canvases=2,
    full_step=2,
    chunk=12,
    chunk_context=32,
    layers=2,
    repetitions=1,
    step_repetitions=1,
    probe_bytes=4096,
    probe_side=32,
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def machine() -> ClockMachine:
    return ClockMachine()


@pytest.fixture(scope="session")
def tiny() -> ModelSizes:
    return TINY


@pytest.fixture(scope="session")
def little() -> Scope:
    return LITTLE
