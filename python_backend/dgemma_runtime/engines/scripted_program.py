"""A made-up model as a program in ordinary memory, for tests: every number depends on every bit that it is given.

What it returns is a checksum of what a call may see, so an engine that shows it a wrong byte, or a right one in the
wrong place, returns other numbers than `answer` and `new_keys_values` applied to the right ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dgemma_runtime.contract import FULL, Float32Array, Int32Array, ModelSpec
from dgemma_runtime.engines.bindings import DENOISE, ENCODE, Bindings
from dgemma_runtime.engines.device import STORAGE, Array
from dgemma_runtime.engines.host_device import HostDevice, HostProgram

_HIGHEST = {"bf16": 0x3FFF, "fp16": 0x3BFF, "fp8": 0x37}  # bits of positive finite numbers

Context = Sequence[Array]
"""Per layer what a call may see of it: [2, kv_heads, tokens, head_dim], the bits of keys and values."""


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


def new_keys_values(bindings: Bindings, context: Context, token_ids: Int32Array, position: int) -> list[Array]:
    """Per layer [2, kv_heads, tokens, head_dim]."""
    seed = _checksum(*context)
    highest = _HIGHEST[bindings.kv_dtype]
    made = []
    for index, layer in enumerate(bindings.spec.layers):
        tokens = np.array(token_ids, np.int64) * 7 + np.arange(position, position + len(token_ids)) * 131 + seed
        salt = np.arange(2 * layer.num_key_value_heads * layer.head_dim) * 31 + index * 1009
        values = (tokens[:, None] * 2654435761 + salt) >> 7
        shape = (len(token_ids), 2, layer.num_key_value_heads, layer.head_dim)
        made.append((values % highest).astype(STORAGE[bindings.kv_dtype]).reshape(shape).transpose(1, 2, 0, 3))
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
    random = np.random.default_rng(_checksum(*context, *given))
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
        inputs, outputs, spec = self.inputs, self.outputs, self.bindings.spec
        rows = len(inputs["position"])
        assert (inputs["is_canvas"] == (profile == DENOISE)).all()
        assert inputs["canvas_rows"].tolist() == (list(range(rows)) if profile == DENOISE else [])
        assert np.array_equal(inputs["sliding_length"], np.minimum(inputs["position"], spec.sliding_window - 1))
        for row in range(rows):
            position = int(inputs["position"][row])
            context = [self._context(layer, row, position) for layer in range(len(spec.layers))]
            token_ids = inputs["token_ids"][row]
            for layer, new in enumerate(new_keys_values(self.bindings, context, token_ids, position)):
                outputs[f"new_keys_{layer}"][row], outputs[f"new_values_{layer}"][row] = new
            if profile == ENCODE:
                continue
            temperature, soft = float(inputs["temperature"][row]), inputs["soft_embedding"][row]
            got = answer(self.bindings, context, token_ids, inputs["uniforms"][row], temperature, position, soft)
            outputs["argmax_ids"][row], outputs["sampled_ids"][row] = got.argmax_ids, got.sampled_ids
            outputs["entropies"][row], outputs["next_soft_embedding"][row] = got.entropies, got.next_soft

    def _context(self, layer: int, row: int, position: int) -> Array:
        spec = self.bindings.spec.layers[layer]
        both: Array = np.stack([self.inputs[f"{name}_cache_{layer}"][row] for name in ("key", "value")])
        both = both.reshape(2, spec.num_key_value_heads, -1, spec.head_dim)
        assert (both <= _HIGHEST[self.bindings.kv_dtype]).all(), "what is masked must be finite numbers"
        seen: Array = both[:, :, : visible(self.bindings.spec, layer, position)]
        return seen


def _checksum(*arrays: Array) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value
