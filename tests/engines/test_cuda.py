"""The engine from its directory down to single CUDA and TensorRT calls, both emulated: arguments, errors, leftovers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dgemma_runtime.contract import Engine, Manifest
from dgemma_runtime.engines.bindings import Bindings
from dgemma_runtime.engines.device import Array
from dgemma_runtime.engines.emulated_cuda import EmulatedCuda, Status
from dgemma_runtime.engines.emulated_tensorrt import EmulatedTensorRt
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.engines.tensorrt import ENGINE_FILE
from dgemma_runtime.errors import ConfigurationError, DGemmaError, EngineError, EngineMemoryError, ManifestError
from dgemma_runtime.host_memory import AvailableMemory
from dgemma_runtime.memory_plan import MemoryPlan, plan_device_memory
from dgemma_runtime.settings import RuntimeSettings

if TYPE_CHECKING:
    from tests.engines.conftest import Harness

SETTINGS = RuntimeSettings(
    max_model_len=700, max_batch_size=3, prefill_chunk=24, prefill_budget=24, page_size=4, kv_memory_bytes=2**20, gpu=1
)


class Machine:
    """An engine directory, and the libraries and GPU that are there to run it."""

    def __init__(self, directory: Path, manifest: Manifest, harness: Callable[..., Harness]) -> None:
        self.directory, self.manifest = directory, manifest
        self.cuda = EmulatedCuda()
        bindings = Bindings(manifest.model, manifest.kv_dtype, "bf16", 64, 3008, 3, 24)
        self.library = EmulatedTensorRt(self.cuda, bindings, rtx=manifest.backend == "tensorrt_rtx")
        self._harness = harness

    def open(self, settings: RuntimeSettings = SETTINGS) -> Harness:
        engine: Any = open_engine(self.directory, settings)
        return self._harness(engine, self.cuda.host, self.library.program, self.library.bindings)

    def refuse(self, error: type[DGemmaError], *words: str, settings: RuntimeSettings = SETTINGS) -> None:
        """Opening fails with these words, and holds nothing."""
        with pytest.raises(error) as caught:
            open_engine(self.directory, settings)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert self.cuda.live == 0

    def close(self, engine: Engine) -> None:
        engine.close()
        assert self.cuda.live == 0
        assert self.cuda.complaints == []
        assert len(self.library.alive) == 0


@pytest.fixture
def kv_dtype() -> str:
    return "bf16"


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def machine(
    request: pytest.FixtureRequest,
    kv_dtype: str,
    tmp_path: Path,
    manifest: Manifest,
    write: Callable[..., Path],
    harness_of: Callable[..., Harness],
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    changed = replace(
        manifest,
        backend=request.param,
        kv_dtype=kv_dtype,
        backend_version="1.2.3",
        target="sm_89,sm_90",
        max_batch_size=3,
        max_encode_tokens=24,
    )
    made = Machine(write(tmp_path / "engine", changed), changed, harness_of)
    monkeypatch.setitem(sys.modules, request.param, made.library)
    monkeypatch.setattr("dgemma_runtime.engines.cuda.cuda_runtime", lambda: made.cuda)
    return made


def run(harness: Harness, context: int = 50) -> None:
    """Prompts, steps in changing company, next canvases."""
    sequences = {slot: harness.sequence() for slot in range(3)}
    for slot, sequence in sequences.items():
        for start in range(0, context + 20 * slot, 24):
            harness.encode([sequence], [min(24, context + 20 * slot - start)])
    for _ in range(3):
        harness.denoise(sequences)
    harness.denoise({2: sequences[2]})
    harness.end(sequences.pop(0))
    harness.denoise(sequences)
    harness.leave(sequences[2])
    harness.encode([sequences[2]], [5])
    for turn in range(4):
        harness.denoise(sequences)
        slot = 1 + turn % 2
        harness.denoise({3 - slot: sequences[3 - slot]}, {slot: sequences[slot]})
        harness.check_pages(sequences[slot])
    for sequence in sequences.values():
        harness.end(sequence)


# ---------------------------------------------------------------- a life


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
def test_a_whole_life_with_the_engine_on_a_thread_of_its_own(machine: Machine) -> None:
    harness = machine.open()
    errors: list[BaseException] = []

    def live() -> None:
        try:
            run(harness)
            run(harness, context=150)
            machine.close(harness.engine)
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            errors.append(error)

    thread = threading.Thread(target=live)
    thread.start()
    thread.join()
    assert errors == []
    assert machine.cuda.calls.count("cudaGraphLaunch") > 4
    assert machine.cuda.calls.count("cudaGraphInstantiate") == machine.cuda.calls.count("cudaGraphExecDestroy") > 1


def test_steps_are_not_captured_where_that_is_switched_off(machine: Machine) -> None:
    harness = machine.open(replace(SETTINGS, cuda_graphs=False))
    run(harness)
    machine.close(harness.engine)
    assert "cudaStreamBeginCapture" not in machine.cuda.calls


def test_one_step_is_one_launch(machine: Machine) -> None:
    harness = machine.open()
    sequence = harness.sequence()
    harness.encode([sequence], [10])
    for _ in range(2):
        harness.denoise({0: sequence})
    machine.cuda.calls.clear()
    harness.denoise({0: sequence})
    assert machine.cuda.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    machine.close(harness.engine)


@pytest.mark.parametrize("machine", ["tensorrt_rtx"], indirect=True)
def test_rtx_compiles_for_the_shapes_of_steps_and_shares_what_it_compiled(machine: Machine) -> None:
    harness = machine.open()
    run(harness)
    used = [config for config in machine.library.configs if config.strategy is not None]
    assert {config.cache for config in used} == {"a cache"}
    kinds = [config.dynamic_shapes_kernel_specialization_strategy for config in used]
    assert kinds[0] == "lazy"
    assert set(kinds[1:]) == {"eager"}
    machine.close(harness.engine)


@pytest.mark.parametrize("machine", ["tensorrt_rtx"], indirect=True)
def test_what_rtx_cannot_have_captured_runs_without(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.library.capturable = False
    harness = machine.open()
    sequence = harness.sequence()
    harness.encode([sequence], [10])
    for _ in range(5):
        harness.denoise({0: sequence})
    assert "cudaStreamBeginCapture" not in machine.cuda.calls
    assert sum("cannot have this step captured" in record.message for record in caplog.records) == 1
    machine.close(harness.engine)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "name",
    [
        "cudaMalloc",
        "cudaMallocHost",
        "cudaMemsetAsync",
        "cudaMemcpyAsync",
        "cudaMemcpy3DAsync",
        "cudaStreamSynchronize",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphLaunch",
    ],
)
def test_a_cuda_error_says_what_failed_and_leaves_nothing(machine: Machine, name: str) -> None:
    harness = machine.open()
    machine.cuda.failing[name] = Status.cudaErrorLaunchFailure
    with pytest.raises(EngineError, match=rf"{name}.*: text of 719 \(cudaErrorLaunchFailure\)"):
        run(harness)
    machine.cuda.failing.clear()
    if name != "cudaStreamEndCapture":
        assert not machine.cuda.capturing
        machine.close(harness.engine)


@pytest.mark.parametrize("name", ["cudaFree", "cudaFreeHost", "cudaGraphExecDestroy", "cudaStreamDestroy"])
def test_what_cannot_be_given_back_stops_nothing(machine: Machine, name: str, caplog: pytest.LogCaptureFixture) -> None:
    harness = machine.open()
    run(harness)
    machine.cuda.failing[name] = Status.cudaErrorLaunchFailure
    harness.engine.close()
    assert any(f"{name}: text of 719" in record.message for record in caplog.records)


def test_a_step_that_fails_while_it_is_captured_leaves_the_stream_usable(machine: Machine) -> None:
    harness = machine.open()
    sequence = harness.sequence()
    harness.encode([sequence], [10])
    harness.denoise({0: sequence})
    machine.library.refuses.add("execute_async_v3")
    with pytest.raises(EngineError, match="could not run: execute_async_v3 refused"):
        harness.denoise({0: sequence})
    assert machine.cuda.calls.count("cudaStreamBeginCapture") == 1
    assert not machine.cuda.capturing
    machine.close(harness.engine)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("create_execution_context", "cannot make an execution context: no context today"),
        ("set_optimization_profile_async", "does not take profile 0: set_optimization_profile_async refused"),
        ("set_input_shape", "of shape"),
        ("set_tensor_address", "does not take the address of"),
        ("infer_shapes", "lacks a shape for token_ids"),
    ],
)
def test_what_tensorrt_refuses_is_told_in_its_words(machine: Machine, method: str, words: str) -> None:
    harness = machine.open()
    sequence = harness.sequence()
    harness.encode([sequence], [10])
    machine.library.refuses.add(method)
    with pytest.raises(EngineError, match=words):
        harness.denoise({0: sequence})
    machine.close(harness.engine)


# ---------------------------------------------------------------- memory


def test_a_graph_for_which_there_is_no_memory_is_said_once_and_not_needed(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    harness = machine.open()
    sequences = {slot: harness.prefilled(10 + slot) for slot in range(2)}
    machine.cuda.failing["cudaGraphInstantiate"] = Status.cudaErrorMemoryAllocation
    for _ in range(4):
        harness.denoise(sequences)
    assert machine.cuda.calls.count("cudaGraphInstantiate") == machine.cuda.calls.count("cudaGraphDestroy") == 1
    assert sum("runs without being captured" in record.message for record in caplog.records) == 1
    machine.close(harness.engine)


def test_no_memory_for_a_context_changes_nothing(machine: Machine) -> None:
    """TensorRT says so in words only."""
    harness = machine.open()
    sequences, new = {slot: harness.prefilled(10 + slot) for slot in range(2)}, harness.prefilled(12)
    harness.denoise(sequences)
    machine.library.words = "[api.cpp::createContext::9] Error Code 2: OutOfMemory (Requested size was 1 bytes.)"
    machine.library.refuses.add("create_execution_context")
    for _ in range(2):
        with pytest.raises(EngineMemoryError, match=r"TensorRT's execution contexts need more bytes, .* are free"):
            harness.denoise({0: sequences[0], 2: new}, {1: sequences[1]})
    machine.library.refuses.clear()
    calls, function = [], machine.library.program.function

    def watched(profile: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        calls.append(len(inputs["position"]))
        function(profile, inputs, outputs)

    machine.library.program.function = watched
    harness.denoise({0: sequences[0]}, {1: sequences[1]})
    assert calls == [2], "the canvas that could not start has no row"
    harness.denoise(sequences)
    machine.close(harness.engine)


def test_no_page_locked_memory_changes_nothing(machine: Machine) -> None:
    harness = machine.open()
    sequences = {slot: harness.prefilled(length) for slot, length in enumerate((10, 11, 200))}
    shorter = {slot: sequences[slot] for slot in range(2)}
    harness.denoise(shorter)
    machine.cuda.failing["cudaMallocHost"] = Status.cudaErrorMemoryAllocation
    with pytest.raises(EngineMemoryError, match="results of cudaMallocHost need more bytes"):
        harness.denoise(sequences)
    harness.denoise(shorter)
    machine.cuda.failing.clear()
    harness.denoise(sequences)
    machine.close(harness.engine)


# ---------------------------------------------------------------- engines that are not for this machine


def test_another_version(machine: Machine) -> None:
    machine.library.__version__ = "1.3.0"
    backend = machine.manifest.backend
    machine.refuse(ManifestError, f"built with {backend} 1.2.3, installed is 1.3.0", "pip install", "==1.2.3")


def test_another_gpu(machine: Machine) -> None:
    machine.cuda = EmulatedCuda(sm=120)
    machine.refuse(ManifestError, "GPU 1 (An Emulated GPU) is sm_120, the engine was built for sm_89, sm_90")


def test_a_gpu_that_is_not_there(machine: Machine) -> None:
    settings = replace(SETTINGS, gpu=2)
    machine.refuse(ConfigurationError, "gpu is 2, CUDA shows 2 of them", settings=settings)


def test_no_driver(machine: Machine) -> None:
    machine.cuda = EmulatedCuda(driver=0)
    machine.refuse(ConfigurationError, "no NVIDIA driver is loaded", "onnxruntime")


def test_an_old_driver(machine: Machine) -> None:
    machine.cuda = EmulatedCuda(driver=12040)
    machine.refuse(ConfigurationError, "cudaGetDeviceCount: text of 35", "for CUDA 12.4, cuda-bindings for CUDA 13.5")


def test_no_library(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, machine.manifest.backend, None)
    package = {"tensorrt": "tensorrt==1.2.3", "tensorrt_rtx": "tensorrt-rtx==1.2.3"}[machine.manifest.backend]
    machine.refuse(ConfigurationError, f"pip install {package}")


def test_an_engine_that_tensorrt_does_not_take(machine: Machine, write: Callable[..., Path]) -> None:
    write(machine.directory, machine.manifest, b"another engine")
    machine.refuse(ManifestError, ENGINE_FILE, "the magic tag does not match", "build the engine again")


def test_an_empty_engine(machine: Machine, write: Callable[..., Path]) -> None:
    write(machine.directory, machine.manifest, b"")
    machine.refuse(ManifestError, ENGINE_FILE, "is empty")


def test_a_truncated_engine(machine: Machine) -> None:
    (machine.directory / ENGINE_FILE).write_bytes(b"an eng")
    machine.refuse(ManifestError, ENGINE_FILE, "SHA-256 is")


@pytest.fixture
def planned_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if others had taken the memory since it was planned."""

    def plan(weights: int, manifest: Manifest, settings: RuntimeSettings, _: AvailableMemory) -> MemoryPlan:
        return plan_device_memory(weights, manifest, settings, AvailableMemory(2**40, "then"))

    monkeypatch.setattr("dgemma_runtime.engines.factory.plan_device_memory", plan)


