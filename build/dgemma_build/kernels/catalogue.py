"""Which kernels the released model needs, with its sizes. Knows no compiler and no tensors."""

from __future__ import annotations

from collections.abc import Iterator

from dgemma_build.kernels.head import HeadConfig, head_kernels
from dgemma_build.kernels.launch import Kernel

HIDDEN, VOCABULARY = 2816, 262_144


def released_kernels() -> Iterator[tuple[str, Kernel]]:
    """(variant, kernel) for everything that is compiled ahead of time."""
    for kernel in head_kernels(VOCABULARY, HIDDEN, "bf16", HeadConfig()):
        yield "bf16", kernel
