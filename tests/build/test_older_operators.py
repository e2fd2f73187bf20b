"""Operators written out for older parsers give what the operators give, in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from dgemma_build.older_operators import write_out
from dgemma_build.onnx_writer import GraphWriter


def graph(path: Path, **rotary: Any) -> onnx.ModelProto:
    w = GraphWriter()
    w.input("x", TensorProto.FLOAT, ["B", 3, "L", 8])
    for name in ("cos", "sin"):
        w.input(name, TensorProto.FLOAT, ["B", "L", 4])
    scale = w.array("scale", np.linspace(0.5, 2, 8, dtype=np.float32))
    normed = w.op("RMSNormalization", "x", scale, axis=-1, epsilon=1e-3, stash_type=TensorProto.FLOAT)
    w.op("RotaryEmbedding", normed, "cos", "sin", to="y", **rotary)
    w.graph_output("y", TensorProto.FLOAT, ["B", 3, "L", 8])
    w.save(path, "none.data", "test", {})
    return onnx.load(path)


def run(model: onnx.ModelProto, inputs: dict[str, npt.NDArray[Any]]) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


def test_the_results_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shapes = {"x": (2, 3, 5, 8), "cos": (2, 5, 4), "sin": (2, 5, 4)}
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    model = graph(tmp_path / "model.onnx")
    older = write_out(model)
    onnx.checker.check_model(older, full_check=True)
    kinds = {node.op_type for node in older.graph.node}
    assert not kinds & {"RMSNormalization", "RotaryEmbedding"}
    np.testing.assert_allclose(run(older, inputs), run(model, inputs), rtol=0, atol=1e-6)
    assert {node.op_type for node in model.graph.node} == {"RMSNormalization", "RotaryEmbedding"}


def test_what_is_not_handled_is_not_written_out_wrongly(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="interleaved"):
        write_out(graph(tmp_path / "model.onnx", interleaved=1))
