"""What a GPU engine needs of a device and of a compiled program, as protocols. Knows no CUDA, no model and no cache.

`cuda.py` implements them on a GPU, `host_device.py` in ordinary memory. All work goes to one stream, in order: a call
returns when the work is queued, `synchronize` when it is done. Addresses are plain integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dgemma_runtime.errors import EngineError

Array = npt.NDArray[Any]
Shapes = tuple[tuple[int, ...], ...]  # by profile
HostBytes = npt.NDArray[np.uint8]

# How a type is stored in an array; numpy has no bf16 and no fp8 (E4M3), so these are their bits.
STORAGE: Mapping[str, np.dtype[Any]] = {
    "bool": np.dtype(np.bool_),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "fp32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "fp16": np.dtype(np.float16),
    "fp8": np.dtype(np.uint8),
}
ALIGNMENT = 256  # bytes; TensorRT asks it of every tensor's address


class OutOfMemory(EngineError):
    """The device has too little memory for one allocation, or its driver has; of how much it may not tell."""

    def __init__(self, needed_bytes: int | None, purpose: str, free_bytes: int) -> None:
        need = "more" if needed_bytes is None else needed_bytes
        super().__init__(
            f"the GPU has too little memory: {purpose} need {need} bytes, {free_bytes} are free; "
            "lower kv_memory_bytes, max_model_len or max_batch_size"
        )


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program; a dynamic dimension is -1."""

    is_input: bool
    dtype: str  # a key of STORAGE
    shape: tuple[int, ...]
    least: Shapes = ()  # of an input
    largest: Shapes = ()


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in device memory, contiguous, and its shape in this call."""

    address: int  # a multiple of ALIGNMENT and never 0, also where the shape has no elements
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pitched:
    """Planes of rows of bytes in device memory: a row every `pitch` bytes, a plane every `pitch * rows` bytes."""

    address: int  # of the first byte to copy
    pitch: int  # bytes
    rows: int


class Graph(Protocol):
    """Captured work, to be queued again as a whole."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


class Device(Protocol):
    """Memory and one stream. Raises EngineError when the device fails, OutOfMemory when it is full."""

    def allocate(self, nbytes: int, purpose: str) -> int:
        """Zeroed memory at a multiple of ALIGNMENT; OutOfMemory names the `purpose` (a plural)."""
        ...

    def available_bytes(self) -> int:
        """What may still be allocated."""
        ...

    def free(self, address: int) -> None:
        """Waits for queued work, then gives `allocate`d memory back."""
        ...

    def host_bytes(self, nbytes: int) -> HostBytes:
        """Page-locked host memory [nbytes], for `upload` and `download`."""
        ...

    def free_host_bytes(self, array: HostBytes) -> None: ...

    def upload(self, address: int, source: HostBytes) -> None:
        """Queue a copy to the device; `source` may change only after `synchronize`."""
        ...

    def download(self, target: HostBytes, address: int) -> None:
        """Queue a copy to the host; `target` holds it after `synchronize`."""
        ...

    def zero(self, address: int, nbytes: int) -> None: ...

    def copy(self, target: Pitched, source: Pitched, extent: tuple[int, int, int]) -> None:
        """Queue a copy within the device of `extent`: bytes of a row, rows of a plane, planes."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` queues, without running it. It must have run before outside of a capture, and may not allocate,
        free or wait."""
        ...

    def synchronize(self) -> None: ...

    def close(self) -> None:
        """Give everything back that is still held."""
        ...


class Context(Protocol):
    """A program at one profile. A graph that captured `enqueue` is good until the next `bind` or `close`."""

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Addresses and shapes of every input and output for the calls that follow."""
        ...

    def enqueue(self) -> None:
        """Queue one run."""
        ...

    def can_be_captured(self) -> bool:
        """Whether `enqueue` may be captured, as bound and once it has run."""
        ...

    def close(self) -> None: ...


class Program(Protocol):
    """A compiled engine with its weights. Its contexts share scratch memory, so they run one after another."""

    tensors: Mapping[str, TensorSpec]

    def context(self, profile: int) -> Context: ...

    def close(self) -> None: ...
