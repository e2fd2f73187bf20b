"""Kernels run in Triton's interpreter here: on the CPU, one program after the other. Knows no kernel.

The interpreter has no bfloat16 arithmetic, so these tests use float16 and float32; the types of the released model
are compiled, by `test_compile.py` in a process of its own without this setting.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before tests/kernels asked for its interpreter; set TRITON_INTERPRET=1")

os.environ["TRITON_INTERPRET"] = "1"
import dgemma_build.kernels.catalogue  # noqa: F401  # Triton and all kernels; both read the setting on import

del os.environ["TRITON_INTERPRET"]  # what other tests start is to run as it would anywhere


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded."""
    return torch.Generator().manual_seed(20_261)
