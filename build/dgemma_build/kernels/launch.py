"""A Triton kernel with its types and constants: launched here, compiled by `compile`. Knows no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}


def pointer(dtype: str) -> str:
    """Triton's name for a pointer to `dtype`."""
    return f"*{dtype}"


def dtype_name(dtype: torch.dtype) -> str:
    """Triton's name for a type of activations, weights or keys."""
    return DTYPE_NAMES[dtype]


@dataclass(frozen=True)
class Kernel:
    """A kernel with all that it is specialised for.

    `signature` has the arguments in order and their types, for compiling ahead of time: a launch takes types from the
    tensors. Pointers are 16-byte aligned.
    """

    function: Any  # what triton.jit made
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run over `grid`; nothing to do where the grid is empty."""
        if all(grid):
            self.function[grid](*arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)
