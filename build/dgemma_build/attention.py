"""Attention in ONNX over a cache in front of a call's own tokens, in two styles. Knows no weights and no checkpoint.

`InPlaceCache` (ONNX Runtime): the cache is an input and an output over the same memory; a call writes its keys and
values behind the context and attends to the whole.

`ContextCache` (TensorRT): the cache is only read, and what encode adds goes out as small tensors; nothing per step is
as large as the context but the reading of it. Sliding layers put their few slots and the call's tokens side by side
and use the library's fused attention. There is none for heads of 512, so full layers are written out: for one query
head of every KV head at a time (each waits for the one before, so that only one head's scores exist at once), scores
as keys times queries, which needs no transposed copy of the keys. Slots come in groups of 64, so that the builder
knows that rows of scores are aligned; without that it copies the keys and the values.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from dgemma_build.onnx_writer import GraphWriter
from dgemma_build.quantize import power_of_two_scale
from dgemma_runtime.contract import FULL, SLIDING, LayerSpec, ModelSpec, cache_dtypes, sliding_slots

SLOT_GROUP = 64
NOWHERE = -1e30  # added to scores of what is not visible; finite, so that a row without context stays a number


_TYPES = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "fp8": TensorProto.FLOAT8E4M3FN}


class Attention(Protocol):
    """One style."""

    def declare(self) -> None:
        """Add the caches to the graph's inputs."""
        ...

    def prepare(self, steps: str, length: str, canvas_column: str) -> None:
        """Once per call: masks, from the tokens' places [L], their number and is_canvas [B, 1]."""
        ...

    def attend(self, index: int, queries: str, keys: str, values: str, key_scale: str) -> str:
        """Of layer `index`: queries [B, heads, L, dim], keys and values [B, kv_heads, L, dim] of the call's tokens.

        Returns [B, heads, L, dim]. `key_scale` is an initializer: by what keys are divided to fit E4M3, if they must.
        """
        ...


class InPlaceCache:
    """Caches [B, kv_heads, S, dim], any S."""

    def __init__(self, w: GraphWriter, spec: ModelSpec, dtype: int) -> None:
        self._w, self._spec, self._dtype = w, spec, dtype
        self._mask: dict[str, str] = {}

    def _shape(self, layer: LayerSpec) -> list[int | str]:
        return ["B", layer.num_key_value_heads, "S_full" if layer.kind == FULL else "S_sliding", layer.head_dim]

    def declare(self) -> None:
        for index, layer in enumerate(self._spec.layers):
            for name in ("key_cache", "value_cache"):
                self._w.input(f"{name}_{index}", self._dtype, self._shape(layer))

    def prepare(self, steps: str, length: str, canvas_column: str) -> None:
        """Additive masks [B, 1, L, S]: a canvas row sees all it was given, an encode row the past."""
        w, dtype = self._w, helper.tensor_dtype_to_np_dtype(self._dtype)
        for kind in sorted({layer.kind for layer in self._spec.layers}):
            index = next(i for i, layer in enumerate(self._spec.layers) if layer.kind == kind)
            slots = w.op("Gather", w.op("Shape", f"key_cache_{index}"), w.const(2))
            slot = w.op("Range", w.const(0), slots, w.const(1))  # [S]
            offset = w.op("Unsqueeze", _offset(kind), w.const([1]))  # [B, 1]
            own = w.op("Add", offset, steps)  # [B, L], the slot each token is written to
            last = w.op("Add", offset, w.op("Sub", length, w.const(1)))
            newest = w.op("Unsqueeze", w.op("Where", canvas_column, last, own), w.const([2]))
            visible = w.op("LessOrEqual", slot, newest)  # [B, L, S]
            if kind == SLIDING:
                behind = w.op("Sub", own, w.const(self._spec.sliding_window))
                oldest = w.op("Unsqueeze", w.op("Where", canvas_column, w.const(-1), behind), w.const([2]))
                visible = w.op("And", visible, w.op("Greater", slot, oldest))
            mask = w.op("Where", visible, w.const(0, dtype), w.const(float("-inf"), dtype))
            self._mask[kind] = w.op("Unsqueeze", mask, w.const([1]))

    def attend(self, index: int, queries: str, keys: str, values: str, key_scale: str) -> str:
        layer, w, caches = self._spec.layers[index], self._w, []
        for name, new in (("key_cache", keys), ("value_cache", values)):
            written = f"{name}_{index}_out"
            w.op("TensorScatter", f"{name}_{index}", new, _offset(layer.kind), axis=-2, to=written)
            w.graph_output(written, self._dtype, self._shape(layer))
            caches.append(written)
        return w.op("Attention", queries, *caches, self._mask[layer.kind], scale=1.0)


