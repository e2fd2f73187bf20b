"""Bytes that the engines take, by use, before any is allocated. Knows no free memory and no engine library.

The server plans its start with these formulas (`memory_plan.py`), `dgemma-build plan` an engine that is not built yet.
Tests hold them to what running engines take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache

from dgemma_runtime.contract import FULL, EngineLimits, ModelSpec, cache_dtypes, sliding_slots
from dgemma_runtime.drafter_manifest import DrafterManifest
from dgemma_runtime.engines.ort_rows import KEPT_SLOTS, encode_tokens, slots_for
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.pages import PageRules

PAGE_SIZE = 64  # tokens, the default
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class TokenBytes:
    """Keys and values of one token, in all layers of a group."""

    full: int
    sliding: int


def token_bytes(spec: ModelSpec, kv_dtype: str) -> TokenBytes:
    """`kv_dtype` as in a manifest; raises ConfigurationError for one that is not known."""
    if kv_dtype not in ELEMENT_BYTES:
        known = ", ".join(ELEMENT_BYTES)
        raise ConfigurationError(f"the engine's kv_dtype is {kv_dtype!r}, this runtime knows {known}")
    found = {True: 0, False: 0}  # by whether a layer is a full one
    for layer in spec.layers:
        elements = sum(ELEMENT_BYTES[dtype] for dtype in cache_dtypes(kv_dtype, layer))
        found[layer.kind == FULL] += layer.num_key_value_heads * layer.head_dim * elements
    return TokenBytes(full=found[True], sliding=found[False])


def page_pool_bytes(spec: ModelSpec, kv_dtype: str, limits: EngineLimits) -> int:
    """All pages of an engine."""
    token = token_bytes(spec, kv_dtype)
    return limits.page_size * (limits.full_pages * token.full + limits.sliding_pages * token.sliding)


def limits_of(spec: ModelSpec, sequences: int, context: int, chunk: int) -> EngineLimits:
    """Pages for so many sequences of up to `context` tokens, encoded by up to `chunk` at once, and for nothing else."""
    encoded = max(min(chunk, context), spec.canvas_length)
    need = PageRules(PAGE_SIZE, spec.sliding_window, encoded).need(context)
    return EngineLimits(sequences, encoded, PAGE_SIZE, sequences * need.full, sequences * need.sliding)


# ---------------------------------------------------------------- onnxruntime

PROCESS_BYTES = 75_000_000  # Python, numpy, onnxruntime with its session, measured with onnxruntime 1.31 on Linux
_SCORE_COPIES, _MASK_COPIES, _LOGIT_COPIES, _DRAFT_LOGIT_COPIES = 1.05, 4.5, 4, 3


@dataclass(frozen=True)
class LayerWork:
    """What a layer of the model works with, besides what serving needs to know of it."""

    num_attention_heads: int
    token_values: int  # of one token: residual stream, dense MLP, the chosen experts' rows


@dataclass(frozen=True)
class HostMemory:
    """Bytes by use; pages and buffers are counted as if written to."""

    process: int
    weights: int
    packed_embedding: int  # two copies for the head's products, made when the session is opened
    kv_pools: int
    workspaces: int
    activations: int

    @property
    def peak(self) -> int:
        return sum(astuple(self))


def host_memory(spec: ModelSpec, work: LayerWork, weights: int, limits: EngineLimits, context: int) -> HostMemory:
    """Peak memory of the onnxruntime engine in a process of its own, over sequences of up to `context` tokens.

    Exact are the weights, the page pools and the rows of caches. What ONNX Runtime allocates during a call is an
    estimate, fitted to measured processes (two models, 2,048 to 262,144 tokens, 1 to 8 sequences) and within a tenth of
    each: attention's scores once, its masks four and a half times, in a denoising step four times the logits.
    """
    token, canvas, batch = token_bytes(spec, "fp32"), spec.canvas_length, limits.max_batch_size
    slots, laid_out = slots_for(context), laid_out_tokens(limits, context)
    chunk = min(limits.max_encode_tokens, context, encode_tokens(context))
    tail = min(slots, spec.sliding_window - 1 + max(limits.max_encode_tokens, canvas))

    def call(slots: int, length: int, tokens: int) -> int:
        """Attention, and a layer's activations."""
        attention = _attention_bytes(work.num_attention_heads, slots, length, tokens * tail)
        return attention + 4 * tokens * work.token_values

    steps = call(_step_slots(limits, context), canvas, batch * canvas)
    return HostMemory(
        process=PROCESS_BYTES,
        weights=weights,
        packed_embedding=2 * spec.vocab_size * spec.hidden_size * 4,
        kv_pools=page_pool_bytes(spec, "fp32", limits),
        workspaces=token.full * laid_out + token.sliding * batch * tail,
        activations=max(call(slots, chunk, chunk), steps + 4 * _LOGIT_COPIES * batch * canvas * spec.vocab_size),
    )


def laid_out_tokens(limits: EngineLimits, context: int) -> int:
    """Of contexts in rows of caches beside the pages, of every sequence."""
    slots, batch = slots_for(context), limits.max_batch_size
    return min(batch * slots, limits.full_pages * limits.page_size + batch * KEPT_SLOTS)


def _step_slots(limits: EngineLimits, context: int) -> int:
    """Of a full layer, in all rows of a call over every canvas; such rows are at least half full."""
    return min(limits.max_batch_size * slots_for(context), 2 * laid_out_tokens(limits, context))


