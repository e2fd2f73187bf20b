"""TensorRT's Python API, as far as `tensorrt_program` uses it, over emulated CUDA, for tests. Knows no model.

An engine is the made-up model of `scripted_program`; its file must hold `ENGINE_BYTES`.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Any

from dgemma_runtime.engines.bindings import Bindings
from dgemma_runtime.engines.device import Tensor
from dgemma_runtime.engines.emulated_cuda import EmulatedCuda
from dgemma_runtime.engines.host_device import HostProgram
from dgemma_runtime.engines.scripted_program import scripted_program

ENGINE_BYTES = b"an engine"
SCRATCH_BYTES = 4096
_TYPES = {"fp32": "FLOAT", "fp16": "HALF"}


class _Logger(ABC):
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    @abstractmethod
    def log(self, severity: int, message: str) -> None: ...


class EmulatedTensorRt:
    """Stands for the module `tensorrt`, or `tensorrt_rtx` where `rtx`."""

    def __init__(self, cuda: EmulatedCuda, bindings: Bindings, version: str = "1.2.3", rtx: bool = False) -> None:
        self.__name__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.__version__ = version
        self.cuda, self.bindings, self.rtx = cuda, bindings, rtx
        self.capturable = True
        self.refuses: set[str] = set()  # methods of an execution context that say no
        self.words = "no context today"  # where no context can be made
        self.alive: weakref.WeakSet[_Engine | _Context] = weakref.WeakSet()
        self.configs: list[Any] = []  # of TensorRT for RTX, all that were ever made
        self.ILogger = _Logger
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager")
        self.program: HostProgram = scripted_program(cuda.host, bindings)

    def Runtime(self, log: _Logger) -> Any:  # noqa: N802 - TensorRT's name
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self._deserialize(log, bytes(content)))

    def _deserialize(self, log: _Logger, content: bytes) -> _Engine | None:
        if content != ENGINE_BYTES:
            log.log(_Logger.ERROR, "the magic tag does not match")
            return None
        log.log(_Logger.WARNING, "a warning of no importance")
        engine = _Engine(self, log)
        self.alive.add(engine)
        return engine


class _Engine:
    def __init__(self, library: EmulatedTensorRt, log: _Logger) -> None:
        self.library, self.log = library, log
        self.specs = library.program.tensors
        self.device_memory_size_v2 = SCRATCH_BYTES
        self.num_io_tensors, self.num_optimization_profiles = len(self.specs), 2

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = self.specs[name].dtype
        return SimpleNamespace(name=_TYPES.get(dtype, dtype.upper()))

    def get_tensor_mode(self, name: str) -> str:
        return "input" if self.specs[name].is_input else "output"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert self.specs[name].is_input
        return [self.specs[name].least[profile], (), self.specs[name].largest[profile]]

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(create_runtime_cache=lambda: "a cache", strategy=None, cache=None)
        config.set_execution_context_allocation_strategy = lambda value: setattr(config, "strategy", value)
        config.set_runtime_cache = lambda value: setattr(config, "cache", value)
        self.library.configs.append(config)
        return config

    def create_execution_context(self, how: Any) -> _Context | None:
        strategy = how.strategy if self.library.rtx else how
        assert strategy == "user managed"
        if "create_execution_context" in self.library.refuses:
            self.log.log(_Logger.ERROR, self.library.words)
            return None
        context = _RtxContext(self) if self.library.rtx else _Context(self)
        self.library.alive.add(context)
        return context


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.library, self.log, self.specs = engine.library, engine.log, engine.specs
        self.profile = -1
        self.changes = 0  # of shapes and addresses
        self.ran_at = -1  # after so many changes
        self.scratch = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def _says_no(self, method: str) -> bool:
        if method in self.library.refuses:
            self.log.log(_Logger.ERROR, f"{method} refused")
            return True
        return False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.library.cuda.stream(stream)
        self.profile = profile
        return not self._says_no("set_optimization_profile_async")

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH_BYTES
        self.library.cuda.host.view(address, size)
        self.scratch = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.specs[name].is_input
        self.changes += 1
        self.shapes[name] = shape
        return not self._says_no("set_input_shape")

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        return not self._says_no("set_tensor_address")

    def infer_shapes(self) -> list[str]:
        return ["token_ids"] if "infer_shapes" in self.library.refuses else []

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.library.cuda
        cuda.stream(stream)
        if self._says_no("execute_async_v3"):
            return False
        assert not cuda.capturing or (self.ran_at == self.changes and self.library.capturable)
        self.ran_at = changes = self.changes
        cuda.host.view(self.scratch, SCRATCH_BYTES)
        tensors = {name: Tensor(address, self._shape(name)) for name, address in self.addresses.items()}
        assert tensors.keys() == self.specs.keys()
        views = {name: self.library.program.array(name, tensor, self.profile) for name, tensor in tensors.items()}
        inputs = {name: view for name, view in views.items() if self.specs[name].is_input}
        outputs = {name: view for name, view in views.items() if not self.specs[name].is_input}

        def run() -> None:
            assert self.changes == changes, "the context of a captured graph was changed"
            cuda.host.view(self.scratch, SCRATCH_BYTES)[:] = 0xFF
            self.library.program.function(self.profile, inputs, outputs)

        cuda.host.enqueue(run)
        return True

    def _shape(self, name: str) -> tuple[int, ...]:
        """An output's follows from the inputs'."""
        if name in self.shapes:
            return self.shapes[name]
        rows, length = self.shapes["token_ids"]
        spec = self.specs[name]
        if len(spec.shape) == 4:
            return (rows, spec.shape[1], length, spec.shape[3])
        return (self.shapes["canvas_rows"][0], length, *spec.shape[2:])


class _RtxContext(_Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return self.library.capturable
