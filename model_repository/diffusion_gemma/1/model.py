"""Where Triton enters: the model's class, from the package `dgemma_runtime`. Knows nothing else."""

from __future__ import annotations

import os
import sys

# Triton's stub starts Python isolated from the environment, so PYTHONPATH, where it is used, is to be honoured here.
sys.path.extend(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in (*sys.path, ""))

from dgemma_runtime.triton_backend import TritonBackend


class TritonPythonModel(TritonBackend):
    """One instance, one engine; see `dgemma_runtime.triton_backend`."""
