"""The backends an engine can be built for: their lowering, their build step, what the manifest says of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from onnx import TensorProto

from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering
from dgemma_build.quantize import GroupFormat
from dgemma_runtime.errors import ConfigurationError


class Backend(Protocol):
    """One engine library at one precision."""

    @property
    def version(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def kv_dtype(self) -> str: ...

    def lowering(self, config: TextConfig, max_model_len: int) -> Lowering:
        """How the graph is written for it."""
        ...

    def build(self, directory: Path, config: TextConfig, max_batch_size: int) -> None:
        """Turn `model.onnx` in `directory` into what the runtime loads."""
        ...


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """The graph is the engine, on the CPU: float32, the large matrices in integers where asked for."""

    version: str
    weights: GroupFormat | None = None  # of experts, attention and MLP; None: float32
    target: str = "cpu"
    kv_dtype: str = "fp32"

    def lowering(self, config: TextConfig, max_model_len: int) -> Lowering:
        """Experts do no work for tokens that did not choose them."""
        return Lowering(moe="grouped", dtype=TensorProto.FLOAT, quantized=self.weights)

    def build(self, directory: Path, config: TextConfig, max_batch_size: int) -> None:
        """Nothing to do: ONNX Runtime reads the graph as it is."""


GROUP_SIZE = 32  # inputs to a scale
_WEIGHTS = {"fp32": None, "int8": GroupFormat(8, GROUP_SIZE), "int4": GroupFormat(4, GROUP_SIZE)}
PRECISIONS = {"onnxruntime": tuple(_WEIGHTS), "tensorrt_rtx": ("bf16", "fp16")}


def backend_for(name: str, precision: str) -> Backend:
    """The backend, or ConfigurationError naming what can be had."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"--backend {name}: not available; choose one of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[name]:
        choices = ", ".join(PRECISIONS[name])
        raise ConfigurationError(f"--precision {precision}: {name} is built in {choices}")
    if name == "onnxruntime":
        return OnnxRuntimeBackend(version("onnxruntime"), _WEIGHTS[precision])
    try:  # a separate environment has it: see the extra `tensorrt-rtx`
        from dgemma_build.tensorrt_rtx import DTYPES, TensorRtRtxBackend
    except ImportError as error:
        raise ConfigurationError(f"--backend {name}: {error}; install the package tensorrt-rtx") from None
    return TensorRtRtxBackend(DTYPES[precision], precision)
