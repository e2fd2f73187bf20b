"""Products of tokens with weight matrices, one class per weight format. Knows no layer of the model.

    Plain            weights as they are, in the graph's type
    GroupedIntegers  integers in groups, multiplied by ONNX Runtime's MatMulNBits (4 or 8 bits)
    Fp8              E4M3 weights with a scale per output, E4M3 activations, as TensorRT's quantize/dequantize pairs
    Int4             4-bit weights in groups, dequantised into the product by TensorRT

Scales of E4M3 are powers of two: a floating-point type loses nothing by them, and multiplying by them is exact in
every type. Activations need no calibration. Where a bound is known (an RMS norm over n values cannot give more than
sqrt(n)) it sets the scale; elsewhere each token is divided by its greatest value first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from dgemma_build.onnx_writer import Array, GraphWriter
from dgemma_build.quantize import GroupFormat, power_of_two_scale, quantize_rows, to_fp8

Float32 = npt.NDArray[np.float32]
Converted = tuple[Array, Array]  # values and scales of one piece


@dataclass(frozen=True)
class Matrix:
    """A weight, given output by output; with `stack`, that many of them, one piece each."""

    inputs: int
    outputs: int
    rows: Callable[[], Iterable[Float32]]  # pieces [some outputs, inputs] in order
    stack: int = 0

    def of(self, *inputs: int) -> tuple[int, ...]:
        """Shape of something that has `inputs` values an output."""
        return (*([self.stack] if self.stack else []), self.outputs, *inputs)


class Products(Protocol):
    """How one weight format is multiplied."""

    def multiply(self, w: GraphWriter, value: str, name: str, matrix: Matrix, bound: float | None) -> str:
        """`value` [..., tokens, inputs] times the matrix; `bound` is the most that `value` can hold, if it is known.

        With a stack, `value` is [stack, tokens, inputs] and each matrix multiplies its own.
        """
        ...


class _Pieces:
    """Converts a matrix piece by piece and keeps the scales, which are the next weight of the file."""

    def __init__(self, matrix: Matrix, convert: Callable[[Float32], Converted]) -> None:
        self._matrix, self._convert = matrix, convert
        self._scales: list[Array] | None = None

    def values(self) -> Iterator[Array]:
        scales = []
        for piece in self._matrix.rows():
            stored, scale = self._convert(piece)
            scales.append(scale)
            yield stored[None] if self._matrix.stack else stored
        self._scales = scales

    def scales(self) -> Iterator[Array]:
        """Once; converted again where a resumed build had its values already."""
        kept, self._scales = self._scales, None
        for scale in kept if kept is not None else (self._convert(piece)[1] for piece in self._matrix.rows()):
            yield scale[None] if self._matrix.stack else scale


def _transposed(w: GraphWriter, value: str, matrix: Matrix) -> str:
    return w.op("Transpose", value, perm=[0, 2, 1] if matrix.stack else [1, 0])


@dataclass(frozen=True)
class Plain:
    """No quantisation. `turned` matrices stand input by input, for an engine that would turn them when it starts."""

    dtype: int
    turned: bool

    def multiply(self, w: GraphWriter, value: str, name: str, matrix: Matrix, bound: float | None) -> str:
        dtype = helper.tensor_dtype_to_np_dtype(self.dtype)

        def whole() -> list[Array]:
            return [np.concatenate(list(matrix.rows())).T.astype(dtype, copy=False)]

        def pieces() -> Iterator[Array]:
            for piece in matrix.rows():
                rounded = piece.astype(dtype, copy=False)
                yield rounded[None] if matrix.stack else rounded

        if self.turned and not matrix.stack:
            return w.op("MatMul", value, w.weight(name, (matrix.inputs, matrix.outputs), dtype, whole))
        weights = w.weight(name, matrix.of(matrix.inputs), dtype, pieces)
        return w.op("MatMul", value, _transposed(w, weights, matrix))


@dataclass(frozen=True)
class GroupedIntegers:
    """ONNX Runtime multiplies the integers as they are; activations stay float32."""

    form: GroupFormat

    def multiply(self, w: GraphWriter, value: str, name: str, matrix: Matrix, bound: float | None) -> str:
        form = self.form

        def convert(rows: Float32) -> Converted:
            quantized = quantize_rows(rows, form)
            return quantized.packed, quantized.scales

        pieces = _Pieces(matrix, convert)
        packed = w.weight(f"{name}.packed", form.packed_shape(matrix.inputs, matrix.outputs), np.uint8, pieces.values)
        scales = w.weight(f"{name}.scales", matrix.of(form.groups(matrix.inputs)), np.float32, pieces.scales)
        sizes: dict[str, Any] = {"K": matrix.inputs, "N": matrix.outputs}
        sizes |= {"bits": form.bits, "block_size": form.group_size}
        return w.op("MatMulNBits", value, packed, scales, domain="com.microsoft", accuracy_level=1, **sizes)


class Fp8:
    """E4M3 on both sides, products in the tensor cores' float32, results in `dtype`."""

    def __init__(self, dtype: int) -> None:
        self._dtype = helper.tensor_dtype_to_np_dtype(dtype)
        self._rounded: dict[tuple[str, float], str] = {}  # activations that several matrices read

    def multiply(self, w: GraphWriter, value: str, name: str, matrix: Matrix, bound: float | None) -> str:
        pieces = _Pieces(matrix, lambda rows: self._convert(*to_fp8(rows)))
        values = w.weight(f"{name}.fp8", matrix.of(matrix.inputs), np.dtype(ml_dtypes.float8_e4m3fn), pieces.values)
        scales = w.weight(f"{name}.scales", matrix.of(), self._dtype, pieces.scales)
        if matrix.stack:
            scales = w.op("Unsqueeze", scales, w.const([1]))
        weights = _transposed(w, w.op("DequantizeLinear", values, w.const(1.0, self._dtype)), matrix)
        if bound is not None:
            product = w.op("MatMul", self._round(w, value, float(power_of_two_scale(bound))), weights)
            return w.op("Mul", product, scales)
        # `value` has three axes. Counted from the end, onnxruntime 1.31 reduces an empty array to a wrong shape.
        greatest = w.op("ReduceMax", w.op("Abs", value), w.const([2]))
        greatest = w.op("Max", greatest, w.const(1e-30, self._dtype))
        rounded = self._round(w, w.op("Div", value, greatest), float(power_of_two_scale(1.0)))
        return w.op("Mul", w.op("Mul", w.op("MatMul", rounded, weights), greatest), scales)

    def _convert(self, values: Array, scales: Float32) -> Converted:
        return values, scales.astype(self._dtype)

    def _round(self, w: GraphWriter, value: str, scale: float) -> str:
        key = (value, scale)
        if key not in self._rounded:
            constant = w.const(scale, self._dtype)
            stored = w.op("QuantizeLinear", value, constant, output_dtype=TensorProto.FLOAT8E4M3FN)
            self._rounded[key] = w.op("DequantizeLinear", stored, constant)
        return self._rounded[key]


