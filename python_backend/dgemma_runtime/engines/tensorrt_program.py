"""An engine file as a program: TensorRT's and TensorRT for RTX's runtimes, which share an API. Knows no model.

Every context is given the same scratch memory, since they run one after another on one stream; so a graph may hold a
context of its own and costs no memory for activations.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import re
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgemma_runtime.contract import Manifest
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.bindings import ENCODE
from dgemma_runtime.engines.cuda import CudaDevice
from dgemma_runtime.engines.device import ALIGNMENT, OutOfMemory, Tensor, TensorSpec
from dgemma_runtime.errors import ConfigurationError, EngineError, ManifestError

_log = logging.getLogger(__name__)

_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "FP8": "fp8", "INT32": "int32", "INT64": "int64"}
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_REBUILD = "build the engine again with `dgemma-build engine`"


def tensorrt_library(directory: Path, manifest: Manifest | DrafterManifest) -> Any:
    """The Python module of the manifest's backend, in the version that built the engine.

    Raises ConfigurationError where it is not installed, ManifestError where it is another version.
    """
    name, built = manifest.backend, manifest.backend_version
    if name == "tensorrt_llm":
        remedy = f"run the server in an environment with tensorrt-llm {built.partition('+')[0]}"
    else:
        remedy = f"run `pip install {_PACKAGES[name]}=={built}`"
    try:
        library, installed = _import(name)
    except ImportError as error:
        raise ConfigurationError(
            f"{directory}: the engine needs the Python package of {name} {built} ({error}); {remedy}"
        ) from None
    if installed != built:
        raise ManifestError(
            f"{directory}: the engine was built with {name} {built}, installed is {installed}; {remedy}, or {_REBUILD}"
        )
    return library


def _import(name: str) -> tuple[Any, str]:
    """TensorRT's module and its version, as builds write it. TensorRT-LLM has plugins that an engine needs."""
    if name != "tensorrt_llm":
        library = importlib.import_module(name)
        return library, str(library.__version__)
    plugins, library = importlib.import_module(name), importlib.import_module("tensorrt")
    return library, f"{plugins.__version__}+tensorrt.{library.__version__}"


def check_target(directory: Path, manifest: Manifest | DrafterManifest, device: CudaDevice) -> None:
    """Raises ManifestError where the GPU is none that the engine was built for."""
    targets = [target.strip() for target in manifest.target.split(",")]
    if f"sm_{device.sm}" not in targets:
        raise ManifestError(
            f"{directory}: GPU {device.index} ({device.name}) is sm_{device.sm}, the engine was built for "
            f"{', '.join(targets)}; choose another gpu, or {_REBUILD} for this one"
        )


def program_loader(library: Any, device: CudaDevice) -> Callable[[Path], TensorRtProgram]:
    """For `TensorRtEngine`."""
    return lambda path: TensorRtProgram(library, device, path)


