"""A made-up model as a program in ordinary memory, for tests: every number depends on every bit that it is given.

What it returns is a checksum of what a call may see, so an engine that shows it a wrong byte, or a right one in the
wrong place, returns other numbers than `answer` and `new_keys_values` applied to the right ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from dgemma_runtime.contract import FULL, Float32Array, Int32Array, ModelSpec, cache_dtypes
from dgemma_runtime.engines.bindings import DENOISE, Bindings
from dgemma_runtime.engines.device import STORAGE, Array
from dgemma_runtime.engines.host_device import HostDevice, HostProgram

_HIGHEST = {"bf16": 0x3FFF, "fp16": 0x3BFF, "fp8": 0x37}  # bits of positive finite numbers

KeysValues = tuple[Array, Array]
"""Of one layer, each [kv_heads, tokens, head_dim]: their bits."""
Context = Sequence[KeysValues]
"""Per layer what a call may see of it."""


@dataclass(frozen=True)
class Answer:
    """Of one canvas's step."""

    argmax_ids: Int32Array  # [canvas_length]
    sampled_ids: Int32Array
    entropies: Float32Array
    next_soft: Array  # [canvas_length, hidden], bits


def visible(spec: ModelSpec, layer: int, position: int) -> int:
    """Tokens of a context that a layer sees."""
    return position if spec.layers[layer].kind == FULL else min(position, spec.sliding_window - 1)


def new_keys_values(bindings: Bindings, context: Context, token_ids: Int32Array, position: int) -> list[KeysValues]:
    """Per layer."""
    seed = _checksum(*chain(*context))
    made = []
    for index, layer in enumerate(bindings.spec.layers):
        tokens = np.array(token_ids, np.int64) * 7 + np.arange(position, position + len(token_ids)) * 131 + seed
        salt = np.arange(2 * layer.num_key_value_heads * layer.head_dim) * 31 + index * 1009
        values = (tokens[:, None] * 2654435761 + salt) >> 7
        shape = (len(token_ids), 2, layer.num_key_value_heads, layer.head_dim)
        keys, values = values.reshape(shape).transpose(1, 2, 0, 3)
        of_keys, of_values = cache_dtypes(bindings.kv_dtype, layer)
        made.append((_bits(keys, of_keys), _bits(values, of_values)))
    return made


def answer(
    bindings: Bindings,
    context: Context,
    canvas_ids: Int32Array,
    uniforms: Float32Array,
    temperature: float,
    position: int,
    soft: Array,
) -> Answer:
    """One step of one canvas."""
    given: tuple[Array, ...] = (canvas_ids, uniforms, np.array([temperature], np.float32), np.array([position]), soft)
    random = np.random.default_rng(_checksum(*chain(*context), *given))
    spec = bindings.spec
    ids = random.integers(spec.vocab_size, size=(2, spec.canvas_length), dtype=np.int32)
    entropies = random.random(spec.canvas_length, np.float32)
    shape = (spec.canvas_length, spec.hidden_size)
    bits = random.integers(_HIGHEST["bf16"], size=shape).astype(STORAGE[bindings.soft_dtype])
    return Answer(ids[0], ids[1], entropies, bits)


def scripted_program(device: HostDevice, bindings: Bindings) -> HostProgram:
    """With exactly these bindings."""

    def run(profile: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        _Call(bindings, inputs, outputs).run(profile)

    return HostProgram(device, bindings.specs(), run)


@dataclass(frozen=True)
class _Call:
    bindings: Bindings
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def run(self, profile: int) -> None:
        inputs, spec = self.inputs, self.bindings.spec
        canvases = inputs["canvas_rows"].tolist()
        assert profile == DENOISE or not canvases
        assert sorted(canvases) == np.flatnonzero(inputs["is_canvas"]).tolist()
        assert np.array_equal(inputs["sliding_length"], np.minimum(inputs["position"], spec.sliding_window - 1))
        for row in range(len(inputs["position"])):
            position = int(inputs["position"][row])
            context = [self._context(layer, row, position) for layer in range(len(spec.layers))]
            if row in canvases:
                self._step(row, canvases.index(row), context)
            else:
                self._encode(row, context)

    def _encode(self, row: int, context: Context) -> None:
        inputs, outputs = self.inputs, self.outputs
        new = new_keys_values(self.bindings, context, inputs["token_ids"][row], int(inputs["position"][row]))
        for layer, both in enumerate(new):
            outputs[f"new_keys_{layer}"][row], outputs[f"new_values_{layer}"][row] = both

    def _step(self, row: int, place: int, context: Context) -> None:
        inputs, outputs = self.inputs, self.outputs
        given = (inputs["token_ids"][row], inputs["uniforms"][place], float(inputs["temperature"][place]))
        got = answer(self.bindings, context, *given, int(inputs["position"][row]), inputs["soft_embedding"][place])
        outputs["argmax_ids"][place], outputs["sampled_ids"][place] = got.argmax_ids, got.sampled_ids
        outputs["entropies"][place], outputs["next_soft_embedding"][place] = got.entropies, got.next_soft
        for layer in range(len(self.bindings.spec.layers)):  # a canvas's own are nobody's
            outputs[f"new_keys_{layer}"][row] = outputs[f"new_values_{layer}"][row] = 0

    def _context(self, layer: int, row: int, position: int) -> KeysValues:
        of_keys, of_values = cache_dtypes(self.bindings.kv_dtype, self.bindings.spec.layers[layer])
        return (
            self._seen(f"key_cache_{layer}", of_keys, layer, row, position),
            self._seen(f"value_cache_{layer}", of_values, layer, row, position),
        )

    def _seen(self, name: str, dtype: str, layer: int, row: int, position: int) -> Array:
        spec, cache = self.bindings.spec.layers[layer], self.inputs[name][row]
        assert cache.dtype == STORAGE[dtype], name
        assert (cache <= _HIGHEST[dtype]).all(), "what is masked must be finite numbers"
        whole: Array = cache.reshape(spec.num_key_value_heads, -1, spec.head_dim)
        return whole[:, : visible(self.bindings.spec, layer, position)]


def _bits(numbers: Array, dtype: str) -> Array:
    return (numbers % _HIGHEST[dtype]).astype(STORAGE[dtype])


def _checksum(*arrays: Array) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value
