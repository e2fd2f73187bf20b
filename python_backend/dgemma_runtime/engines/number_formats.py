"""bf16, fp16, fp32 and fp8 (E4M3) between their bits and float32, in numpy alone. Knows no tensor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import Float32Array
from dgemma_runtime.engines.device import STORAGE, Array, HostBytes


def _e4m3_values() -> Float32Array:
    """Of every byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, 0x7f and 0xff are no numbers."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7) / 8.0
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    size = np.where((byte & 127) == 127, np.nan, size)
    return np.where(byte & 128, -size, size).astype(np.float32)


_E4M3 = _e4m3_values()


def to_float32(bits: HostBytes, dtype: str) -> Float32Array:
    """Values of raw bytes [.., n * size of an element] as [.., n]."""
    stored: Array = np.ascontiguousarray(bits).view(STORAGE[dtype])
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "fp8":
        return _E4M3[stored]
    return stored.astype(np.float32)


def from_float32(values: npt.ArrayLike, dtype: str) -> HostBytes:
    """Raw bytes of finite values, to the nearest (ties to even); `dtype` is bf16, fp16 or fp32."""
    array = np.ascontiguousarray(values, np.float32)
    if dtype == "bf16":
        wide = array.view(np.uint32)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)
    return array.astype(STORAGE[dtype]).view(np.uint8)