@dataclass(frozen=True)
class Int4:
    """Weights only: activations and products in `dtype`, which the scales have too."""

    dtype: int
    form: GroupFormat

    def multiply(self, w: GraphWriter, value: str, name: str, matrix: Matrix, bound: float | None) -> str:
        form, dtype = self.form, helper.tensor_dtype_to_np_dtype(self.dtype)

        def convert(rows: Float32) -> Converted:
            quantized = quantize_rows(rows, form)
            return quantized.signed_pairs(matrix.inputs), quantized.scales.astype(dtype)

        pieces = _Pieces(matrix, convert)
        packed = w.weight(
            f"{name}.int4",
            matrix.of(matrix.inputs // 2),
            np.uint8,
            pieces.values,
            declared=(TensorProto.INT4, matrix.of(matrix.inputs)),
        )
        scales = w.weight(f"{name}.scales", matrix.of(form.groups(matrix.inputs)), dtype, pieces.scales)
        axis = 2 if matrix.stack else 1
        weights = w.op("DequantizeLinear", packed, scales, axis=axis, block_size=form.group_size)
        return w.op("MatMul", value, _transposed(w, weights, matrix))


def rms_bound(values: int) -> float:
    """The most that one of `values` numbers can be whose mean square is one."""
    return math.sqrt(values)
