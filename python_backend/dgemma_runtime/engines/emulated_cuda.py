"""CUDA's runtime API as cuda-bindings shows it, in ordinary memory, for tests. Knows no engine and no TensorRT.

It is as strict as a GPU is silent: what a call is given must be alive, within bounds and of the thread's own GPU, or
the call fails.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from dgemma_runtime.engines.device import Pitched
from dgemma_runtime.engines.host_device import HostDevice, HostGraph
from dgemma_runtime.errors import EngineError


class Status(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815 - CUDA's names
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorInvalidDevice = 101  # noqa: N815
    cudaErrorInvalidResourceHandle = 400  # noqa: N815
    cudaErrorLaunchFailure = 719  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class CudaFailed(Exception):
    """Within a call, which then returns this status."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


class Handle:
    """Of a stream, a graph or an executable graph."""

    def __init__(self, number: int, held: Any = None) -> None:
        self.number, self.held = number, held

    def __int__(self) -> int:
        return self.number


def _call(results: int) -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, ...]]]:
    """Makes a method one of CUDA's functions: status first, then `results` values, None where it fails."""

    def decorate(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def call(self: EmulatedCuda, *arguments: Any) -> tuple[Any, ...]:
            name = function.__name__
            self.calls.append(name)
            if name in self.failing:
                return (self.failing[name], *[None] * results)
            try:
                value = function(self, *arguments)
            except CudaFailed as failure:
                return (failure.status, *[None] * results)
            except (AssertionError, KeyError, EngineError) as error:
                self.complaints.append(f"{name}: {error!r}")
                return (Status.cudaErrorInvalidValue, *[None] * results)
            if results == 0:
                return (Status.cudaSuccess,)
            return (Status.cudaSuccess, *(value if results > 1 else (value,)))

        return call

    return decorate


class EmulatedCuda:
    """Stands for the module `cuda.bindings.runtime`. `gpus` of compute capability `sm`, the memory that of one."""

    def __init__(self, sm: int = 90, gpus: int = 2, memory_bytes: int = 2**40, driver: int = 13050) -> None:
        self.host = HostDevice(memory_bytes)
        self.calls: list[str] = []
        self.complaints: list[str] = []  # about arguments
        self.failing: dict[str, Status] = {}  # functions that fail
        self._sm, self._gpus, self._driver = sm, gpus, driver
        self._current = threading.local()
        self._host_arrays: dict[int, np.ndarray[Any, Any]] = {}
        self._handles: dict[int, Handle] = {}
        self._capturing: list[Any] | None = None
        self._next = 1000
        self.cudaError_t, self.cudaStreamNonBlocking = Status, 1
        self.cudaMemcpyKind = SimpleNamespace(
            cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="within"
        )
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        self.cudaDeviceAttr = SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
        )
        self.cudaMemcpy3DParms = SimpleNamespace

    @property
    def live(self) -> int:
        """Whatever was not given back."""
        return self.host.live + len(self._handles)

    @property
    def capturing(self) -> bool:
        return self._capturing is not None

    # ------------------------------------------------------------ the machine

    def cudaGetErrorName(self, status: Status) -> tuple[Any, ...]:  # noqa: N802 - CUDA's names, here and below
        return (Status.cudaSuccess, status.name.encode())

    def cudaGetErrorString(self, status: Status) -> tuple[Any, ...]:  # noqa: N802
        return (Status.cudaSuccess, f"text of {int(status)}".encode())

    @_call(0)
    def cudaGetLastError(self) -> None:  # noqa: N802
        return None

    @_call(1)
    def cudaDriverGetVersion(self) -> int:  # noqa: N802
        return self._driver

    @_call(1)
    def cudaRuntimeGetVersion(self) -> int:  # noqa: N802
        return 13050

    @_call(1)
    def cudaGetDeviceCount(self) -> int:  # noqa: N802
        if self._driver < 13000:
            raise CudaFailed(Status.cudaErrorInsufficientDriver)
        return self._gpus

    @_call(0)
    def cudaSetDevice(self, index: int) -> None:  # noqa: N802
        assert 0 <= index < self._gpus
        self._current.index = index

    @_call(1)
    def cudaDeviceGetAttribute(self, attribute: str, index: int) -> int:  # noqa: N802
        return self._sm // 10 if attribute == "major" else self._sm % 10

    @_call(1)
    def cudaGetDeviceProperties(self, index: int) -> Any:  # noqa: N802
        return SimpleNamespace(name=b"An Emulated GPU")

    def _used(self) -> None:
        """The last GPU is the one in use; CUDA takes a thread that did not choose one to the first."""
        if getattr(self._current, "index", 0) != self._gpus - 1:
            raise CudaFailed(Status.cudaErrorInvalidDevice)

    # ------------------------------------------------------------ memory

    @_call(1)
    def cudaMalloc(self, nbytes: int) -> int:  # noqa: N802
        self._used()
        assert not self.capturing
        if nbytes > self.host.available_bytes():
            raise CudaFailed(Status.cudaErrorMemoryAllocation)
        address = self.host.allocate(nbytes, "a test")
        self.host.view(address, nbytes)[:] = 0xFF  # no numbers, in any type
        return address

    @_call(0)
    def cudaFree(self, address: int) -> None:  # noqa: N802
        self._used()
        assert not self.capturing
        self.host.free(address)

    @_call(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        self._used()
        return self.host.available_bytes(), self.host.memory_bytes

    @_call(1)
    def cudaMallocHost(self, nbytes: int) -> int:  # noqa: N802
        self._used()
        array = self.host.host_bytes(nbytes)
        self._host_arrays[array.ctypes.data] = array
        return int(array.ctypes.data)

    @_call(0)
    def cudaFreeHost(self, address: int) -> None:  # noqa: N802
        self.host.free_host_bytes(self._host_arrays.pop(address))

    # ------------------------------------------------------------ work

    def stream(self, stream: Any) -> None:
        """Must be alive, and of the thread's GPU."""
        self._used()
        self.handle(stream)

    def handle(self, handle: Any) -> Handle:
        if int(handle) not in self._handles:
            raise CudaFailed(Status.cudaErrorInvalidResourceHandle)
        return self._handles[int(handle)]

    def _make(self, held: Any = None) -> Handle:
        self._next += 1
        self._handles[self._next] = Handle(self._next, held)
        return self._handles[self._next]

    @_call(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:  # noqa: N802
        self._used()
        assert flags == self.cudaStreamNonBlocking
        return self._make()

    @_call(0)
    def cudaStreamDestroy(self, stream: Any) -> None:  # noqa: N802
        self.stream(stream)
        del self._handles[int(stream)]

    @_call(0)
    def cudaStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        self.stream(stream)
        if self.capturing:
            raise CudaFailed(Status.cudaErrorStreamCaptureUnsupported)
        self.host.synchronize()

    @_call(0)
    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: Any) -> None:  # noqa: N802
        self.stream(stream)
        assert value == 0
        self.host.zero(address, nbytes)

    @_call(0)
    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: str, stream: Any) -> None:  # noqa: N802
        self.stream(stream)
        array = self._host_arrays[source if kind == "up" else target][:nbytes]
        assert len(array) == nbytes
        if kind == "up":
            self.host.upload(target, array)
        else:
            assert kind == "down"
            self.host.download(array, source)

    def make_cudaPitchedPtr(self, address: int, pitch: int, xsize: int, ysize: int) -> Any:  # noqa: N802
        assert xsize <= pitch < 2**31
        return Pitched(address, pitch, ysize)

    def make_cudaExtent(self, width: int, height: int, depth: int) -> Any:  # noqa: N802
        return (width, height, depth)

    @_call(0)
    def cudaMemcpy3DAsync(self, parameters: Any, stream: Any) -> None:  # noqa: N802
        self.stream(stream)
        assert parameters.kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.host.copy(parameters.dstPtr, parameters.srcPtr, parameters.extent)

    # ------------------------------------------------------------ graphs

    @_call(0)
    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> None:  # noqa: N802
        self.stream(stream)
        assert not self.capturing
        self._capturing = self.host.begin_capture()

    @_call(1)
    def cudaStreamEndCapture(self, stream: Any) -> Handle:  # noqa: N802
        self.stream(stream)
        assert self.capturing
        recorded, self._capturing = self._capturing, None
        self.host.end_capture()
        return self._make(recorded)

    @_call(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Handle:  # noqa: N802
        return self._make(HostGraph(self.host, self.handle(graph).held))

    @_call(0)
    def cudaGraphLaunch(self, executable: Any, stream: Any) -> None:  # noqa: N802
        self.stream(stream)
        self.handle(executable).held.launch()

    @_call(0)
    def cudaGraphDestroy(self, graph: Any) -> None:  # noqa: N802
        self._used()
        del self._handles[self.handle(graph).number]

    @_call(0)
    def cudaGraphExecDestroy(self, executable: Any) -> None:  # noqa: N802
        self._used()
        self.handle(executable).held.close()
        del self._handles[int(executable)]
