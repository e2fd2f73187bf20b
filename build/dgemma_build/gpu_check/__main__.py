"""Checks the kernels on the GPU at hand: numbers against PyTorch, shares of what the card can do, whole steps.

    python -m dgemma_build.gpu_check [--output FILE] [--layers N] [--quick] [--only TEXT]

Needs PyTorch with CUDA and the Triton language, nothing else. Exit status: 0, also where a speed is short of its bar,
which the table and the file say; 1 if a number is wrong or something did not run; 2 if there is no usable GPU.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> int:
    """The command, if what it needs is installed."""
    for name in ("torch", "triton"):
        if find_spec(name) is None:
            print(f"gpu-check: {name} is not installed; this needs PyTorch's CUDA build and triton", file=sys.stderr)
            return 2
    from dgemma_build.gpu_check import command

    return command.main()


if __name__ == "__main__":
    sys.exit(main())