class ContextCache:
    """Caches [B, kv_heads, slots, dim] of sliding and [B, kv_heads, S / 64, 64, dim] of full layers.

    `kv_dtype` is that of the manifest; see `contract.cache_dtypes`. In E4M3, keys and values are divided by powers of
    two that their norms cannot exceed. Full layers multiply such values as they are: in more bits they would be a copy.
    `hands_out` is whether the call's own keys and values are outputs.
    """

    def __init__(
        self, w: GraphWriter, spec: ModelSpec, dtype: int, kv_dtype: str, heads: int, hands_out: bool = True
    ) -> None:
        self._w, self._spec, self._heads, self._hands_out = w, spec, heads, hands_out
        self._dtype, self._kv_dtype = dtype, kv_dtype
        self._number = helper.tensor_dtype_to_np_dtype(dtype)
        self._sliding_mask = self._own_mask = self._context_mask = ""

    def declare(self) -> None:
        for index, layer in enumerate(self._spec.layers):
            slots: list[int | str] = ["S_groups", SLOT_GROUP] if layer.kind == FULL else [sliding_slots(self._spec)]
            shape = ["B", layer.num_key_value_heads, *slots, layer.head_dim]
            for name, dtype in zip(("key_cache", "value_cache"), cache_dtypes(self._kv_dtype, layer), strict=True):
                self._w.input(f"{name}_{index}", _TYPES[dtype], shape)

    def prepare(self, steps: str, length: str, canvas_column: str) -> None:
        w = self._w
        canvas = w.op("Unsqueeze", canvas_column, w.const([2]))  # [B, 1, 1]
        query = w.op("Unsqueeze", steps, w.const([1]))  # [L, 1]
        past = w.op("LessOrEqual", steps, query)  # [query, key]
        kinds = {layer.kind for layer in self._spec.layers}
        if FULL in kinds:
            own = w.op("Or", canvas, w.op("Transpose", past, perm=[1, 0]))  # [B, key, query]
            self._own_mask = self._additive(own, np.float32)
            index = next(i for i, layer in enumerate(self._spec.layers) if layer.kind == FULL)
            groups = w.op("Gather", w.op("Shape", f"key_cache_{index}"), w.const(2))
            slot = w.op("Range", w.const(0), w.op("Mul", groups, w.const(SLOT_GROUP)), w.const(1))
            seen = w.op("Less", slot, w.op("Unsqueeze", "position", w.const([1])))  # [B, S]
            self._context_mask = self._additive(w.op("Unsqueeze", seen, w.const([2])), np.float32)  # [B, 1, S, 1]
        if SLIDING in kinds:
            near = w.op("Less", w.op("Sub", query, steps), w.const(self._spec.sliding_window))
            own = w.op("Or", canvas, w.op("And", past, near))  # [B, L, L]
            slot = w.op("Range", w.const(0), w.const(sliding_slots(self._spec)), w.const(1))
            held = w.op("Unsqueeze", "sliding_length", w.const([1, 2]))
            distance = w.op("Sub", w.op("Add", held, query), slot)  # [B, L, slots]
            near = w.op("Or", canvas, w.op("Less", distance, w.const(self._spec.sliding_window)))
            seen = w.op("And", near, w.op("Less", slot, held))
            self._sliding_mask = self._additive(
                w.op("Concat", seen, own, axis=-1), self._number
            )  # [B, 1, L, slots + L]

    def _additive(self, visible: str, dtype: npt.DTypeLike) -> str:
        w = self._w
        return w.op("Unsqueeze", w.op("Where", visible, w.const(0, dtype), w.const(NOWHERE, dtype)), w.const([1]))

    def attend(self, index: int, queries: str, keys: str, values: str, key_scale: str) -> str:
        layer, w = self._spec.layers[index], self._w
        value_scale = w.const(power_of_two_scale(layer.head_dim**0.5), self._number)
        context = []
        given = (("key", keys, key_scale), ("value", values, value_scale))
        for (name, new, scale), dtype in zip(given, cache_dtypes(self._kv_dtype, layer), strict=True):
            cache, out = f"{name}_cache_{index}", f"new_{name}s_{index}"
            if self._hands_out:
                if dtype == "fp8":
                    w.op("QuantizeLinear", new, scale, output_dtype=TensorProto.FLOAT8E4M3FN, to=out)
                else:
                    w.op("Identity", new, to=out)
                w.graph_output(out, _TYPES[dtype], ["B", layer.num_key_value_heads, "L", layer.head_dim])
            context.append(w.op("DequantizeLinear", cache, scale) if dtype == "fp8" else cache)
        if layer.kind == FULL:
            past = [w.op("Reshape", cache, w.const([0, 0, -1, layer.head_dim])) for cache in context]
            return self._written_out(layer, queries, (keys, values), (past[0], past[1]))
        both = [w.op("Concat", *pair, axis=2) for pair in zip(context, (keys, values), strict=True)]
        return w.op("Attention", queries, *both, self._sliding_mask, scale=1.0)

    def _written_out(self, layer: LayerSpec, queries: str, own: tuple[str, str], past: tuple[str, str]) -> str:
        """`own` and `past`: keys and values [B, kv_heads, L or S, dim]."""
        w, kv_heads, dim = self._w, layer.num_key_value_heads, layer.head_dim
        group = self._heads // kv_heads  # query heads of a KV head
        by_group = w.op("Reshape", queries, w.const([0, kv_heads, group, -1, dim]))
        parts = w.ops("Split", by_group, outputs=group, axis=2, num_outputs=group) if group > 1 else [by_group]
        attended: list[str] = []
        for part in parts:
            query = w.op("Squeeze", part, w.const([2]))  # [B, kv_heads, L, dim]
            if attended:
                query = w.op("Add", query, self._zero_after(attended[-1]))
            attended.append(self._one_head(query, own, past))
        heads = [w.op("Unsqueeze", head, w.const([2])) for head in attended]
        return w.op("Reshape", w.op("Concat", *heads, axis=2), w.const([0, self._heads, -1, dim]))

    def _one_head(self, query: str, own: tuple[str, str], past: tuple[str, str]) -> str:
        """Softmax in float32, as in the reference, over scores [B, kv_heads, key, query] in two parts."""
        w, axis = self._w, self._w.const([2])
        turned = w.op("Transpose", query, perm=[0, 1, 3, 2])
        over_past = w.op("Add", self._to_float(w.op("MatMul", past[0], turned)), self._context_mask)
        over_own = w.op("Add", self._to_float(w.op("MatMul", own[0], turned)), self._own_mask)
        greatest = w.op("Max", w.op("ReduceMax", over_past, axis), w.op("ReduceMax", over_own, axis))
        mass, outputs = [], []
        for scores, values in ((over_past, past[1]), (over_own, own[1])):
            weights = w.op("Exp", w.op("Sub", scores, greatest))
            mass.append(w.op("ReduceSum", weights, axis))
            weights = w.op("Transpose", self._from_float(weights), perm=[0, 1, 3, 2])
            if self._kv_dtype == "fp8" and scores == over_past:
                weights = self._narrow(weights)
            outputs.append(w.op("MatMul", weights, values))
        total = self._from_float(w.op("Transpose", w.op("Add", *mass), perm=[0, 1, 3, 2]))
        return w.op("Div", w.op("Add", *outputs), total)

    def _narrow(self, weights: str) -> str:
        """Numbers up to one, rounded to E4M3."""
        scale = self._w.const(power_of_two_scale(1.0), self._number)
        stored = self._w.op("QuantizeLinear", weights, scale, output_dtype=TensorProto.FLOAT8E4M3FN)
        return self._w.op("DequantizeLinear", stored, scale)

    def _to_float(self, value: str) -> str:
        return value if self._dtype == TensorProto.FLOAT else self._w.op("Cast", value, to_=TensorProto.FLOAT)

    def _from_float(self, value: str) -> str:
        return value if self._dtype == TensorProto.FLOAT else self._w.op("Cast", value, to_=self._dtype)

    def _zero_after(self, value: str) -> str:
        """Zero, but not before `value` [B, kv_heads, L, dim] is there."""
        w = self._w
        greatest = w.op("ReduceMax", value, w.const([0, 1, 2, 3]), keepdims=0)
        return w.op("Min", w.op("Abs", greatest), w.const(0, self._number))


def _offset(kind: str) -> str:
    """The graph input that tells how many slots the context takes."""
    return "sliding_length" if kind == SLIDING else "position"
