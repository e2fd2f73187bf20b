"""The card: how time is taken on it, what else is known of it. Knows no kernel and no model.

A measured call is captured in a CUDA graph, so that the host's time to start kernels does not count, and replayed
between two events. Before every replay a buffer of several times the L2 cache is read, not written: lines that a write
leaves behind would be brought back to memory on the time of what is measured.
"""

from __future__ import annotations

import gc
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

LEAST_FLUSH = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Timing:
    """Of one call on the device."""

    median_ms: float
    least_ms: float
    repetitions: int


class Machine(Protocol):
    """What tests replace, as they have no card."""

    device: torch.device

    def time(self, run: Callable[[], object], repetitions: int) -> Timing:
        """`run` must do the same each time and read nothing back."""
        ...

    def fp8_product(self, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: torch.dtype) -> Tensor:
        """[M, N] in `out` of E4M3 x [M, K] and weight [N, K]; scales float32, [M, 1] and [1, N], or one number each."""
        ...

    def release(self) -> None:
        """Give back what nothing refers to any more."""
        ...

    def wait(self) -> None:
        """Until everything that was started is done; errors of the device are raised here."""
        ...

    def facts(self) -> dict[str, Any]:
        """Device, driver and versions."""
        ...


class CudaMachine:
    """The first CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        self._properties = torch.cuda.get_device_properties(self.device)
        cache = int(getattr(self._properties, "L2_cache_size", 0))
        self._flush = torch.zeros(max(4 * cache, LEAST_FLUSH) // 4, dtype=torch.float32, device=self.device)

    def time(self, run: Callable[[], object], repetitions: int) -> Timing:
        graph = self._capture(run)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repetitions + 4)]  # type: ignore[no-untyped-call]
        pairs = list(zip(events[::2], events[1::2], strict=True))  # the first two do not count
        for start, end in pairs:
            self._flush.sum()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in pairs[2:]]
        graph.reset()
        return Timing(statistics.median(times), min(times), repetitions)

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Warmed on a stream of its own, as capturing asks for."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def fp8_product(self, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: torch.dtype) -> Tensor:
        return scaled_product(x, x_scale, weight, weight_scale, out)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def facts(self) -> dict[str, Any]:
        return {
            "device": self._properties.name,
            "sm": f"{self._properties.major}{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: torch.dtype) -> Tensor:
    """PyTorch's fp8 product: the left operand by rows, the right one by columns, dimensions multiples of 16."""
    product: Tensor = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=out, use_fast_accum=True
    )
    return product


def driver_version() -> str:
    """Of NVIDIA's kernel module."""
    loaded = Path("/proc/driver/nvidia/version")
    if loaded.exists() and (found := re.search(r"\d{3,}\.\d+(\.\d+)?", loaded.read_text())):
        return found[0]
    if not shutil.which("nvidia-smi"):
        return "unknown: neither /proc/driver/nvidia/version nor nvidia-smi is there"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    return lines[0] if run.returncode == 0 and lines else f"unknown: {run.stderr.strip()}"


def what_is_missing() -> str:
    """Why there is no CudaMachine here, or nothing."""
    if not torch.cuda.is_available():
        kind = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return f"torch {torch.__version__} {kind}; run this on a machine with an NVIDIA GPU and torch's CUDA build"
    capability = torch.cuda.get_device_capability(0)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(0)
        return f"{name} has SM {capability[0]}.{capability[1]}; fp8 needs 8.9 or later"
    return ""