def _attention_bytes(heads: int, slots: int, length: int, sliding: int) -> int:
    """Scores and mask of one full layer with `slots` in all rows, and a sliding layer's mask of so many numbers."""
    return 4 * round(_SCORE_COPIES * heads * length * slots + _MASK_COPIES * (length * slots + sliding))


def drafter_host_memory(
    drafter: DrafterManifest, weights: int, spec: ModelSpec, limits: EngineLimits, context: int
) -> int:
    """What a drafter takes beside the onnxruntime engine: weights, two copies of the embedding for the head's product,
    attention and logits of a call, which its session keeps for itself.
    """
    batch, canvas = limits.max_batch_size, spec.canvas_length
    tail = min(slots_for(context), spec.sliding_window - 1 + canvas)
    attention = _attention_bytes(
        drafter.num_attention_heads, _step_slots(limits, context), canvas, batch * canvas * tail
    )
    embedding = 2 * drafter.vocab_size * drafter.denoiser_hidden_size
    return weights + attention + 4 * (embedding + _DRAFT_LOGIT_COPIES * batch * canvas * drafter.vocab_size)


def largest(most: int, holds: Callable[[int], bool]) -> int | None:
    """The largest of 0 .. most for which `holds`, which only ever turns false; None where it never does."""
    if not holds(0):
        return None
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if holds(middle):
            least = middle
        else:
            most = middle - 1
    return least


# ---------------------------------------------------------------- TensorRT

ALIGNMENT = 256  # bytes
_SMALLEST_SLOTS = 128
_DRAFT_ROW_BYTES, _DRAFT_POSITION_BYTES = 20, 8  # of a draft's inputs, and of its results
_SPARE_SLOTS = 4096  # by which rounding up makes a row longer than its context, at most


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes by use, all sequences together."""

    pages: int
    rows: int  # contexts laid out for denoising
    encoder: int  # the context laid out for encoding
    fresh: int  # keys and values of a call's own tokens, before they go to pages
    calls: int  # inputs, results and soft embeddings of every canvas, and of an encode call
    opening: int  # what the engine asks to be free when it opens beyond all that

    @property
    def total(self) -> int:
        return sum(astuple(self))


def device_memory(
    spec: ModelSpec, kv_dtype: str, activations: str, limits: EngineLimits, largest_slots: int
) -> DeviceMemory:
    """Device memory of the TensorRT engine beside weights and scratch, as `dgemma_runtime.engines` allocates it.

    Contexts of all pages are laid out once more: in rows of the canvases, and one in the encoder. `largest_slots` is
    what the engine was built for, `activations` the precision of soft embeddings.
    """
    groups, batch, chunk = _groups(spec, kv_dtype), limits.max_batch_size, limits.max_encode_tokens
    pool_tokens, smallest = limits.full_pages * limits.page_size, min(_smallest_slots(spec), largest_slots)
    slots = _slots_for(pool_tokens, smallest, largest_slots)
    together = max(1, min(batch, pool_tokens // slots))
    rows, encoder, first_encoder = (
        sum(group.block_bytes(count, group.slots(most)) for group in groups)
        for count, most in ((together, slots), (1, slots), (1, smallest))
    )
    canvas_calls = _call_bytes(spec, activations, together, together, spec.canvas_length)
    # The engine opens with a short encoder, then wants to see free what rows and a long encoder may take.
    spare = max(_SPARE_SLOTS, _smallest_slots(spec))
    most = min(pool_tokens + batch * spare, batch * slots) + slots
    wanted = sum(group.token_bytes * (most if group.full else batch * group.sliding_slots) for group in groups)
    return DeviceMemory(
        pages=page_pool_bytes(spec, kv_dtype, limits),
        rows=rows,
        encoder=encoder,
        fresh=sum(group.fresh_bytes(batch, spec.canvas_length, chunk) for group in groups),
        calls=canvas_calls + _call_bytes(spec, activations, 1, 0, chunk),
        opening=max(0, first_encoder + wanted - rows - encoder - canvas_calls),
    )


def drafter_device_memory(drafter: DrafterManifest, weights: int, limits: EngineLimits) -> int:
    """What a drafter takes beside the TensorRT engine: weights, scratch, and five arrays of inputs and results."""
    row = _DRAFT_ROW_BYTES + _DRAFT_POSITION_BYTES * drafter.canvas_length
    return weights + drafter.scratch_bytes + limits.max_batch_size * row + 5 * ALIGNMENT


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


def _slots_for(tokens: int, smallest: int, largest: int) -> int:
    return min(max(smallest, slots_for(tokens)), largest)


def _call_bytes(spec: ModelSpec, activations: str, rows: int, canvases: int, length: int) -> int:
    """Inputs and results of a call, each aligned, and its canvases' soft embeddings before and after."""
    inputs = [4 * rows * length, 8 * rows, 8 * rows, rows, 8 * canvases, 4 * canvases, 4 * canvases * length]
    results = 3 * [4 * canvases * length]
    aligned = sum(max(-(-size // ALIGNMENT), 1) * ALIGNMENT for size in inputs + results)
    soft = canvases * length * spec.hidden_size * ELEMENT_BYTES[activations]
    return aligned + 2 * max(soft, ALIGNMENT)
