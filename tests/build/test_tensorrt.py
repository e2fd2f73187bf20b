"""The graphs in TensorRT's precisions are parsed and built by TensorRT for RTX, on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tensorrt_rtx

from dgemma_build import tensorrt
from dgemma_build.checkpoint import Checkpoint
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.graph import author_graph
from dgemma_build.tensorrt import BINDINGS, binding_shapes, longest_chunk, profiles, recipe
from dgemma_runtime.contract import Manifest
from dgemma_runtime.errors import ConfigurationError, ManifestError

DEMO = Path(__file__).parents[2] / "build" / "checkpoints" / "demo"


@pytest.mark.parametrize(("precision", "kv"), [("bf16", "bf16"), ("fp8", "fp8"), ("int4", "bf16"), ("fp32", "fp32")])
def test_the_demo_checkpoint_builds_with_its_whole_context(tmp_path: Path, precision: str, kv: str) -> None:
    request = BuildRequest(DEMO, tmp_path / "engine", "tensorrt_rtx", precision, kv, max_batch_size=1)
    build_engine(request)
    manifest = Manifest.load(tmp_path / "engine")
    assert (manifest.backend, manifest.precision, manifest.kv_dtype) == ("tensorrt_rtx", precision, kv)
    assert (manifest.max_model_len, manifest.max_batch_size, manifest.max_encode_tokens) == (262_144, 1, 256)
    assert 0 < manifest.scratch_bytes < 1e9
    assert manifest.target == "sm_89,sm_120"
    assert manifest.backend_version.startswith("1.")
    assert (tmp_path / "engine" / "rank0.engine").stat().st_size > 1_000_000
    assert not [name for name in manifest.files if name.startswith("model.onnx")]


def test_a_graph_that_the_library_refuses_is_its_own_error(odd_checkpoint: Path, tmp_path: Path) -> None:
    """Odd head sizes: no engine directory is left, and the library's words are shown."""
    with pytest.raises(ConfigurationError, match=r"tensorrt_rtx 1\.\S+ (cannot build|does not take) the graph: \S"):
        build_engine(BuildRequest(odd_checkpoint, tmp_path / "engine", "tensorrt_rtx", "bf16"))
    assert not (tmp_path / "engine").exists()
    assert not (tmp_path / "engine.partial" / "config.json").exists()


