"""Integer weights in groups: how they are chosen and packed. Knows no graph and no checkpoint.

A matrix [in, out] is cut into groups of `group_size` inputs of one output. A group's values become integers of `bits`
bits around zero times one scale. The scale is the one of several candidates with the least squared error: the largest
value need not be met exactly, since that makes all others coarser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

# Of the scale that meets a group's largest value exactly.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class GroupFormat:
    """Integers of 4 or 8 bits, `group_size` (a power of two from 16 on) to a scale."""

    bits: int
    group_size: int

    def groups(self, inputs: int) -> int:
        """Groups of one output; the last may be padded."""
        return -(-inputs // self.group_size)

    def packed_shape(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        """Of the packed integers, the layout of ONNX Runtime's MatMulNBits."""
        return outputs, self.groups(inputs), self.group_size * self.bits // 8


@dataclass(frozen=True)
class Quantized:
    """One matrix: integers stored plus 2 ** (bits - 1), the first of a pair in the low half of its byte."""

    packed: UInt8  # [out, groups, group_size * bits / 8]
    scales: Float32  # [out, groups]


def quantize(matrix: Float32, form: GroupFormat) -> Quantized:
    """A matrix [in, out] in the format."""
    grouped = _grouped(matrix, form)
    middle = 2 ** (form.bits - 1)
    largest = np.abs(grouped).max(axis=2, keepdims=True)
    best = np.full(largest.shape, np.inf, np.float32)
    scales = np.ones_like(largest)
    integers = np.zeros(grouped.shape, np.int16)
    for shrink in _SHRINK:
        scale = largest * np.float32(shrink / (middle - 1))
        scale[scale == 0] = 1.0
        tried = np.clip(np.rint(grouped / scale), -middle, middle - 1)
        error = np.square(tried * scale - grouped).sum(axis=2, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, scale, scales)
        integers = np.where(better, tried.astype(np.int16), integers)
    stored = (integers + middle).astype(np.uint8)
    packed = stored if form.bits == 8 else stored[..., 0::2] | stored[..., 1::2] << 4
    return Quantized(packed, scales[..., 0])


def dequantize(quantized: Quantized, form: GroupFormat, inputs: int) -> Float32:
    """The matrix [in, out] that the integers stand for."""
    packed = quantized.packed
    if form.bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], form.group_size)
    values = (packed.astype(np.float32) - 2 ** (form.bits - 1)) * quantized.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(values), -1)[:, :inputs].T)


def _grouped(matrix: Float32, form: GroupFormat) -> Float32:
    """[out, groups, group_size], zeros behind the last input."""
    inputs, outputs = matrix.shape
    padded = np.zeros((outputs, form.groups(inputs) * form.group_size), np.float32)
    padded[:, :inputs] = matrix.T
    return padded.reshape(outputs, -1, form.group_size)
