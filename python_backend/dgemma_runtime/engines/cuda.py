"""A GPU as a device: memory, one stream, copies and graphs over CUDA's runtime API. Knows no TensorRT and no model.

The only file that imports cuda-bindings. Its functions return a status first; whatever is not success is raised with
the function's name and CUDA's own text.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from dgemma_runtime.engines.device import HostBytes, OutOfMemory, Pitched
from dgemma_runtime.errors import ConfigurationError, EngineError

_log = logging.getLogger(__name__)


def cuda_runtime() -> Any:
    """The module `cuda.bindings.runtime`; raises ConfigurationError where it is not installed."""
    try:
        import cuda.bindings.runtime
    except ImportError as error:
        raise ConfigurationError(
            f"engines for GPUs need the package cuda-bindings ({error}); install the extra `tensorrt`, "
            "as in pip install 'dgemma-triton[tensorrt]'"
        ) from None
    return cuda.bindings.runtime


class CudaDevice:
    """See `dgemma_runtime.engines.device.Device`. `index` is the GPU's number among those that CUDA shows.

    Raises ConfigurationError where there is no such GPU or no driver.
    """

    def __init__(self, index: int, cuda: Any = None) -> None:
        self._cuda = cuda or cuda_runtime()
        self.index = index
        self._thread = 0  # that the GPU is the current one of
        self._memory: set[int] = set()  # live allocations
        self._host: set[int] = set()
        self._graphs: set[CudaGraph] = set()
        self.stream = 0
        self._check_driver()
        attribute = self._cuda.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", getattr(attribute, f"cudaDevAttrComputeCapability{part}"), index)
            for part in ("Major", "Minor")
        )
        self.sm = 10 * int(major) + int(minor)  # 90: compute capability 9.0
        self.name: str = self._call("cudaGetDeviceProperties", index).name.decode()
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def _check_driver(self) -> None:
        driver, runtime = (int(self._plain(f"cuda{part}GetVersion")) for part in ("Driver", "Runtime"))
        if driver == 0:
            raise ConfigurationError(
                "the engine needs a GPU, and no NVIDIA driver is loaded on this machine; install one for CUDA "
                f"{runtime // 1000}, give the container access to the GPU, or use an engine built for onnxruntime"
            )
        status, count = self._cuda.cudaGetDeviceCount()
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise ConfigurationError(
                f"cudaGetDeviceCount: {self._text(status)}; the driver is for CUDA {_version(driver)}, cuda-bindings "
                f"for CUDA {_version(runtime)}: update the driver, or install a cuda-bindings of the driver's version"
            )
        if not 0 <= self.index < count:
            raise ConfigurationError(f"gpu is {self.index}, CUDA shows {count} of them, counted from 0; choose another")

    # ------------------------------------------------------------ calls

    def _call(self, name: str, *arguments: Any) -> Any:
        """Of the result after the status; raises EngineError."""
        if self._thread != threading.get_ident():  # the current GPU is a thread's
            self._plain("cudaSetDevice", self.index)
            self._thread = threading.get_ident()
        return self._plain(name, *arguments)

    def _plain(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # or the next call would return it again
            raise OutOfMemory(None, f"results of {name}", self.available_bytes())
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"{name}: {self._text(status)}")
        return results[0] if results else None

    def _give_back(self, name: str, *arguments: Any) -> None:
        """A failure is only logged: what went wrong was raised where it did, and the rest is to be given back, too."""
        try:
            self._call(name, *arguments)
        except EngineError as error:
            _log.warning("%s", error)

    def _text(self, status: Any) -> str:
        words = [getattr(self._cuda, f"cudaGetError{part}")(status)[1] for part in ("Name", "String")]
        name, text = (word.decode() if isinstance(word, bytes) else str(word) for word in words)
        return f"{text} ({name})"

    # ------------------------------------------------------------ memory

    def allocate(self, nbytes: int, purpose: str) -> int:
        self._call("cudaSetDevice", self.index)
        status, address = self._cuda.cudaMalloc(nbytes)
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # or the next call would return it again
            raise OutOfMemory(nbytes, purpose, self.available_bytes())
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"cudaMalloc of {nbytes} bytes for {purpose}: {self._text(status)}")
        self._memory.add(int(address))
        self.zero(int(address), nbytes)
        return int(address)

    def available_bytes(self) -> int:
        self._call("cudaSetDevice", self.index)
        status, free, _total = self._cuda.cudaMemGetInfo()
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"cudaMemGetInfo: {self._text(status)}")
        return int(free)

    def free(self, address: int) -> None:
        self._memory.remove(address)
        self._give_back("cudaStreamSynchronize", self._stream)
        self._give_back("cudaFree", address)

    def host_bytes(self, nbytes: int) -> HostBytes:
        address = int(self._call("cudaMallocHost", nbytes))
        self._host.add(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        array[:] = 0
        return array

    def free_host_bytes(self, array: HostBytes) -> None:
        address = array.ctypes.data
        self._host.remove(address)
        self._give_back("cudaStreamSynchronize", self._stream)
        self._give_back("cudaFreeHost", address)

    # ------------------------------------------------------------ work

    def upload(self, address: int, source: HostBytes) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: HostBytes, address: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._stream)

    def zero(self, address: int, nbytes: int) -> None:
        self._call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def copy(self, target: Pitched, source: Pitched, extent: tuple[int, int, int]) -> None:
        cuda = self._cuda
        parameters = cuda.cudaMemcpy3DParms()
        parameters.srcPtr = cuda.make_cudaPitchedPtr(source.address, source.pitch, extent[0], source.rows)
        parameters.dstPtr = cuda.make_cudaPitchedPtr(target.address, target.pitch, extent[0], target.rows)
        parameters.extent = cuda.make_cudaExtent(*extent)
        parameters.kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy3DAsync", parameters, self._stream)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        try:
            graph = self._call("cudaStreamEndCapture", self._stream)
            try:
                executable = self._call("cudaGraphInstantiate", graph, 0)
            finally:
                self._give_back("cudaGraphDestroy", graph)
        except OutOfMemory:
            raise
        except EngineError as error:
            raise EngineError(f"{error}; a step could not be captured: set cuda_graphs to false") from None
        captured = CudaGraph(self, executable)
        self._graphs.add(captured)
        return captured

    def _abandon_capture(self) -> None:
        """So that the stream can be used again."""
        _status, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if graph is not None and int(graph):
            self._give_back("cudaGraphDestroy", graph)

    def launch(self, executable: Any) -> None:
        """For CudaGraph."""
        self._call("cudaGraphLaunch", executable, self._stream)

    def drop(self, graph: CudaGraph, executable: Any) -> None:
        """For CudaGraph."""
        self._graphs.remove(graph)
        self._give_back("cudaStreamSynchronize", self._stream)
        self._give_back("cudaGraphExecDestroy", executable)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        for graph in list(self._graphs):
            graph.close()
        for address in list(self._memory):
            self.free(address)
        for address in list(self._host):
            self._host.remove(address)
            self._give_back("cudaFreeHost", address)
        self._give_back("cudaStreamDestroy", self._stream)


class CudaGraph:
    """An executable graph."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device, self._executable = device, executable

    def launch(self) -> None:
        self._device.launch(self._executable)

    def close(self) -> None:
        self._device.drop(self, self._executable)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
