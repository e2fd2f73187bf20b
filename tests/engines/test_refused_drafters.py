"""Drafters that are none for a TensorRT engine are refused when it opens, over emulated CUDA and TensorRT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dgemma_runtime.contract import Manifest, file_sha256
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.bindings import ENGINE_FILE, Bindings
from dgemma_runtime.engines.emulated_cuda import EmulatedCuda
from dgemma_runtime.engines.emulated_tensorrt import ENGINE_BYTES, EmulatedTensorRt
from dgemma_runtime.engines.factory import open_engine
from dgemma_runtime.errors import ConfigurationError, DGemmaError, ManifestError
from dgemma_runtime.settings import RuntimeSettings

SETTINGS = RuntimeSettings(
    max_model_len=700, max_batch_size=3, prefill_chunk=24, prefill_budget=24, page_size=4, kv_memory_bytes=2**20, gpu=1
)


def write_drafter(directory: Path, denoiser: Manifest, changed: dict[str, Any]) -> Path:
    """With a denoiser's engine in the place of a drafter's."""
    spec = denoiser.model
    directory.mkdir()
    (directory / ENGINE_FILE).write_bytes(ENGINE_BYTES)
    manifest = DrafterManifest(
        denoiser="a denoiser",
        denoiser_sha256=denoiser.checkpoint_sha256,
        drafter="a drafter",
        drafter_sha256="0" * 64,
        vocab_size=spec.vocab_size,
        canvas_length=spec.canvas_length,
        reads=(1, 2),
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        denoiser_hidden_size=spec.hidden_size,
        backend=denoiser.backend,
        backend_version=denoiser.backend_version,
        target="sm_90",
        precision="bf16",
        onnx_sha256="0" * 64,
        files={ENGINE_FILE: file_sha256(directory / ENGINE_FILE)},
        kv_dtype=denoiser.kv_dtype,
    )
    replace(manifest, **changed).save(directory)
    return directory


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({}, ManifestError, ("drafter/rank0.engine: the engine and this runtime differ in", "build the drafter again")),
        ({"backend_version": "1.3.0"}, ManifestError, ("drafter: the engine was built with", "1.3.0, installed is")),
        ({"target": "sm_120"}, ManifestError, ("drafter: GPU 1", "is sm_90, the engine was built for sm_120")),
        ({"backend": "onnxruntime"}, ConfigurationError, ("the drafter was built for onnxruntime, the engine for",)),
        ({"kv_dtype": "fp8"}, ConfigurationError, ("kv_dtype fp8, the engine's are bf16", "--kv-precision bf16")),
        ({"scratch_bytes": 2**60}, ConfigurationError, ("does not fit: it needs", "drafter")),
        ({"files": {}}, ManifestError, ("files does not list rank0.engine; build it again",)),
        ({"denoiser_sha256": "1" * 64}, ConfigurationError, ("the drafter belongs to 'a denoiser'",)),
    ],
)
def test_a_drafter_that_is_none_for_this_engine(
    backend: str,
    changed: dict[str, Any],
    error: type[DGemmaError],
    words: tuple[str, ...],
    manifest: Manifest,
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is held."""
    described = replace(manifest, backend=backend, backend_version="1.2.3", target="sm_90", max_batch_size=3)
    described = replace(described, max_encode_tokens=24)
    cuda = EmulatedCuda()
    bindings = Bindings(described.model, described.kv_dtype, "bf16", 64, 3008, 3, 24)
    monkeypatch.setitem(sys.modules, backend, EmulatedTensorRt(cuda, bindings, rtx=backend == "tensorrt_rtx"))
    monkeypatch.setattr("dgemma_runtime.engines.cuda.cuda_runtime", lambda: cuda)
    engine = write(tmp_path / "engine", described)
    drafter = write_drafter(tmp_path / "drafter", described, changed)
    with pytest.raises(error) as caught:
        open_engine(engine, replace(SETTINGS, draft_model=str(drafter)))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert cuda.live == 0
