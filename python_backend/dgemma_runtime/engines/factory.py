"""Opens the engine that an engine directory's manifest asks for. Knows each engine by the name of its backend only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from dgemma_runtime.contract import Engine, EngineLimits, Manifest
from dgemma_runtime.drafter_manifest import DrafterManifest, check_drafter
from dgemma_runtime.errors import ManifestError
from dgemma_runtime.host_memory import AvailableMemory
from dgemma_runtime.memory_plan import MemoryPlan, plan_device_memory, plan_host_memory
from dgemma_runtime.settings import RuntimeSettings

Opener = Callable[[Path, Manifest, RuntimeSettings], Engine]

_log = logging.getLogger(__name__)


def open_engine(directory: Path, settings: RuntimeSettings) -> Engine:
    """Plan its memory, log the plan, open it.

    Raises ManifestError for a directory that cannot be used, ConfigurationError for settings that do not fit the engine
    or the memory there is.
    """
    manifest = Manifest.load(directory, verify_hashes=False)  # the engine verifies them when it loads its files
    if manifest.backend not in _OPENERS:
        raise ManifestError(
            f"{directory}: the manifest asks for the backend {manifest.backend!r}, this runtime has "
            f"{', '.join(_OPENERS)}; build the engine again with `dgemma-build engine`"
        )
    return _OPENERS[manifest.backend](directory, manifest, settings)


def _planned(plan: MemoryPlan) -> EngineLimits:
    for line in plan.lines():
        _log.info("%s", line)
    return plan.limits


def _open_onnxruntime(directory: Path, manifest: Manifest, settings: RuntimeSettings) -> Engine:
    from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine  # heavy, and not installed for other backends

    limits = _planned(plan_host_memory(directory, manifest, settings))
    draft_model = None if settings.draft_model is None else Path(settings.draft_model)
    return OnnxRuntimeEngine(directory, limits, settings.threads, draft_model)


def _open_tensorrt(directory: Path, manifest: Manifest, settings: RuntimeSettings) -> Engine:
    from dgemma_runtime.engines.cuda import CudaDevice  # needs cuda-bindings, which serving on a CPU does not install
    from dgemma_runtime.engines.tensorrt import ENGINE_FILE, TensorRtEngine, check_manifest
    from dgemma_runtime.engines.tensorrt_program import check_target, program_loader, tensorrt_library

    check_manifest(directory, manifest)
    described: list[tuple[Path, Manifest | DrafterManifest]] = [(directory, manifest)]
    draft_model = None if settings.draft_model is None else Path(settings.draft_model)
    if draft_model is not None:
        drafter = DrafterManifest.load(draft_model, verify_hashes=False)
        check_drafter(draft_model, drafter, manifest)
        described.append((draft_model, drafter))
    library, *_ = [tensorrt_library(*one) for one in described]
    device = CudaDevice(settings.gpu)
    try:
        for one in described:
            check_target(*one, device)
        weights = (directory / ENGINE_FILE).stat().st_size
        free = AvailableMemory(device.available_bytes(), f"free memory of GPU {device.index}, {device.name}")
        limits = _planned(plan_device_memory(weights, manifest, settings, free))
    except BaseException:
        device.close()
        raise
    load = program_loader(library, device)
    return TensorRtEngine(directory, limits, device, load, settings.cuda_graphs, draft_model)


def _open_scripted(directory: Path, manifest: Manifest, settings: RuntimeSettings) -> Engine:
    from dgemma_runtime.engines.scripted_directory import open_scripted

    return open_scripted(directory, _planned(plan_host_memory(directory, manifest, settings)))


_OPENERS: Mapping[str, Opener] = {
    "onnxruntime": _open_onnxruntime,
    "tensorrt": _open_tensorrt,
    "tensorrt_rtx": _open_tensorrt,
    "tensorrt_llm": _open_tensorrt,
    "scripted": _open_scripted,
}