def test_a_disk_that_fills_up_under_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes no notice of what its writer meets, and says that it has built the engine."""
    request = BuildRequest(DEMO, tmp_path / "engine", "tensorrt_rtx", "int4", max_model_len=1024, max_batch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr("dgemma_build.tensorrt.ENGINE_FILE", "/dev/full")
        with pytest.raises(ConfigurationError, match="the disk is full; make room and build again"):
            build_engine(request)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.partial"]
    with pytest.raises(ManifestError, match=r"config\.json: not found"):
        Manifest.load(tmp_path / "engine.partial")
    assert build_engine(request) == Manifest.load(tmp_path / "engine")


@pytest.mark.parametrize(
    ("backend", "precision", "kv", "words"),
    [
        ("tensorrt_rtx", "int8", "", "--precision int8: tensorrt_rtx is built in bf16, fp8, int4, fp32"),
        ("tensorrt_rtx", "fp32", "bf16", "--kv-precision bf16: tensorrt_rtx in fp32 is built with fp32"),
        ("tensorrt_rtx", "bf16", "int8", "--kv-precision int8: tensorrt_rtx in bf16 is built with bf16 or fp8"),
        ("onnxruntime", "fp32", "fp8", "--kv-precision fp8: onnxruntime in fp32 is built with fp32"),
        ("tensorrt", "bf16", "", "--backend tensorrt: No module named 'tensorrt'; install tensorrt from NVIDIA's own"),
        ("coreml", "bf16", "", "--backend coreml: not available; choose one of onnxruntime, tensorrt, tensorrt_rtx"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    odd_checkpoint: Path, tmp_path: Path, backend: str, precision: str, kv: str, words: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_engine(BuildRequest(odd_checkpoint, tmp_path / "engine", backend, precision, kv))
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_profiles_cover_both_kinds_of_call() -> None:
    denoise, encode = profiles(canvas_length=64, max_batch_size=8, max_model_len=1000)
    assert longest_chunk(64) == 256
    assert longest_chunk(300) == 300
    assert binding_shapes("token_ids", (-1, -1), denoise) == ((1, 64), (1, 64), (8, 64))
    assert binding_shapes("soft_embedding", (-1, -1, 128), denoise)[2] == (8, 64, 128)
    assert binding_shapes("token_ids", (-1, -1), encode)[2] == (1, 256)
    assert binding_shapes("uniforms", (-1, -1), encode)[2] == (0, 256)
    assert binding_shapes("key_cache_3", (-1, 2, 1000, 64), denoise)[2] == (8, 2, 1000, 64)
    assert binding_shapes("key_cache_3", (-1, 2, -1, 64, 32), encode) == (
        (1, 2, 1, 64, 32),
        (1, 2, 16, 64, 32),
        (1, 2, 16, 64, 32),
    )
    assert set(BINDINGS) >= {"token_ids", "is_canvas", "temperature"}
    with pytest.raises(ValueError, match="no profile covers"):
        binding_shapes("temperature", (-1, -1), denoise)


def test_the_engine_directory_is_described_like_others(tmp_path: Path) -> None:
    build_engine(BuildRequest(DEMO, tmp_path / "engine", "tensorrt_rtx", "bf16", max_model_len=4096, max_batch_size=2))
    raw = json.loads((tmp_path / "engine/config.json").read_text())
    assert (raw["max_model_len"], raw["max_batch_size"]) == (4096, 2)
    assert {"rank0.engine", "tokenizer.json", "generation_config.json"} <= raw["files"].keys()


def test_tensorrt_is_driven_like_tensorrt_for_rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the other's name: what is not common to both must not be asked of `tensorrt`."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr(tensorrt, "_present_gpu", lambda: "sm_90")
    request = BuildRequest(DEMO, tmp_path / "engine", "tensorrt", "fp8", max_model_len=4096, max_batch_size=1)
    manifest = build_engine(request)
    assert (manifest.backend, manifest.target, manifest.precision) == ("tensorrt", "sm_90", "fp8")
    assert manifest.backend_version == tensorrt_rtx.__version__


def test_without_a_gpu_tensorrt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    with pytest.raises(
        ConfigurationError, match=r"builds for the GPU that it runs on, and CUDA finds none \(.+\); build"
    ):
        build_engine(BuildRequest(DEMO, tmp_path / "engine", "tensorrt", "bf16"))


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
def test_with_plugins_experts_and_head_are_kernels(precision: str) -> None:
    config = Checkpoint(DEMO).config
    plain, plugins = (
        author_graph(config, Checkpoint(DEMO), recipe(precision, "bf16", plugins=on)) for on in (False, True)
    )
    kinds = [node.op_type for node in plugins.nodes if node.domain == "dgemma"]
    assert [kinds.count(kind) for kind in ("head_tiles", "experts_gate_up", "experts_down")] == [1, 6, 6]
    assert not [node for node in plain.nodes if node.domain == "dgemma"]


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt_rtx"])
def test_plugins_are_for_tensorrt(tmp_path: Path, backend: str) -> None:
    precision = "fp32" if backend == "onnxruntime" else "bf16"
    request = BuildRequest(DEMO, tmp_path / "engine", backend, precision, plugins=True)
    with pytest.raises(ConfigurationError, match=f"--plugins: {backend} takes none; choose --backend tensorrt"):
        build_engine(request)


def test_plugins_are_compiled_for_one_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr(tensorrt, "_present_gpu", lambda: "sm_120")
    request = BuildRequest(DEMO, tmp_path / "engine", "tensorrt", "bf16", plugins=True, max_model_len=4096)
    with pytest.raises(ConfigurationError, match="--plugins: the kernels are compiled for sm_90, this GPU is sm_120"):
        build_engine(request)
