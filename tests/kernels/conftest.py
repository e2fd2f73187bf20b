"""Kernels run in Triton's interpreter here: on the CPU, one program after the other. Knows no kernel.

The interpreter has no bfloat16 arithmetic, so these tests use float16 and float32; the types of the released model
are compiled, by `test_compile.py` in a process of its own without this setting.

Triton chooses between compiler and interpreter when its own Python modules and the kernels are imported. Libraries
that other tests use may have imported it as a compiler by then; they keep that copy, which a CPU never uses.
"""

from __future__ import annotations

import sys

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    if "dgemma_build.kernels.catalogue" not in sys.modules:  # else by the tests of the GPU check, in the same way
        for name in list(sys.modules):
            if name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C")):
                del sys.modules[name]
    import dgemma_build.kernels.catalogue  # noqa: F401


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded."""
    return torch.Generator().manual_seed(20_261)
