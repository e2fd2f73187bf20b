"""What this machine has: GPUs by the driver's own command, memory, engine libraries. Knows no profile."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import dataclass

from dgemma_runtime.host_memory import available_memory

_QUERY = ("--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30
_LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx")
MIB = 1 << 20


@dataclass(frozen=True)
class InstalledGpu:
    """One GPU, as its driver describes it."""

    index: int
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """What profiles are compared with."""

    gpus: tuple[InstalledGpu, ...]
    memory_bytes: int  # that a process may still take, the limit of a container counted
    libraries: frozenset[str]
    driver: str = ""  # why no GPU was looked at


def this_machine() -> Machine:
    """Never fails: where the driver does not answer there are no GPUs, and `driver` says why."""
    gpus, driver = _gpus()
    found = frozenset(name for name in _LIBRARIES if importlib.util.find_spec(name) is not None)
    return Machine(gpus, available_memory().nbytes, found, driver)


def _gpus() -> tuple[tuple[InstalledGpu, ...], str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return (), "there is no nvidia-smi: no GPU is passed to this container"
    try:
        answer = subprocess.run([command, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi does not answer ({error})"
    if answer.returncode:
        words = (answer.stderr or answer.stdout).split()
        return (), f"nvidia-smi ended with status {answer.returncode}: {' '.join(words)[:200]}"
    return tuple(gpu for line in answer.stdout.splitlines() if (gpu := parse_gpu(line)) is not None), ""


def parse_gpu(line: str) -> InstalledGpu | None:
    """A line like `0, NVIDIA H100 80GB HBM3, 81559`; None where it is none (shared memory has no size)."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 3 or not parts[0].isdecimal() or not parts[2].isdecimal():
        return None
    return InstalledGpu(int(parts[0]), parts[1], int(parts[2]) * MIB)
