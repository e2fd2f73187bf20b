"""The same graph in 16 bits is parsed and built by TensorRT for RTX, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.tensorrt_rtx import BINDINGS, ENCODE_TOKENS, binding_shapes, profiles
from dgemma_runtime.contract import Manifest

DEMO = Path(__file__).parents[2] / "build" / "checkpoints" / "demo"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_demo_checkpoint_builds_with_its_whole_context(tmp_path: Path, precision: str) -> None:
    request = BuildRequest(DEMO, tmp_path / "engine", "tensorrt_rtx", precision, max_batch_size=1)
    build_engine(request)
    manifest = Manifest.load(tmp_path / "engine")
    assert (manifest.backend, manifest.precision, manifest.max_model_len) == ("tensorrt_rtx", precision, 262_144)
    assert manifest.target == "sm_89,sm_120"
    assert manifest.backend_version.startswith("1.")
    assert (tmp_path / "engine" / "rank0.engine").stat().st_size > 1_000_000
    assert "model.onnx" not in manifest.files


def test_profiles_cover_both_kinds_of_call() -> None:
    denoise, encode = profiles(canvas_length=64, max_batch_size=8)
    assert binding_shapes("token_ids", (-1, -1), denoise) == ((1, 64), (1, 64), (8, 64))
    assert binding_shapes("soft_embedding", (-1, -1, 128), denoise)[2] == (8, 64, 128)
    assert binding_shapes("token_ids", (-1, -1), encode)[2] == (1, ENCODE_TOKENS)
    assert binding_shapes("uniforms", (-1, -1), encode)[2] == (0, ENCODE_TOKENS)
    assert binding_shapes("key_cache_3", (-1, 2, 1000, 64), denoise)[2] == (8, 2, 1000, 64)
    assert set(BINDINGS) >= {"token_ids", "is_canvas", "temperature"}
    with pytest.raises(ValueError, match="no profile covers"):
        binding_shapes("key_cache_3", (-1, 2, -1, 64), denoise)
