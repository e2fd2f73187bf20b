"""What a user can get wrong, building and opening engines: one line that says what to do, and nothing half-made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_runtime.contract import EngineLimits, Manifest
from dgemma_runtime.engines.cuda import cuda_runtime
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.engines.tensorrt import check_manifest
from dgemma_runtime.errors import ConfigurationError, ManifestError
from dgemma_runtime.settings import RuntimeSettings

EXPERTS = "model.decoder.layers.0.experts.down_proj"
Change = Callable[[dict[str, Any]], object]


def refused(checkpoint: Path, output: Path, *options: str) -> str:
    """The one line that the command answers with."""
    command = [sys.executable, "-m", "dgemma_build.cli", "engine", "--checkpoint", str(checkpoint)]
    result = subprocess.run([*command, "--output", str(output), *options], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not (output / "config.json").exists()
    for left in output.parent.glob("*.partial"):
        with pytest.raises(ManifestError, match=r"config\.json: not found"):
            Manifest.load(left)
    return line


def change_json(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_weight(directory: Path, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {EXPERTS: change(tensors[EXPERTS].copy())}, directory / "model.safetensors")


def test_a_missing_shard(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "odd_a", shard_bytes=150_000)
    shard = sorted(checkpoint.glob("model-*"))[1]
    shard.unlink()
    line = refused(checkpoint, tmp_path / "engine")
    assert line.endswith(f"{shard}: weight file not found; the checkpoint is incomplete, fetch the checkpoint again")


def test_a_wrong_dtype(checkpoint_copy: Path, tmp_path: Path) -> None:
    change_weight(checkpoint_copy, lambda values: values.astype(ml_dtypes.float8_e4m3fn))
    line = refused(checkpoint_copy, tmp_path / "engine")
    assert f"{EXPERTS} has dtype F8_E4M3, expected one of F32, BF16, F16; take the checkpoint as it was" in line


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "int8"), ("tensorrt_rtx", "int4")])
def test_weights_that_are_no_numbers(
    checkpoint_copy: Path, tmp_path: Path, bad: float, backend: str, precision: str
) -> None:
    def spoil(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values[3, -1, -1] = bad
        return values

    change_weight(checkpoint_copy, spoil)
    line = refused(checkpoint_copy, tmp_path / "engine", "--backend", backend, "--precision", precision)
    assert line.endswith(f"model.safetensors: {EXPERTS}[3] holds NaN or infinite values; fetch the checkpoint again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(architectures=["Gemma4ForCausalLM"]), "architectures is ['Gemma4ForCausalLM'], expected"),
        (lambda c: c.update(model_type="gemma4"), "model_type is 'gemma4', expected 'diffusion_gemma'; engines are"),
        (lambda c: c.update(canvas_length=-3), "canvas_length is -3, expected a whole number above 0"),
    ],
)
def test_an_unknown_architecture(checkpoint_copy: Path, tmp_path: Path, change: Change, words: str) -> None:
    change_json(checkpoint_copy / "config.json", change)
    assert f"config.json: {words}" in refused(checkpoint_copy, tmp_path / "engine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-model-len", "5000"), "--max-model-len 5000: must be more than one canvas (12 tokens) and at most the"),
        (("--backend", "openvino"), "--backend openvino: not available; choose one of onnxruntime, tensorrt"),
        (("--backend", "tensorrt"), "--backend tensorrt: No module named 'tensorrt'; install tensorrt from NVIDIA's"),
        (("--precision", "bf16"), "--precision bf16: onnxruntime is built in fp32, int8, int4"),
        (("--kv-precision", "fp8"), "--kv-precision fp8: onnxruntime"),
    ],
)
def test_what_is_not_there(odd_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert words in refused(odd_checkpoint, tmp_path / "engine", *options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(odd_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "Not a directory" in refused(odd_checkpoint, tmp_path / "file" / "engine")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_behind_the_weights(
    odd_checkpoint: Path, odd_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    request = BuildRequest(odd_checkpoint, tmp_path / "engine")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(ConfigurationError, match="the disk is full; make room and build again"):
            build_engine(request)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.partial"]
    with pytest.raises(ManifestError, match=r"config\.json: not found"):
        Manifest.load(tmp_path / "engine.partial")
    assert build_engine(request) == Manifest.load(odd_engine)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "bf16"}, "the manifest's precision is 'bf16', this engine runs fp32, int8, int4; build"),
        ({"kv_dtype": "fp8"}, "the manifest's kv_dtype is 'fp8', this engine runs fp32; build"),
        ({"target": "sm_90"}, "the manifest's target is 'sm_90', this engine runs cpu; build"),
        ({"backend_version": "99.0"}, f"built with onnxruntime 99.0, installed is {ort.__version__}, older; run `pip"),
        ({"backend": "openvino"}, "asks for the backend 'openvino', this runtime has onnxruntime, tensorrt"),
        ({"format_version": 2}, "format_version is 2, this runtime reads"),
        ({"max_model_len": "long"}, "not a manifest (max_model_len is 'long', expected int); build"),
        ({"max_batch_size": True}, "not a manifest (max_batch_size is True, expected int); build"),
        ({"files": ["model.onnx"]}, "not a manifest (files is ['model.onnx'], expected dict[str, str]); build"),
        ({"files": {"model.onnx": 5}}, "not a manifest (files is {'model.onnx': 5}, expected dict[str, str]); build"),
        ({"model": {"layers": [{"kind": 5}]}}, "not a manifest (kind is 5, expected str); build"),
    ],
)
def test_an_engine_that_this_runtime_does_not_run(
    odd_engine: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    copy = Path(shutil.copytree(odd_engine, tmp_path / "engine"))
    change_json(copy / "config.json", lambda manifest: manifest.update(changes))
    with pytest.raises(ManifestError) as caught:
        open_engine(copy, RuntimeSettings(max_batch_size=1))
    assert words in str(caught.value)
    assert str(caught.value).endswith("build the engine again with `dgemma-build engine`")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "int3"}, "precision is 'int3', this engine runs fp32, bf16, fp16, fp8, int4; build the engine"),
        ({"precision": "int8"}, "precision is 'int8', this engine runs fp32, bf16, fp16, fp8, int4; build the engine"),
        ({"kv_dtype": "int8"}, "kv_dtype is 'int8', this engine runs fp32, bf16, fp16, fp8; build the engine again"),
        ({"files": {}}, "the manifest lists no rank0.engine; build the engine again"),
    ],
)
def test_an_engine_that_tensorrt_does_not_run(odd_engine: Path, changes: dict[str, Any], words: str) -> None:
    manifest = replace(Manifest.load(odd_engine), backend="tensorrt", precision="bf16", kv_dtype="bf16")
    with pytest.raises(ManifestError) as caught:
        check_manifest(odd_engine, replace(manifest, **changes))
    assert words in str(caught.value)


def test_cuda_bindings_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(ConfigurationError, match=r"need the package cuda-bindings .*install the extra `tensorrt`"):
        cuda_runtime()


def test_engines_of_older_libraries_run(odd_engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(odd_engine, tmp_path / "engine"))
    change_json(copy / "config.json", lambda manifest: manifest.update(backend_version="1.2.3"))
    OnnxRuntimeEngine(copy, EngineLimits(1, 64, 16, 4, 4), threads=1).close()


def test_a_truncated_graph(odd_engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(odd_engine, tmp_path / "engine"))
    os.truncate(copy / "model.onnx.data", 1000)
    with pytest.raises(ManifestError, match=r"model\.onnx\.data: SHA-256 is .*; build the engine again"):
        open_engine(copy, RuntimeSettings(max_batch_size=1))
