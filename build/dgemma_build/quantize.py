"""Integer weights in groups: how they are chosen and packed. Knows no graph and no checkpoint.

A matrix [in, out] is cut into groups of `group_size` inputs of one output. A group's values become integers of `bits`
bits around zero times one scale. The scale is the one of several candidates with the least squared error: the largest
value need not be met exactly, since that makes all others coarser.

E4M3 has a scale per output instead, a power of two (see `products.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dgemma_runtime.errors import ConfigurationError

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

# Candidates, of the scale that meets a group's largest value exactly. With 8 bits that one is as good as any.
_SHRINK = {4: (1.0, 0.95, 0.9, 0.85, 0.8), 8: (1.0,)}
FP8_MAX = 448.0  # the greatest number of E4M3
_CHUNK = 2**18  # values at once


@dataclass(frozen=True)
class GroupFormat:
    """Integers of 4 or 8 bits, `group_size` (a power of two from 16 on) to a scale."""

    bits: int
    group_size: int
    bfloat16_scales: bool = False  # scales that bfloat16 holds exactly, as float32 still

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

    def signed_pairs(self, inputs: int) -> UInt8:
        """4-bit integers [out, inputs / 2] in two's complement, as ONNX stores INT4."""
        if inputs % 2:
            raise ConfigurationError(f"int4 weights with {inputs} inputs: the number must be even")
        pairs = self.packed.reshape(len(self.packed), -1)[:, : inputs // 2]
        return np.bitwise_xor(pairs, 0x88, dtype=np.uint8)


def quantize(matrix: Float32, form: GroupFormat) -> Quantized:
    """A matrix [in, out] in the format."""
    return quantize_rows(matrix.T, form)


def quantize_rows(rows: Float32, form: GroupFormat) -> Quantized:
    """A matrix [out, in] in the format."""
    outputs, inputs = rows.shape
    packed = np.empty(form.packed_shape(inputs, outputs), np.uint8)
    scales = np.empty((outputs, form.groups(inputs)), np.float32)

    def some(start: int, stop: int) -> None:
        padded = np.zeros((stop - start, form.groups(inputs) * form.group_size), np.float32)
        padded[:, :inputs] = rows[start:stop]
        grouped = padded.reshape(stop - start, -1, form.group_size)
        packed[start:stop], scales[start:stop] = _quantize_groups(grouped, form)

    _by_rows(outputs, inputs, some)
    return Quantized(packed, scales)


def _by_rows(outputs: int, inputs: int, work: Callable[[int, int], None]) -> None:
    """Calls `work` for ranges of rows, on all cores: numpy gives way to other threads while it computes."""
    step = max(1, _CHUNK // inputs)
    starts = range(0, outputs, step)
    if len(starts) == 1:
        work(0, outputs)
        return
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(lambda start: work(start, min(start + step, outputs)), starts))


def _quantize_groups(grouped: Float32, form: GroupFormat) -> tuple[UInt8, Float32]:
    """Packed integers and scales [out, groups] of values [out, groups, group_size]."""
    bits, middle = form.bits, 2 ** (form.bits - 1)
    exact = np.abs(grouped).max(axis=2) / np.float32(middle - 1)
    exact[exact == 0] = 1.0
    scales, least = np.empty_like(exact), np.full(exact.shape, np.inf, np.float32)
    work = np.empty_like(grouped)
    for shrink in _SHRINK[bits]:
        scale = exact * np.float32(shrink)
        if form.bfloat16_scales:
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        _round(grouped, scale, middle, work)
        work *= scale[..., None]
        work -= grouped
        error = np.einsum("ogi,ogi->og", work, work)
        scales = np.where(error < least, scale, scales)
        least = np.minimum(error, least)
    _round(grouped, scales, middle, work)
    work += middle
    stored: UInt8 = work.astype(np.uint8)
    if bits == 4:
        stored = np.left_shift(stored[..., 1::2], 4, dtype=np.uint8) | stored[..., 0::2]
    return stored, scales


def _round(grouped: Float32, scales: Float32, middle: int, out: Float32) -> None:
    """The integers, as floats, of values and scales."""
    np.multiply(grouped, (1 / scales)[..., None], out=out)
    np.rint(out, out=out)
    np.clip(out, -middle, middle - 1, out=out)


def dequantize(quantized: Quantized, form: GroupFormat, inputs: int) -> Float32:
    """The matrix [in, out] that the integers stand for."""
    packed = quantized.packed
    if form.bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], form.group_size)
    values = (packed.astype(np.float32) - 2 ** (form.bits - 1)) * quantized.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(values), -1)[:, :inputs].T)


def power_of_two_scale(greatest: float | Float32) -> Float32:
    """The least powers of two by which values up to `greatest` are divided to fit E4M3; one where all are zero."""
    limit = np.maximum(np.asarray(greatest, np.float32), np.float32(1e-30)) / np.float32(FP8_MAX)
    scale: Float32 = np.where(np.asarray(greatest) > 0, np.exp2(np.ceil(np.log2(limit))), 1).astype(np.float32)
    return scale


def to_fp8(rows: Float32) -> tuple[npt.NDArray[Any], Float32]:
    """E4M3 values [out, in] and scales [out] of a matrix [out, in]."""
    values = np.empty(rows.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty(len(rows), np.float32)

    def some(start: int, stop: int) -> None:
        part = rows[start:stop]
        scales[start:stop] = power_of_two_scale(np.maximum(part.max(axis=1), -part.min(axis=1)))
        values[start:stop] = part / scales[start:stop, None]

    _by_rows(len(rows), rows.shape[1], some)
    return values, scales