@pytest.mark.parametrize("size", [5000, 100_000, 600_000])
@pytest.mark.usefixtures("planned_earlier")
def test_too_little_memory(machine: Machine, size: int) -> None:
    machine.cuda = machine.library.cuda = EmulatedCuda(memory_bytes=size)
    machine.refuse(ConfigurationError, "the GPU has too little memory", "are free; lower kv_memory_bytes")


@pytest.mark.usefixtures("planned_earlier")
def test_weights_that_are_larger_than_the_memory(machine: Machine) -> None:
    machine.cuda = EmulatedCuda(memory_bytes=5)
    machine.refuse(ConfigurationError, "the weights need 9 bytes, 5 are free")


def test_a_memory_plan_that_does_not_fit(machine: Machine) -> None:
    machine.cuda = EmulatedCuda(memory_bytes=600_000)
    machine.refuse(ConfigurationError, "(700 tokens) does not fit: it needs", "free memory of GPU 1, An Emulated GPU")


def test_bindings_that_differ(machine: Machine) -> None:
    specs = dict(machine.library.program.tensors)
    specs["key_cache_0"] = replace(specs["key_cache_0"], dtype="fp8")
    machine.library.program.tensors = specs
    machine.refuse(
        ManifestError, "differ in key_cache_0: the engine has an input of type fp8", "needs an input of type"
    )
