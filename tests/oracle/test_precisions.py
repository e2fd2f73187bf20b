"""Engines with integer weights compute just what the integers stand for, on odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.engine import BuildRequest, build_engine
from dgemma_build.engine_probe import OnnxRuntimeProbe
from dgemma_build.gate import ProbeStep
from dgemma_build.onnx_writer import GraphWriter
from dgemma_build.products import GroupedIntegers, Matrix
from dgemma_build.quantize import dequantize, quantize
from dgemma_runtime.contract import Float32Array

Named = Callable[[str], Path]


def rounded_matmul(
    self: GroupedIntegers, w: GraphWriter, value: str, name: str, matrix: Matrix, bound: float | None
) -> str:
    """In float32, the weights rounded to what their integers stand for."""

    def load() -> list[Float32Array]:
        return [dequantize(quantize(np.concatenate(list(matrix.rows())).T, self.form), self.form, matrix.inputs)]

    return w.op("MatMul", value, w.weight(name, (matrix.inputs, matrix.outputs), np.float32, load))


def run(directory: Path) -> tuple[list[Float32Array], ProbeStep, ProbeStep]:
    """Keys and values of every layer behind a prompt, and two steps of a canvas."""
    probe = OnnxRuntimeProbe(directory, max_tokens=128, threads=1)
    spec, rng = probe.spec, np.random.default_rng(1)
    probe.start()
    probe.encode(rng.integers(0, spec.vocab_size, 2 * spec.sliding_window + 3).astype(np.int32))
    caches = [array for layer in range(len(spec.layers)) for array in probe.keys_values(layer)]
    canvas = rng.integers(0, spec.vocab_size, spec.canvas_length).astype(np.int32)
    uniforms = rng.random(spec.canvas_length, dtype=np.float32)
    first = probe.denoise(canvas, None, uniforms, 0.7)
    return caches, first, probe.denoise(first.argmax_ids, first.next_soft, uniforms, 0.6)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_the_engine_multiplies_what_the_integers_stand_for(
    name: str, precision: str, checkpoint: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_engine(BuildRequest(checkpoint(name), tmp_path / "engine", precision=precision))
    assert (manifest.precision, manifest.kv_dtype, manifest.backend) == (precision, "fp32", "onnxruntime")
    monkeypatch.setattr(GroupedIntegers, "multiply", rounded_matmul)
    build_engine(BuildRequest(checkpoint(name), tmp_path / "rounded", precision=precision))

    (caches, *steps), (expected_caches, *expected_steps) = run(tmp_path / "engine"), run(tmp_path / "rounded")

    for got, expected in zip(caches, expected_caches, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    for step, wanted in zip(steps, expected_steps, strict=True):
        assert np.array_equal(step.argmax_ids, wanted.argmax_ids)
        np.testing.assert_allclose(step.entropies, wanted.entropies, atol=1e-4)
        np.testing.assert_allclose(step.next_soft, wanted.next_soft, rtol=1e-3, atol=1e-3)


def test_an_engine_with_integers_is_smaller(checkpoint: Named, engine_directory: Named, tmp_path: Path) -> None:
    sizes = {"fp32": (engine_directory("demo") / "model.onnx.data").stat().st_size}
    for precision in ("int8", "int4"):
        build_engine(BuildRequest(checkpoint("demo"), tmp_path / precision, precision=precision))
        sizes[precision] = (tmp_path / precision / "model.onnx.data").stat().st_size
    assert sizes["int8"] < 0.4 * sizes["fp32"]
    assert sizes["int4"] < 0.3 * sizes["fp32"]