class TensorRtProgram:
    """See `dgemma_runtime.engines.device.Program`. Raises ManifestError for a file that is no engine for here."""

    def __init__(self, library: Any, device: CudaDevice, path: Path) -> None:
        self._library, self._device, self._path = library, device, path
        self._messages: deque[str] = deque(maxlen=3)  # the last errors
        self._log = _make_log(library, self._messages)
        self._runtime: Any = library.Runtime(self._log)
        self._engine: Any = self._deserialize()
        if self._engine is None:
            raise ManifestError(f"{path}: {library.__name__} cannot load it: {self.errors()}; {_REBUILD}")
        self.tensors: Mapping[str, TensorSpec] = self._read_tensors()
        self._rtx: Any = self._rtx_cache()
        self.scratch_bytes = max(int(self._engine.device_memory_size_v2), ALIGNMENT)
        self.scratch = device.allocate(self.scratch_bytes, "TensorRT's activations")

    def _deserialize(self) -> Any:
        """From the page cache: a copy in the process would double the weights in memory."""
        size, free = self._path.stat().st_size, self._device.available_bytes()
        if not size:
            raise ManifestError(f"{self._path}: is empty; {_REBUILD}")
        if size > free:
            raise OutOfMemory(size, "the weights", free)
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return self._runtime.deserialize_cuda_engine(content)

    def _read_tensors(self) -> dict[str, TensorSpec]:
        engine, tensors = self._engine, {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = engine.get_tensor_dtype(name).name
            is_input = engine.get_tensor_mode(name) == self._library.TensorIOMode.INPUT
            profiles = range(engine.num_optimization_profiles if is_input else 0)
            shapes = [engine.get_tensor_profile_shape(name, profile) for profile in profiles]
            least, largest = (tuple(tuple(shape[which]) for shape in shapes) for which in (0, 2))
            shape = tuple(engine.get_tensor_shape(name))
            tensors[name] = TensorSpec(is_input, _TYPES.get(dtype, dtype.lower()), shape, least, largest)
        return tensors

    def _rtx_cache(self) -> Any:
        """Kernels that TensorRT for RTX compiles for a shape, shared by all contexts; other backends have none."""
        if not hasattr(self._library, "DynamicShapesKernelSpecializationStrategy"):
            return None
        return self._engine.create_runtime_config().create_runtime_cache()

    def context(self, profile: int) -> TensorRtContext:
        """Raises EngineError, OutOfMemory where TensorRT says so."""
        self._messages.clear()
        created = self._create(profile)
        if created is None and re.search("out ?of ?memory", self.errors(), re.IGNORECASE):
            raise OutOfMemory(None, "TensorRT's execution contexts", self._device.available_bytes())
        if created is None:
            raise self.failure("cannot make an execution context")
        context = TensorRtContext(self, created)
        stream = self._device.stream
        if not created.set_optimization_profile_async(profile, stream):
            raise self.failure(f"does not take profile {profile}")
        self._device.synchronize()
        created.set_device_memory(self.scratch, self.scratch_bytes)
        return context

    def _create(self, profile: int) -> Any:
        library = self._library
        managed = library.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._rtx is None:
            return self._engine.create_execution_context(managed)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        config.set_runtime_cache(self._rtx)
        # A captured step must hold the kernels made for its shape; of chunks there are too many lengths to wait for.
        strategy = library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategy.LAZY if profile == ENCODE else strategy.EAGER
        return self._engine.create_execution_context(config)

    @property
    def stream(self) -> int:
        return self._device.stream

    def failure(self, what: str) -> EngineError:
        """With TensorRT's last words."""
        return EngineError(f"{self._path}: {self._library.__name__} {what}: {self.errors()}")

    def errors(self) -> str:
        """What TensorRT has logged as errors last."""
        return "; ".join(self._messages) or "no reason given"

    def close(self) -> None:
        self._device.free(self.scratch)
        self._rtx = None
        self._engine = None  # before its runtime
        self._runtime = None


class TensorRtContext:
    """See `dgemma_runtime.engines.device.Context`."""

    def __init__(self, program: TensorRtProgram, context: Any) -> None:
        self._program, self._context = program, context
        self._warned = False

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._program.tensors[name].is_input and not self._context.set_input_shape(name, tensor.shape):
                raise self._program.failure(f"does not take {name} of shape {tensor.shape}")
            if not self._context.set_tensor_address(name, tensor.address):
                raise self._program.failure(f"does not take the address of {name}")
        if missing := self._context.infer_shapes():
            raise self._program.failure(f"lacks a shape for {', '.join(missing)}")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._program.stream):
            raise self._program.failure("could not run")

    def can_be_captured(self) -> bool:
        if not hasattr(self._context, "is_stream_capturable"):
            return True
        capturable = bool(self._context.is_stream_capturable(self._program.stream))
        if not capturable and not self._warned:
            self._warned = True
            _log.warning("TensorRT cannot have this step captured as a CUDA graph; it runs without one, more slowly")
        return capturable

    def close(self) -> None:
        self._context = None


def _make_log(library: Any, messages: deque[str]) -> Any:
    """TensorRT's log: warnings and errors to ours, errors to `messages` as well."""
    errors = (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR)

    class Log(library.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                messages.append(message)
                _log.error("%s", message)
            elif severity == library.ILogger.WARNING:
                _log.warning("%s", message)

    return Log()
