"""The real cuda-bindings and TensorRT for RTX: that they have what is used of them, and what happens without a GPU.

In processes of their own that see no GPU, so that every machine answers alike.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorrt_rtx

from dgemma_runtime.contract import Manifest
from dgemma_runtime.engines import cuda, tensorrt_program
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.errors import ConfigurationError, ManifestError

NO_GPU = r"no NVIDIA driver is loaded on this machine|cudaGetDeviceCount: .*\(cudaError\w+\)"


def python(script: str, *arguments: str) -> str:
    """What a script prints."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_cuda_bindings_has_every_name_that_is_used() -> None:
    source = Path(cuda.__file__).read_text()
    names = set(re.findall(r'"(cuda[A-Z]\w+)"', source)) | set(re.findall(r"cuda\.((?:make_)?cuda\w+)", source))
    members = set(re.findall(r"\.(cudaError_t|cudaMemcpyKind|cudaStreamCaptureMode)\.(\w+)", source))
    assert len(names) > 20
    script = (
        "import sys, operator, cuda.bindings.runtime as r\n"
        "for name in sys.argv[1:]: operator.attrgetter(name)(r)\n"
        "for part in ('Major', 'Minor'): getattr(r.cudaDeviceAttr, f'cudaDevAttrComputeCapability{part}')\n"
        "print('all there')"
    )
    assert python(script, *names, *(".".join(member) for member in members)) == "all there\n"


def test_cuda_bindings_takes_the_arguments_of_every_call() -> None:
    """Without a GPU each ends in CUDA's own error, and not in one about types."""
    script = """
import threading
import numpy as np
import cuda.bindings.runtime as runtime
from dgemma_runtime.engines.cuda import CudaDevice
from dgemma_runtime.engines.device import Pitched
from dgemma_runtime.errors import EngineError

device = CudaDevice.__new__(CudaDevice)
device._cuda, device.index, device._thread = runtime, 0, threading.get_ident()
device._stream, device._memory, device._host, device._graphs = runtime.cudaStream_t(0), set(), set(), set()
host, pitched = np.zeros(8, np.uint8), Pitched(4096, 64, 8)
for call in (
    lambda: device.host_bytes(64),
    lambda: device.upload(4096, host),
    lambda: device.download(host, 4096),
    lambda: device.zero(4096, 8),
    lambda: device.copy(pitched, pitched, (64, 2, 3)),
    lambda: device.capture(lambda: None),
    lambda: device._call("cudaMalloc", 64),
    lambda: device._call("cudaFree", 4096),
    lambda: device._call("cudaFreeHost", 4096),
    lambda: device._call("cudaSetDevice", 0),
    lambda: device._call("cudaGraphInstantiate", runtime.cudaGraph_t(0), 0),
    lambda: device._call("cudaGraphLaunch", runtime.cudaGraphExec_t(0), device._stream),
    lambda: device.synchronize(),
):
    try:
        call()
    except EngineError as error:
        print(error)
"""
    lines = python(script).splitlines()
    assert len(lines) == 13
    assert all(re.fullmatch(r"cuda\w+: .+ \(cudaError\w+\)(; a step could not be .*)?", line) for line in lines), lines


def test_tensorrt_has_every_name_that_is_used() -> None:
    source = Path(tensorrt_program.__file__).read_text()
    engine = set(re.findall(r"engine\.(\w+)", source)) - {"engine"}
    context = set(re.findall(r"(?:created|_context)\.(\w+)", source))
    assert len(engine) > 8
    assert len(context) > 6
    missing = [name for name in engine if not hasattr(tensorrt_rtx.ICudaEngine, name)]
    missing += [name for name in context if not hasattr(tensorrt_rtx.IExecutionContext, name)]
    missing += [
        name for name in set(re.findall(r"config\.(\w+)", source)) if not hasattr(tensorrt_rtx.IRuntimeConfig, name)
    ]
    missing += [name for name in set(re.findall(r"library\.([A-Z]\w+)", source)) if not hasattr(tensorrt_rtx, name)]
    assert missing == []
    assert {"FLOAT", "HALF", "BF16", "FP8", "INT32", "INT64", "BOOL"} <= tensorrt_rtx.DataType.__members__.keys()


def test_tensorrt_takes_the_log_and_a_mapped_file(tmp_path: Path) -> None:
    """What is no engine ends in TensorRT's own words."""
    (tmp_path / "rank0.engine").write_bytes(bytes(4096))
    script = """
import sys
from pathlib import Path
import tensorrt_rtx
from dgemma_runtime.engines.host_device import HostDevice
from dgemma_runtime.engines.tensorrt_program import TensorRtProgram
from dgemma_runtime.errors import ManifestError
try:
    TensorRtProgram(tensorrt_rtx, HostDevice(), Path(sys.argv[1]))
except ManifestError as error:
    print(error)
"""
    message = python(script, str(tmp_path / "rank0.engine"))
    assert re.search(r"rank0.engine: tensorrt_rtx cannot load it: .*(Error|rror Code).*; build the engine", message)


OPEN = """
import sys
from pathlib import Path
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.settings import RuntimeSettings
try:
    open_engine(Path(sys.argv[1]), RuntimeSettings(max_batch_size=1))
except ConfigurationError as error:
    print(error)
"""


@pytest.fixture
def directory(tmp_path: Path, manifest: Manifest, write: Callable[..., Path]) -> Path:
    version = str(tensorrt_rtx.__version__)
    return write(tmp_path / "engine", replace(manifest, backend="tensorrt_rtx", backend_version=version))


def test_an_engine_for_a_gpu_says_that_there_is_none(directory: Path) -> None:
    assert re.search(NO_GPU, python(OPEN, str(directory)))


def test_the_server_says_it_too(directory: Path) -> None:
    """With a real Triton; the tokenizer is real, so that nothing else is in the way."""
    checkpoint = Path(__file__).resolve().parents[2] / "build/checkpoints/demo"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((checkpoint / name).read_bytes())
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "dgemma_runtime.server", "run", "--engine", str(directory), *ports]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.search(NO_GPU, result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_an_engine_of_tensorrt_llm_needs_that_library_and_its_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Path("engine")
    manifest = replace(scripted_manifest(1000), backend="tensorrt_llm", backend_version="1.2.1+tensorrt.10.14.1")
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(
        ConfigurationError, match=r"needs .* tensorrt_llm 1\.2\.1\+.*environment with tensorrt-llm 1\.2\.1$"
    ):
        tensorrt_program.tensorrt_library(directory, manifest)

    plugins, library = SimpleNamespace(__version__="1.2.1"), SimpleNamespace(__version__="10.14.1")
    monkeypatch.setitem(sys.modules, "tensorrt_llm", plugins)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    assert tensorrt_program.tensorrt_library(directory, manifest) is library

    library.__version__ = "10.15.0"
    with pytest.raises(
        ManifestError, match=r"built with tensorrt_llm 1\.2\.1\+tensorrt\.10\.14\.1, installed is .*10\.15\.0"
    ):
        tensorrt_program.tensorrt_library(directory, manifest)
