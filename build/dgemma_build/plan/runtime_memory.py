"""Device memory of the runtime's TensorRT engine beside weights and scratch. Knows how it is laid out, and no GPU.

Follows `dgemma_runtime.engines`, allocation by allocation; the tests hold it to what an opened engine allocates. The
engine is taken as built for the planned context, and to hold that of every sequence: in pages, and while its canvas is
denoised once more, laid out for TensorRT. One more context is laid out for the sequence that is being encoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from dgemma_build.attention import SLOT_GROUP
from dgemma_build.plan.kv import KvSizes
from dgemma_build.plan.options import ELEMENT_BYTES, PlanOptions
from dgemma_build.tensorrt import longest_chunk
from dgemma_runtime.contract import FULL, ModelSpec, cache_dtypes, sliding_slots

ALIGNMENT = 256  # bytes
_SMALLEST_SLOTS = 128


@dataclass(frozen=True)
class RuntimeMemory:
    """Bytes by use, all sequences together."""

    pages: int
    rows: int  # contexts laid out for denoising
    encoder: int  # the context laid out for encoding
    fresh: int  # keys and values of a call's own tokens, before they go to pages
    calls: int  # inputs, results and soft embeddings of every canvas, and of an encode call
    opening: int  # what the engine asks to be free when it opens beyond all that

    @property
    def total(self) -> int:
        return self.pages + self.rows + self.encoder + self.fresh + self.calls + self.opening


def runtime_memory(spec: ModelSpec, options: PlanOptions, sequences: int, context: int) -> RuntimeMemory:
    """Of `sequences` at once, of up to `context` tokens each."""
    chunk = min(longest_chunk(spec.canvas_length), context)
    groups = _groups(spec, options.kv)
    slots = -(-context // SLOT_GROUP) * SLOT_GROUP
    first_slots = min(_smallest_slots(spec), slots)
    rows, encoder, first_encoder = (
        sum(group.block_bytes(count, group.slots(most)) for group in groups)
        for count, most in ((sequences, slots), (1, slots), (1, first_slots))
    )
    canvas_calls = _call_bytes(spec, options, sequences, sequences, spec.canvas_length)
    # The engine opens with a short encoder, then wants to see free what rows and a long encoder may take.
    wanted = sum(group.token_bytes * group.slots(slots) * (sequences + group.full) for group in groups)
    return RuntimeMemory(
        pages=sequences * KvSizes.of(spec, options.kv).reserved_bytes(context, chunk),
        rows=rows,
        encoder=encoder,
        fresh=sum(group.fresh_bytes(sequences, spec.canvas_length, chunk) for group in groups),
        calls=canvas_calls + _call_bytes(spec, options, 1, 0, chunk),
        opening=max(0, first_encoder + wanted - rows - encoder - canvas_calls),
    )


@dataclass(frozen=True)
class _Group:
    """Keys and values of one shape and type."""

    full: bool
    kv_heads: int
    head_bytes: int  # of one token
    tensors: int  # a layer has two
    sliding_slots: int

    @property
    def token_bytes(self) -> int:
        return self.tensors * self.kv_heads * self.head_bytes

    def slots(self, full_slots: int) -> int:
        return full_slots if self.full else self.sliding_slots

    def block_bytes(self, rows: int, slots: int) -> int:
        """Of caches laid out, every tensor aligned."""
        pitch = slots * self.head_bytes
        step = ALIGNMENT // math.gcd(ALIGNMENT, pitch)
        return self.tensors * -(-rows * self.kv_heads // step) * step * pitch

    def fresh_bytes(self, rows: int, canvas_length: int, chunk: int) -> int:
        """Of the call that adds most."""
        return max(self.block_bytes(rows, canvas_length), _encoded_bytes(self, chunk))


@cache
def _encoded_bytes(group: _Group, chunk: int) -> int:
    """What the largest encode call adds; where alignment takes much, it is not the longest."""
    return max(group.block_bytes(1, length) for length in range(1, chunk + 1))


@cache
def _groups(spec: ModelSpec, kv_dtype: str) -> tuple[_Group, ...]:
    members: dict[tuple[bool, int, int], int] = {}
    for layer in spec.layers:
        for dtype in cache_dtypes(kv_dtype, layer):
            shape = (layer.kind == FULL, layer.num_key_value_heads, layer.head_dim * ELEMENT_BYTES[dtype])
            members[shape] = members.get(shape, 0) + 1
    return tuple(_Group(*shape, count, sliding_slots(spec)) for shape, count in members.items())


def _smallest_slots(spec: ModelSpec) -> int:
    """Of full layers in the first encoder: as many as sliding layers have, or a power of two above."""
    return max(_SMALLEST_SLOTS, 1 << max(sliding_slots(spec) - 1, 0).bit_length())


def _call_bytes(spec: ModelSpec, options: PlanOptions, rows: int, canvases: int, length: int) -> int:
    """Inputs and results of a call, each aligned, and its canvases' soft embeddings before and after."""
    inputs = [4 * rows * length, 8 * rows, 8 * rows, rows, 8 * canvases, 4 * canvases, 4 * canvases * length]
    results = 3 * [4 * canvases * length]
    aligned = sum(max(-(-size // ALIGNMENT), 1) * ALIGNMENT for size in inputs + results)
    soft = canvases * length * spec.hidden_size * ELEMENT_BYTES[options.activations]
    return aligned + 2 * max(soft, ALIGNMENT)
