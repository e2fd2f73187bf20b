"""Build the graph with TensorRT or TensorRT for RTX, which share this code. Knows the graph's inputs, not the model.

TensorRT builds for the GPU that it finds. TensorRT for RTX needs none: its plan is for the SM versions named here and
is finished on the machine that runs it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from onnx import TensorProto

from dgemma_build.attention import SLOT_GROUP
from dgemma_build.backends import CallLimits
from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering
from dgemma_build.progress import Progress
from dgemma_build.quantize import GroupFormat
from dgemma_runtime.errors import ConfigurationError

ENGINE_FILE = "rank0.engine"
DEFAULT_BATCH = 4  # canvases, where the build does not say
COMPUTE_CAPABILITIES = ("SM89", "SM120")  # of TensorRT for RTX
PLUGIN_TARGET = "sm_90"
GROUP = 32  # inputs to a scale of int4; 64 costs the demo checkpoint some of its answers
_USUAL_CONTEXT = 8192  # tokens that the kernels are chosen for

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, best, most


def longest_chunk(canvas_length: int) -> int:
    """Tokens of one encode call: those of a canvas, or 256. Scores of a full layer grow with it."""
    return max(256, canvas_length)


@dataclass(frozen=True)
class Profile:
    """Least, best and most rows (B), tokens a row (L), canvas rows (R) and slot groups (G) of one kind of call."""

    rows: tuple[int, int, int]
    tokens: tuple[int, int, int]
    canvas_rows: tuple[int, int, int]
    groups: tuple[int, int, int]


def profiles(canvas_length: int, max_batch_size: int, max_model_len: int) -> tuple[Profile, Profile]:
    """The denoise profile, whose rows may be canvases or be encoded beside them, and the encode profile."""
    most = -(-max_model_len // SLOT_GROUP)
    groups = (1, min(most, _USUAL_CONTEXT // SLOT_GROUP), most)
    batch, chunk = (1, 1, max_batch_size), longest_chunk(canvas_length)
    canvas_rows = (0, 1, max_batch_size)
    denoise = Profile(rows=batch, tokens=(canvas_length,) * 3, canvas_rows=canvas_rows, groups=groups)
    encode = Profile(rows=(1, 1, 1), tokens=(1, canvas_length, chunk), canvas_rows=(0, 0, 0), groups=groups)
    return denoise, encode


def draft_profile(canvas_length: int, max_batch_size: int, max_model_len: int) -> Profile:
    """Of a drafter, which is called for canvases only."""
    denoise, _ = profiles(canvas_length, max_batch_size, max_model_len)
    return denoise


# Which dimensions of an input come from the profile: a letter for each dynamic one, in order.
BINDINGS: dict[str, str] = {
    "token_ids": "BL",
    "position": "B",
    "sliding_length": "B",
    "is_canvas": "B",
    "canvas_rows": "R",
    "soft_embedding": "RL",
    "temperature": "R",
    "uniforms": "RL",
    "last_ids": "B",  # of a drafter
}


def binding_shapes(name: str, shape: tuple[int, ...], profile: Profile) -> Shapes:
    """Least, best and most shape of one input, whose graph shape has -1 for what is dynamic."""
    letters = BINDINGS.get(name, "BG")  # the caches
    sizes = {"B": profile.rows, "L": profile.tokens, "R": profile.canvas_rows, "G": profile.groups}
    dynamic = [axis for axis, size in enumerate(shape) if size < 0]
    if len(dynamic) > len(letters):
        raise ValueError(f"input {name} has a dynamic dimension that no profile covers: {shape}")
    found = []
    for which in range(3):
        chosen = list(shape)
        for axis, letter in zip(dynamic, letters, strict=False):
            chosen[axis] = sizes[letter][which]
        found.append(tuple(chosen))
    return found[0], found[1], found[2]


def recipe(precision: str, kv_precision: str, group: int = GROUP, plugins: bool = False) -> Lowering:
    """How the graph is written for a precision of the large matrices and one of keys and values.

    With plugins, experts and head are this project's kernels.
    """
    dtype = TensorProto.FLOAT if precision == "fp32" else TensorProto.BFLOAT16
    shared: dict[str, Any] = {"moe": "dense", "dtype": dtype, "in_place": False, "kv_dtype": kv_precision}
    if plugins:
        suffix = "" if precision == "bf16" else f"-{precision}"
        shared |= {"moe": f"plugins{suffix}", "plugin_head": True}
    if precision == "int4":
        return Lowering(weights="int4", groups=GroupFormat(4, group, bfloat16_scales=True), **shared)
    return Lowering(weights="fp8" if precision == "fp8" else "plain", **shared)


@dataclass(frozen=True)
class TensorRtBackend:
    """`library` is `tensorrt` or `tensorrt_rtx`, imported here."""

    library: str
    precision: str  # of the large matrices; all else is bf16
    kv_dtype: str  # bf16 or fp8: see `contract.cache_dtypes`
    plugins: bool = field(default=False, kw_only=True)  # experts and head as this project's kernels, on Hopper

    @property
    def build_seconds_per_gb(self) -> float:
        """As measured with TensorRT for RTX on two cores; TensorRT times kernels too, which no estimate covers."""
        return 12.0

    @property
    def _trt(self) -> Any:
        return importlib.import_module(self.library)

    @property
    def version(self) -> str:
        return str(self._trt.__version__)

    @property
    def target(self) -> str:
        if self.library == "tensorrt_rtx":
            return ",".join(name.lower().replace("sm", "sm_") for name in COMPUTE_CAPABILITIES)
        return _present_gpu()

    def lowering(self) -> Lowering:
        return recipe(self.precision, self.kv_dtype, plugins=self.plugins)

    def limits(self, config: TextConfig, max_batch_size: int | None) -> CallLimits:
        """What the profiles hold."""
        return CallLimits(max_batch_size or DEFAULT_BATCH, longest_chunk(config.spec.canvas_length))

    def build(
        self, directory: Path, config: TextConfig, max_model_len: int, limits: CallLimits, progress: Progress
    ) -> int:
        return self.compile(
            directory, profiles(config.spec.canvas_length, limits.max_batch_size, max_model_len), progress
        )

    def build_drafter(
        self, directory: Path, canvas_length: int, max_model_len: int, max_batch_size: int, progress: Progress
    ) -> int:
        return self.compile(directory, (draft_profile(canvas_length, max_batch_size, max_model_len),), progress)

    def compile(self, directory: Path, profiles_of: Sequence[Profile], progress: Progress) -> int:
        """Turn `model.onnx` into `rank0.engine`, which holds the weights; the graph's files are removed.

        Returns the bytes of scratch memory that a run may need. Raises ConfigurationError with the library's words.
        """
        trt = self._trt
        if self.plugins:
            self._register_plugins(trt)
        log = _log(trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(directory / "model.onnx")):
            errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise ConfigurationError(f"{self.library} {self.version} does not take the graph: {errors}")
        _allow_decomposing(trt, network)
        settings = builder.create_builder_config()
        settings.progress_monitor = _monitor(trt, progress, f"building with {self.library}")
        if self.library == "tensorrt_rtx":
            settings.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # without it a step cannot be captured
            settings.num_compute_capabilities = len(COMPUTE_CAPABILITIES)
            for index, name in enumerate(COMPUTE_CAPABILITIES):
                settings.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        for profile in profiles_of:
            settings.add_optimization_profile(_described(builder, network, profile))
        size = (directory / "model.onnx.data").stat().st_size
        with (directory / ENGINE_FILE).open("wb") as file:
            writer = _stream(trt, file, lambda: progress.stage("writing the engine", size), progress)
            built = builder.build_serialized_network_to_stream(network, settings, writer)
        if writer.error is not None:
            raise writer.error
        if not built:
            raise ConfigurationError(f"{self.library} {self.version} cannot build the graph: {'; '.join(log.errors)}")
        for name in ("model.onnx", "model.onnx.data"):
            (directory / name).unlink()
        return int(log.scratch_bytes)

    def _register_plugins(self, trt: Any) -> None:
        """Compiled ahead of time for one target, which must be the GPU's."""
        if self.target != PLUGIN_TARGET:
            raise ConfigurationError(
                f"--plugins: the kernels are compiled for {PLUGIN_TARGET}, this GPU is {self.target}; build without"
            )
        try:
            from dgemma_build.kernels.plugins import register
        except ImportError as error:
            raise ConfigurationError(f"--plugins: {error}; install the extra `kernels` and torch") from None
        register(trt, importlib.import_module("tensorrt.plugin"))


