"""A device and programs in ordinary memory, so that GPU engines run and are tested without a GPU. Knows no model.

Work is queued and runs at `synchronize`, as late as a GPU might: whoever reads a result too early or overwrites what
is still to be uploaded gets wrong numbers here too. Every access must lie within one live allocation.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from dgemma_runtime.engines.device import (
    ALIGNMENT,
    STORAGE,
    Array,
    HostBytes,
    OutOfMemory,
    Pitched,
    Tensor,
    TensorSpec,
)

Work = Callable[[], None]
Function = Callable[[int, Mapping[str, Array], Mapping[str, Array]], None]
"""(profile, inputs, outputs): reads the inputs and writes the outputs in place."""


class HostGraph:
    """Recorded work."""

    def __init__(self, device: HostDevice, work: list[Work]) -> None:
        self._device, self._work = device, work
        self.launches = 0
        self.closed = False

    def launch(self) -> None:
        assert not self.closed
        self.launches += 1
        for work in self._work:
            self._device.enqueue(work)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class HostDevice:
    """See `dgemma_runtime.engines.device.Device`. `memory_bytes` is what may be allocated at once."""

    def __init__(self, memory_bytes: int = 2**40) -> None:
        self.allocated_bytes = 0
        self.copies = 0  # calls of `copy` outside of replays
        self.graphs: list[HostGraph] = []
        self.memory_bytes = memory_bytes
        self._starts: list[int] = []  # addresses of live allocations, ascending
        self._blocks: dict[int, HostBytes] = {}
        self._host: dict[int, HostBytes] = {}
        self._queue: list[Work] = []
        self._recording: list[Work] | None = None

    @property
    def live(self) -> int:
        """Allocations, page-locked arrays and graphs that were not given back."""
        return len(self._blocks) + len(self._host) + sum(not graph.closed for graph in self.graphs)

    # ------------------------------------------------------------ memory

    def allocate(self, nbytes: int, purpose: str) -> int:
        assert self._recording is None
        assert nbytes > 0
        if self.allocated_bytes + nbytes > self.memory_bytes:
            raise OutOfMemory(nbytes, purpose, self.available_bytes())
        memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
        skip = -memory.ctypes.data % ALIGNMENT
        address = memory.ctypes.data + skip
        self._blocks[address] = memory[skip : skip + nbytes]
        bisect.insort(self._starts, address)
        self.allocated_bytes += nbytes
        return address

    def available_bytes(self) -> int:
        return self.memory_bytes - self.allocated_bytes

    def free(self, address: int) -> None:
        self.synchronize()
        self.allocated_bytes -= self._blocks.pop(address).nbytes
        self._starts.remove(address)

    def host_bytes(self, nbytes: int) -> HostBytes:
        array = np.zeros(nbytes, np.uint8)
        self._host[array.ctypes.data] = array
        return array

    def free_host_bytes(self, array: HostBytes) -> None:
        self.synchronize()
        del self._host[array.ctypes.data]

    def view(self, address: int, nbytes: int) -> HostBytes:
        """The bytes at an address, which must lie within one live allocation."""
        index = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else 0
        block = self._blocks.get(start)
        if block is None or address - start + nbytes > block.nbytes:
            raise AssertionError(f"{nbytes} bytes at {address:#x} are not within a live allocation")
        return block[address - start : address - start + nbytes]

    # ------------------------------------------------------------ work

    def enqueue(self, work: Work) -> None:
        """Queue anything; programs use it for their runs."""
        (self._queue if self._recording is None else self._recording).append(work)

    def upload(self, address: int, source: HostBytes) -> None:
        target = self.view(address, source.nbytes)
        self.enqueue(lambda: np.copyto(target, source))

    def download(self, target: HostBytes, address: int) -> None:
        source = self.view(address, target.nbytes)
        self.enqueue(lambda: np.copyto(target, source))

    def zero(self, address: int, nbytes: int) -> None:
        target = self.view(address, nbytes)
        self.enqueue(lambda: target.fill(0))

    def copy(self, target: Pitched, source: Pitched, extent: tuple[int, int, int]) -> None:
        self.copies += 1
        to, of = self._planes(target, extent), self._planes(source, extent)
        assert not np.shares_memory(to, of)
        self.enqueue(lambda: np.copyto(to, of))

    def _planes(self, memory: Pitched, extent: tuple[int, int, int]) -> HostBytes:
        width, height, depth = extent
        assert width > 0
        assert width <= memory.pitch
        assert 0 < height <= memory.rows
        plane = memory.pitch * memory.rows
        flat = self.view(memory.address, (depth - 1) * plane + (height - 1) * memory.pitch + width)
        return np.lib.stride_tricks.as_strided(flat, (depth, height, width), (plane, memory.pitch, 1))

    def capture(self, work: Work) -> HostGraph:
        recorded = self.begin_capture()
        try:
            work()
        finally:
            self.end_capture()
        self.graphs.append(HostGraph(self, recorded))
        return self.graphs[-1]

    def begin_capture(self) -> list[Work]:
        """Where work goes until `end_capture`, instead of being run."""
        assert self._recording is None
        self._recording = []
        return self._recording

    def end_capture(self) -> None:
        self._recording = None

    def synchronize(self) -> None:
        assert self._recording is None
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def close(self) -> None:
        self.synchronize()
        self._blocks.clear()
        self._starts.clear()
        self._host.clear()
        self.allocated_bytes = 0


class _HostContext:
    def __init__(self, program: HostProgram, profile: int) -> None:
        self._program, self._profile = program, profile
        self._views: dict[str, Array] = {}

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        assert tensors.keys() == self._program.tensors.keys(), tensors.keys() ^ self._program.tensors.keys()
        self._views = {name: self._program.array(name, tensor, self._profile) for name, tensor in tensors.items()}

    def enqueue(self) -> None:
        assert self._views
        specs = self._program.tensors
        inputs = {name: array for name, array in self._views.items() if specs[name].is_input}
        outputs = {name: array for name, array in self._views.items() if not specs[name].is_input}
        self._program.device.enqueue(partial(self._program.function, self._profile, inputs, outputs))

    def can_be_captured(self) -> bool:
        return True

    def close(self) -> None:
        self._views = {}
        self._program.contexts -= 1


class HostProgram:
    """A function as a program; its arrays are views of device memory, of bf16 and fp8 the bits: `device.STORAGE`."""

    def __init__(self, device: HostDevice, tensors: Mapping[str, TensorSpec], function: Function) -> None:
        self.device, self.tensors, self.function = device, tensors, function
        self.contexts = 0  # live ones
        self.closed = False

    def context(self, profile: int) -> _HostContext:
        assert not self.closed
        self.contexts += 1
        return _HostContext(self, profile)

    def close(self) -> None:
        self.closed = True

    def array(self, name: str, tensor: Tensor, profile: int) -> Array:
        """A view of a tensor, whose shape and address must be ones that the program takes."""
        spec = self.tensors[name]
        assert tensor.address % ALIGNMENT == 0
        assert tensor.address
        assert len(tensor.shape) == len(spec.shape)
        pairs = zip(tensor.shape, spec.shape, strict=True)
        assert all(size == fixed or fixed < 0 for size, fixed in pairs), f"{name}: {tensor.shape}, {spec.shape}"
        if spec.is_input:
            for least, size, most in zip(spec.least[profile], tensor.shape, spec.largest[profile], strict=True):
                assert least <= size <= most, f"{name}: {tensor.shape}"
        storage = STORAGE[spec.dtype]
        nbytes = int(np.prod(tensor.shape)) * storage.itemsize
        return self.device.view(tensor.address, nbytes).view(storage).reshape(tensor.shape)
