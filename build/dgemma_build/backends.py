"""The backends an engine can be built for: their lowering, their build step, what the manifest says of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from onnx import TensorProto

from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering
from dgemma_runtime.errors import ConfigurationError


class Backend(Protocol):
    """One engine library."""

    lowering: Lowering
    version: str
    target: str

    def build(self, directory: Path, config: TextConfig, max_model_len: int, max_batch_size: int) -> None:
        """Turn `model.onnx` in `directory` into what the runtime loads."""
        ...


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """The graph is the engine; fp32 on the CPU."""

    lowering: Lowering
    version: str
    target: str = "cpu"

    def build(self, directory: Path, config: TextConfig, max_model_len: int, max_batch_size: int) -> None:
        """Nothing to do: ONNX Runtime reads the graph as it is."""


PRECISIONS = {"onnxruntime": ("fp32",), "tensorrt_rtx": ("bf16", "fp16")}
_DTYPES = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}


def backend_for(name: str, precision: str) -> Backend:
    """The backend, or ConfigurationError naming what can be had."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"--backend {name}: not available; choose one of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[name]:
        choices = ", ".join(PRECISIONS[name])
        raise ConfigurationError(f"--precision {precision}: {name} is built in {choices}")
    if name == "onnxruntime":
        return OnnxRuntimeBackend(Lowering("grouped", _DTYPES[precision]), version("onnxruntime"))
    from dgemma_build.tensorrt_rtx import TensorRtRtxBackend

    return TensorRtRtxBackend.create(Lowering("dense", _DTYPES[precision]))
