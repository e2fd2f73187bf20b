"""Integer weights: what they stand for, how they are packed, and that ONNX Runtime multiplies just that."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dgemma_build.quantize import GroupFormat, Quantized, dequantize, quantize
from dgemma_runtime.contract import Float32Array


def gaussian(inputs: int, outputs: int) -> Float32Array:
    return np.random.default_rng(inputs).standard_normal((inputs, outputs), dtype=np.float32)


def relative_error(got: Float32Array, expected: Float32Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("bits", "group", "bar"), [(8, 32, 0.007), (4, 32, 0.10), (4, 16, 0.085), (4, 128, 0.13)])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 40), (70, 3), (22, 56)])
def test_the_error_of_gaussian_weights(bits: int, group: int, bar: float, inputs: int, outputs: int) -> None:
    form, matrix = GroupFormat(bits, group), gaussian(inputs, outputs)
    quantized = quantize(matrix, form)
    assert quantized.packed.shape == form.packed_shape(inputs, outputs)
    assert quantized.scales.shape == (outputs, form.groups(inputs))
    assert relative_error(dequantize(quantized, form, inputs), matrix) < bar


def test_what_fits_the_integers_is_exact() -> None:
    form = GroupFormat(4, 16)
    matrix = np.concatenate([np.arange(-7, 8), [0]]).astype(np.float32)[:, None] * 0.5
    assert np.array_equal(dequantize(quantize(matrix, form), form, 16), matrix)
    zeros = np.zeros((16, 2), np.float32)
    assert np.array_equal(dequantize(quantize(zeros, form), form, 16), zeros)


def test_the_first_of_a_pair_is_the_low_half() -> None:
    form = GroupFormat(4, 16)
    matrix = np.zeros((16, 1), np.float32)
    matrix[:3, 0] = (7.0, -3.0, 1.0)
    assert quantize(matrix, form).packed[0, 0, :2].tolist() == [(7 + 8) | (-3 + 8) << 4, (1 + 8) | 8 << 4]


def test_an_outlier_does_not_make_everything_else_coarse() -> None:
    """Meeting the largest value exactly is a candidate among several; the best is never worse."""
    form, matrix = GroupFormat(4, 32), gaussian(32, 200)
    plain = np.abs(matrix).max(axis=0) / 7
    rounded = np.clip(np.rint(matrix / plain), -8, 7) * plain
    errors = [
        np.square(values - matrix).sum(axis=0) for values in (dequantize(quantize(matrix, form), form, 32), rounded)
    ]
    assert (errors[0] <= errors[1] * 1.0001).all()
    assert errors[0].sum() < 0.97 * errors[1].sum()


def session_of(quantized: Quantized, form: GroupFormat, inputs: int, outputs: int) -> ort.InferenceSession:
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=form.bits,
        block_size=form.group_size,
        accuracy_level=1,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(quantized.packed, "packed"), numpy_helper.from_array(quantized.scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 256), (56, 72), (22, 130)])
def test_onnxruntime_multiplies_what_they_stand_for(bits: int, inputs: int, outputs: int) -> None:
    form = GroupFormat(bits, 16)
    quantized = quantize(gaussian(inputs, outputs), form)
    session = session_of(quantized, form, inputs, outputs)
    for rows in (0, 1, 7, 64):  # none: an expert that no token chose
        x = np.random.default_rng(rows).standard_normal((rows, inputs), dtype=np.float32)
        got = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(got, x @ dequantize(quantized, form, inputs), rtol=1e-4, atol=1e-4)
