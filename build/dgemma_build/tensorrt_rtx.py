"""Build the graph with TensorRT for RTX, which needs no GPU to build. Knows the graph's inputs, not the model.

The plan is for the SM versions named here. It cannot be run where there is no such GPU, and no part of the serving
runtime loads it yet; what a build proves is that TensorRT takes the whole graph with its profiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt
from onnx import TensorProto

from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering
from dgemma_runtime.errors import ConfigurationError

ENGINE_FILE = "rank0.engine"
ENCODE_TOKENS = 512  # the longest chunk of the encode profile
DEFAULT_BATCH = 4  # canvases, where the build does not say
COMPUTE_CAPABILITIES = ("SM89", "SM120")

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, best, most


@dataclass(frozen=True)
class Profile:
    """Least, best and most rows (B), tokens a row (L) and canvas rows (R) of one kind of call."""

    rows: tuple[int, int, int]
    tokens: tuple[int, int, int]
    canvas_rows: tuple[int, int, int]


def profiles(canvas_length: int, max_batch_size: int) -> tuple[Profile, Profile]:
    """The denoise profile and the encode profile."""
    batch = (1, 1, max_batch_size)
    denoise = Profile(rows=batch, tokens=(canvas_length,) * 3, canvas_rows=batch)
    encode = Profile(
        rows=(1, 1, 1), tokens=(1, canvas_length, max(ENCODE_TOKENS, canvas_length)), canvas_rows=(0, 0, 0)
    )
    return denoise, encode


# Which of B, L and R an input's leading dimensions are; caches and what follows keep the graph's own sizes.
BINDINGS: dict[str, str] = {
    "token_ids": "BL",
    "position": "B",
    "sliding_length": "B",
    "is_canvas": "B",
    "canvas_rows": "R",
    "soft_embedding": "RL",
    "temperature": "R",
    "uniforms": "RL",
}


def binding_shapes(name: str, shape: tuple[int, ...], profile: Profile) -> Shapes:
    """Least, best and most shape of one input, whose graph shape has -1 for what is dynamic."""
    axes = BINDINGS.get(name, "B")  # the caches
    sizes = {"B": profile.rows, "L": profile.tokens, "R": profile.canvas_rows}
    least, best, most = ((*(sizes[axis][which] for axis in axes), *shape[len(axes) :]) for which in range(3))
    if any(size < 0 for size in (*least, *best, *most)):
        raise ValueError(f"input {name} has a dynamic dimension that no profile covers: {shape}")
    return least, best, most


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, so that they can be shown with the exception."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


@dataclass(frozen=True)
class TensorRtRtxBackend:
    """TensorRT for RTX in bf16 or fp16, strongly typed."""

    dtype: int
    kv_dtype: str  # bf16 or fp16
    version: str = trt.__version__
    target: str = ",".join(name.lower().replace("sm", "sm_") for name in COMPUTE_CAPABILITIES)

    def lowering(self, config: TextConfig, max_model_len: int) -> Lowering:
        """Caches of fixed size: TensorRT writes them in place only when it knows their length."""
        chunk = max(ENCODE_TOKENS, config.spec.canvas_length)
        slots = (config.spec.sliding_window - 1 + chunk, max_model_len + config.spec.canvas_length)
        return Lowering(moe="dense", dtype=self.dtype, cache_slots=slots)

    def build(self, directory: Path, config: TextConfig, max_batch_size: int) -> None:
        """Turn `model.onnx` into `rank0.engine`, which holds the weights; the graph's files are removed."""
        log = _Log()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(directory / "model.onnx")):
            errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise ConfigurationError(f"tensorrt_rtx {self.version} does not take the graph: {errors}")
        settings = builder.create_builder_config()
        settings.num_compute_capabilities = len(COMPUTE_CAPABILITIES)
        for index, name in enumerate(COMPUTE_CAPABILITIES):
            settings.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        for profile in profiles(config.spec.canvas_length, max_batch_size or DEFAULT_BATCH):
            settings.add_optimization_profile(self._profile(builder, network, profile))
        plan = builder.build_serialized_network(network, settings)
        if plan is None:
            raise ConfigurationError(f"tensorrt_rtx {self.version} cannot build the graph: {'; '.join(log.errors)}")
        (directory / ENGINE_FILE).write_bytes(plan)
        for name in ("model.onnx", "model.onnx.data"):
            (directory / name).unlink()

    def _profile(self, builder: Any, network: Any, profile: Profile) -> Any:
        described = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            described.set_shape(tensor.name, *binding_shapes(tensor.name, tuple(tensor.shape), profile))
        return described


DTYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
