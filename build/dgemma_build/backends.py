"""The backends an engine can be built for: their lowering, their build step, what the manifest says of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering
from dgemma_build.progress import Progress
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

    @property
    def build_seconds_per_gb(self) -> float:
        """Of weights, for `build`, roughly; 0 where it writes no engine of its own beside the graph."""
        ...

    def lowering(self) -> Lowering:
        """How the graph is written for it."""
        ...

    def limits(self, config: TextConfig, max_batch_size: int | None) -> CallLimits:
        """What the engine's calls will be limited to, for a batch size that was asked for or not."""
        ...

    def build(
        self, directory: Path, config: TextConfig, max_model_len: int, limits: CallLimits, progress: Progress
    ) -> int:
        """Turn `model.onnx` in `directory` into what the runtime loads; returns bytes of scratch, 0 if unknown."""
        ...

    def build_drafter(
        self, directory: Path, canvas_length: int, max_model_len: int, max_batch_size: int, progress: Progress
    ) -> int:
        """The same for a drafter's graph."""
        ...


@dataclass(frozen=True)
class CallLimits:
    """0 where there is none."""

    max_batch_size: int  # canvases of a denoise call
    max_encode_tokens: int  # tokens of a row of an encode call


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """The graph is the engine, on the CPU: float32, the large matrices in integers where asked for."""

    version: str
    weights: GroupFormat | None = None  # of experts, attention and MLP; None: float32
    target: str = "cpu"
    kv_dtype: str = "fp32"
    build_seconds_per_gb: float = 0.0

    def lowering(self) -> Lowering:
        """Experts do no work for tokens that did not choose them."""
        return Lowering(moe="grouped", weights="integers" if self.weights else "plain", groups=self.weights)

    def limits(self, config: TextConfig, max_batch_size: int | None) -> CallLimits:
        return CallLimits(max_batch_size or 0, 0)

    def build(
        self, directory: Path, config: TextConfig, max_model_len: int, limits: CallLimits, progress: Progress
    ) -> int:
        """Nothing to do: ONNX Runtime reads the graph as it is."""
        return 0

    def build_drafter(
        self, directory: Path, canvas_length: int, max_model_len: int, max_batch_size: int, progress: Progress
    ) -> int:
        return 0


GROUP_SIZE = 32  # inputs to a scale
_WEIGHTS = {"fp32": None, "int8": GroupFormat(8, GROUP_SIZE), "int4": GroupFormat(4, GROUP_SIZE)}
_TENSORRT = ("bf16", "fp8", "int4", "fp32")
PRECISIONS = {"onnxruntime": tuple(_WEIGHTS), "tensorrt": _TENSORRT, "tensorrt_rtx": _TENSORRT}
PRECISIONS["tensorrt_llm"] = ("bf16",)
KV_PRECISIONS = {"onnxruntime": ("fp32",)} | dict.fromkeys(
    ("tensorrt", "tensorrt_rtx", "tensorrt_llm"), ("bf16", "fp8")
)
_INSTALL = {
    "tensorrt": "install tensorrt from NVIDIA's own package index, on the machine with the GPU",
    "tensorrt_rtx": "install the package tensorrt-rtx-cu13",
}


def backend_for(name: str, precision: str, kv_precision: str = "", plugins: bool = False) -> Backend:
    """The backend, or ConfigurationError naming what can be had; "" for its own precision of keys and values."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"--backend {name}: not available; choose one of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[name]:
        choices = ", ".join(PRECISIONS[name])
        raise ConfigurationError(f"--precision {precision}: {name} is built in {choices}")
    kv_choices = ("fp32",) if precision == "fp32" else KV_PRECISIONS[name]
    if kv_precision and kv_precision not in kv_choices:
        choices = " or ".join(kv_choices)
        raise ConfigurationError(f"--kv-precision {kv_precision}: {name} in {precision} is built with {choices}")
    if plugins and name != "tensorrt":
        raise ConfigurationError(f"--plugins: {name} takes none; choose --backend tensorrt")
    if name == "onnxruntime":
        return OnnxRuntimeBackend(version("onnxruntime"), _WEIGHTS[precision])
    if name == "tensorrt_llm":
        from dgemma_build.tensorrt_llm import open_backend

        return open_backend(precision, kv_precision or kv_choices[0])
    try:
        import_module(name)
    except ImportError as error:
        raise ConfigurationError(f"--backend {name}: {error}; {_INSTALL[name]}") from None
    from dgemma_build.tensorrt import TensorRtBackend

    return TensorRtBackend(name, precision, kv_precision or kv_choices[0], plugins=plugins)