def _allow_decomposing(trt: Any, network: Any) -> None:
    """Attention of shapes and types without a fused kernel is then written out instead of refused."""
    if not hasattr(trt, "IAttentionInputLayer"):  # before 10.15 or so, where the parser writes it out
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _described(builder: Any, network: Any, profile: Profile) -> Any:
    described = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        described.set_shape(tensor.name, *binding_shapes(tensor.name, tuple(tensor.shape), profile))
    return described


def _log(trt: Any) -> Any:
    """Keeps errors, so that they can be shown with the exception, and the scratch memory that the builder reports."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.scratch_bytes = 0

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif found := re.match(r"Total Activation Memory: (\d+) bytes", message):
                self.scratch_bytes = max(self.scratch_bytes, int(found[1]))

    return Log()


def _monitor(trt: Any, progress: Progress, text: str) -> Any:
    """Shows the builder's outermost phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if not parent:
                progress.stage(f"{text}: {name}")

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None: ...

    return Monitor()


def _stream(trt: Any, file: BinaryIO, begin: Callable[[], None], progress: Progress) -> Any:
    """Writes the engine as it comes, so that it never stands in memory as a whole.

    An exception would be lost in the library, which goes on and reports success; so it is kept in `error`.
    """

    class Stream(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self._begun = False
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is not None:
                return 0
            if not self._begun:
                begin()
                self._begun = True
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return 0
            progress.advance(len(data))
            return len(data)

    return Stream()


def _present_gpu() -> str:
    """The SM version of the GPU that TensorRT would build for."""
    from cuda.bindings import runtime

    error, device = runtime.cudaGetDevice()
    numbers = []
    for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        if int(error) == 0:
            error, number = runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, name), device)
            numbers.append(number)
    if int(error) != 0:
        _, words = runtime.cudaGetErrorString(error)
        raise ConfigurationError(
            f"--backend tensorrt: builds for the GPU that it runs on, and CUDA finds none ({words.decode()}); build on "
            "the machine that will serve, or choose tensorrt_rtx or onnxruntime"
        )
    return f"sm_{numbers[0]}{numbers[1]}"
