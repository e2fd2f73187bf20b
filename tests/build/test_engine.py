"""Building engine directories: what the manifest says, that it is checked, and that failures leave nothing behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.cli import app
from dgemma_build.data_file import allocate, size_of, write_weights
from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.engine_probe import OnnxRuntimeProbe
from dgemma_build.graph import Lowering, author_graph
from dgemma_build.head import group_size
from dgemma_runtime.contract import (
    DenoiseRow,
    EngineLimits,
    Float32Array,
    Int32Array,
    Manifest,
    SequencePages,
)
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import CheckpointError, ConfigurationError, DGemmaError, ManifestError


def test_the_manifest_tells_what_was_built(odd_checkpoint: Path, odd_engine: Path) -> None:
    manifest = Manifest.load(odd_engine)
    checkpoint = Checkpoint(odd_checkpoint)
    assert manifest.model == checkpoint.config.spec
    assert (manifest.backend, manifest.precision, manifest.target) == ("onnxruntime", "fp32", "cpu")
    assert manifest.backend_version == ort.__version__
    assert manifest.max_model_len == checkpoint.config.spec.max_position_embeddings
    assert manifest.checkpoint_sha256 == checkpoint.sha256()
    assert set(manifest.files) == {path.name for path in odd_engine.iterdir()} - {"config.json"}
    assert manifest.files["model.onnx"] == manifest.onnx_sha256


def test_building_twice_gives_the_same_bytes(odd_checkpoint: Path, odd_engine: Path, tmp_path: Path) -> None:
    again = build_engine(BuildRequest(odd_checkpoint, tmp_path / "engine"))
    assert again == Manifest.load(odd_engine)


def test_a_changed_file_is_refused(odd_engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(odd_engine, tmp_path / "engine"))
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(ManifestError, match=r"model\.onnx\.data: SHA-256 is .*build the engine again"):
        Manifest.load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ManifestError, match=r"tokenizer\.json: listed in the manifest but missing"):
        Manifest.load(copy, verify_hashes=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "not found"),
        ("{", "not readable as JSON"),
        ("[]", "format_version is 'list'"),
        ('{"format_version": 99}', "format_version is 99, this runtime reads 3"),
        ('{"format_version": 3}', "not a manifest"),
    ],
)
def test_what_is_not_a_manifest_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ManifestError, match=words):
        Manifest.load(tmp_path)


def test_a_manifest_cannot_reach_outside(odd_engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(odd_engine, tmp_path / "engine"))
    raw = json.loads((copy / "config.json").read_text())
    raw["files"]["../secret"] = "0" * 64
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match="outside of the engine directory"):
        Manifest.load(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "openvino"}, r"--backend openvino: not available; choose one of onnxruntime"),
        ({"precision": "int2"}, r"--precision int2: onnxruntime is built in fp32, int8, int4"),
        ({"max_model_len": 10**7}, r"--max-model-len 10000000: must be .* at most the checkpoint's"),
        ({"max_model_len": 1}, r"--max-model-len 1: must be more than one canvas"),
        ({"max_batch_size": 0}, r"--max-batch-size 0: must be at least 1"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(
    odd_checkpoint: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    request = replace(BuildRequest(odd_checkpoint, tmp_path / "engine"), **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=words):
        build_engine(request)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_keeps_the_old_engine(checkpoint_copy: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    manifest = build_engine(BuildRequest(checkpoint_copy, output))
    (checkpoint_copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        build_engine(BuildRequest(checkpoint_copy, output))
    assert Manifest.load(output) == manifest


def test_a_foreign_directory_is_not_overwritten(odd_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="exists and is not an engine directory"):
        build_engine(BuildRequest(odd_checkpoint, tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_reports_errors_in_one_line(odd_checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["engine", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "engine")])
    assert isinstance(result.exception, DGemmaError)
    assert "config.json: not found" in str(result.exception)


def test_the_grouped_and_the_dense_experts_agree(odd_checkpoint: Path, odd_engine: Path, tmp_path: Path) -> None:
    """The dense lowering, which TensorRT gets, computes what the grouped one does; both under the same engine."""
    dense = Path(shutil.copytree(odd_engine, tmp_path / "dense"))
    checkpoint = Checkpoint(odd_checkpoint)
    graph = author_graph(checkpoint.config, checkpoint, Lowering(moe="dense"))
    data = dense / "model.onnx.data"
    data.unlink()
    allocate(data, size_of(graph.placed()))
    graph.save(dense / "model.onnx", data.name, "test", {})
    write_weights(data, graph.placed(), lambda nbytes: None)
    manifest = Manifest.load(dense, verify_hashes=False)
    replace(manifest, files={}).save(dense)
    rng = np.random.default_rng(0)
    spec = manifest.model
    prompt = rng.integers(0, spec.vocab_size, 2 * spec.sliding_window).astype(np.int32)
    canvas = rng.integers(0, spec.vocab_size, spec.canvas_length).astype(np.int32)
    uniforms = rng.random(spec.canvas_length, dtype=np.float32)
    steps = []
    for directory in (odd_engine, dense):
        probe = OnnxRuntimeProbe(directory, max_tokens=256)
        probe.start()
        probe.encode(prompt)
        steps.append(probe.denoise(canvas, None, uniforms, 0.7))
    assert np.array_equal(steps[0].argmax_ids, steps[1].argmax_ids)
    assert np.array_equal(steps[0].sampled_ids, steps[1].sampled_ids)
    np.testing.assert_allclose(steps[0].entropies, steps[1].entropies, atol=1e-4)
    np.testing.assert_allclose(steps[0].next_soft, steps[1].next_soft, atol=1e-3)


def test_the_weights_are_in_the_graph_once(odd_engine: Path) -> None:
    """Encode and denoise share one graph, so no initializer of any size has a twin."""
    model = onnx.load(odd_engine / "model.onnx")
    large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 1000]
    contents = [onnx.numpy_helper.to_array(tensor).tobytes() for tensor in large]
    assert len(set(contents)) == len(contents) > 10


def test_samples_follow_the_distribution(odd_engine: Path) -> None:
    """At a high temperature every id is about as likely; the sample is monotone in its uniform number."""
    spec = Manifest.load(odd_engine).model
    engine = OnnxRuntimeEngine(odd_engine, EngineLimits(1, 64, 16, 4, 4), threads=1)
    pages = SequencePages(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32))
    canvas = np.zeros(spec.canvas_length, np.int32)

    def sample(uniforms: Float32Array, temperature: float) -> Int32Array:
        row = DenoiseRow(0, canvas, uniforms, temperature, 0, pages, first_step=True)
        ids: Int32Array = engine.denoise([row]).sampled_ids[0]
        return ids

    levels = np.linspace(0, 1, 21, endpoint=False, dtype=np.float32)
    ids = np.stack([sample(np.full(spec.canvas_length, level, np.float32), 1e6) for level in levels])
    expected = np.floor(levels[:, None] * spec.vocab_size)
    assert np.abs(ids - expected).max() <= 1
    assert (np.diff(ids, axis=0) > 0).all()
    top = sample(np.full(spec.canvas_length, np.nextafter(np.float32(1), np.float32(0)), np.float32), 1e6)
    assert (top == spec.vocab_size - 1).all()


@pytest.mark.parametrize(("vocab", "size"), [(262_144, 512), (32_768, 256), (761, 32), (2, 1)])
def test_group_size(vocab: int, size: int) -> None:
    assert group_size(vocab) == size
