"""The drafter as an ONNX graph, lowered as the denoiser's is. Knows the network's mathematics, no engine library.

It runs over the denoiser's own rows of caches, those of the layers it reads, in the style of the denoiser's graph. In
place, each of its layers writes its keys and values behind the context, into the places where the denoiser's next step
writes its own before it reads them. Else the caches are only read; in E4M3 they have the denoiser's scales.

Norm weights are folded into the matrices behind them.

Inputs (B rows, S cache slots, C = canvas length):
    last_ids        [B] int32     the token before the canvas
    position        [B] int64     tokens of context
    sliding_length  [B] int64     min(position, window - 1): context tokens in the sliding caches
    key_cache_i, value_cache_i    of the i-th layer that is read, see `attention.py`
Outputs:
    token_ids [B, C] int32;  confidences [B, C] float32, the probability of each
    key_cache_i_out, value_cache_i_out (in place)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from onnx import TensorProto, helper

from dgemma_build.attention import Attention, ContextCache, InPlaceCache
from dgemma_build.drafter.config import DrafterConfig
from dgemma_build.graph import Lowering, WeightSource
from dgemma_build.onnx_writer import Array, GraphWriter, Weight
from dgemma_build.products import Float32, Matrix, Plain, rms_bound
from dgemma_build.quantize import power_of_two_scale
from dgemma_build.text_config import TextConfig
from dgemma_runtime.contract import LayerSpec, cache_dtypes

_EMBEDDING, _EMBEDDING_ROWS = "embed_tokens.weight", 8192  # rows read at once


class DrafterWeights(Protocol):
    """The drafter's tensors by name."""

    def float32(self, name: str) -> Float32: ...


def author_drafter(
    config: DrafterConfig,
    denoiser: TextConfig,
    weights: DrafterWeights,
    source: WeightSource,
    lowering: Lowering | None = None,
) -> GraphWriter:
    """The whole graph; `weights` and the denoiser's, `source`, are read only when the writer's weights are.

    `lowering` is that of a denoiser with plain weights; ONNX Runtime's without.
    """
    writer = GraphWriter()
    _DrafterGraph(config, denoiser, weights, source, writer, lowering or Lowering()).write()
    return writer


def drafter_weights(config: DrafterConfig, denoiser: TextConfig, lowering: Lowering | None = None) -> list[Weight]:
    """Every weight that the graph has, from the configs alone."""

    class Nothing:
        def float32(self, name: str) -> Float32:
            raise LookupError(f"{name} was read from a config")

        def float32_slice(self, name: str, index: int | slice) -> Float32:
            raise LookupError(f"{name}[{index}] was read from a config")

    return list(author_drafter(config, denoiser, Nothing(), Nothing(), lowering).weights.values())


class _DrafterGraph:
    def __init__(
        self,
        config: DrafterConfig,
        denoiser: TextConfig,
        weights: DrafterWeights,
        source: WeightSource,
        writer: GraphWriter,
        lowering: Lowering,
    ) -> None:
        self.config, self.denoiser, self.spec = config, denoiser, config.spec(denoiser)
        self.weights, self.source, self.w, self.lowering = weights, source, writer, lowering
        self.number = helper.tensor_dtype_to_np_dtype(lowering.dtype)
        self.products = Plain(lowering.dtype, turned=lowering.in_place)
        self.attention: Attention = InPlaceCache(writer, self.spec, lowering.dtype)
        if not lowering.in_place:
            heads = config.num_attention_heads
            self.attention = ContextCache(writer, self.spec, lowering.dtype, lowering.kv_dtype, heads, hands_out=False)

    def write(self) -> None:
        w, length = self.w, self.config.canvas_length
        w.input("last_ids", TensorProto.INT32, ["B"])
        w.input("position", TensorProto.INT64, ["B"])
        w.input("sliding_length", TensorProto.INT64, ["B"])
        self.attention.declare()
        steps = w.array("offsets", np.arange(length))  # [C]
        start = w.op("Unsqueeze", "position", w.const([1]))
        places = w.op("Cast", w.op("Add", start, steps), to_=TensorProto.FLOAT)  # [B, C]
        self.rope = {}
        for kind in sorted({layer.kind for layer in self.spec.layers}):
            table = w.array(f"inverse_frequencies/{kind}", self.denoiser.rope[kind].inverse_frequencies)
            angles = w.op("Mul", w.op("Unsqueeze", places, w.const([2])), table)
            self.rope[kind] = tuple(self._rounded(w.op(name, angles)) for name in ("Cos", "Sin"))
        everywhere = w.op("GreaterOrEqual", start, w.const(0))  # every row is a canvas, [B, 1]
        self.attention.prepare(steps, w.const(length), everywhere)
        hidden = self._start()
        for index, layer in enumerate(self.spec.layers):
            hidden = self._layer(hidden, index, layer)
        self._head(hidden)

    # ------------------------------------------------------------ weights

    def _weight(self, name: str, shape: Sequence[int]) -> str:
        return self.w.weight(name, shape, self.number, lambda: [self._number_of(self.weights.float32(name))])

    def _number_of(self, values: Float32) -> Array:
        """In the graph's precision."""
        return values.astype(self.number, copy=False)

    def _rounded(self, value: str) -> str:
        return value if self.lowering.dtype == TensorProto.FLOAT else self.w.op("Cast", value, to_=self.lowering.dtype)

    def _matmul(self, value: str, name: str, inputs: int, outputs: int, norm: str = "") -> str:
        """`value` times a weight, which takes in that of the norm before it."""
        matrix = Matrix(inputs, outputs, lambda: [self._folded(f"{name}.weight", norm)])
        return self.products.multiply(self.w, value, f"{name}.weight", matrix, None)

    def _folded(self, name: str, norm: str) -> Float32:
        weight = self.weights.float32(name)
        return np.asarray(weight * self.weights.float32(f"{norm}.weight")) if norm else weight

    def _embedding_rows(self) -> Iterator[Array]:
        count = self.config.vocab_size
        for start in range(0, count, _EMBEDDING_ROWS):
            rows = slice(start, min(start + _EMBEDDING_ROWS, count))
            yield self._number_of(self.source.float32_slice(_EMBEDDING, rows))

    def _rms_norm(self, value: str, dim: int, norm: str = "") -> str:
        scale = self._weight(f"{norm}.weight", (dim,)) if norm else self.w.const(np.ones(dim), self.number)
        eps = self.denoiser.rms_norm_eps
        return self.w.op("RMSNormalization", value, scale, axis=-1, epsilon=eps, stash_type=TensorProto.FLOAT)

    # ------------------------------------------------------------ graph

    def _start(self) -> str:
        w, config = self.w, self.config
        theirs, ours = config.denoiser_hidden_size, config.hidden_size
        self.embedding = w.weight(_EMBEDDING, (config.vocab_size, theirs), self.number, self._embedding_rows)
        embedded = w.op("Mul", w.op("Gather", self.embedding, "last_ids"), w.const(theirs**0.5, self.number))
        last = self._matmul(embedded, "last_token_proj", theirs, ours)  # [B, hidden]
        offsets = self._weight("offset_embedding", (config.canvas_length, ours))
        return w.op("Add", offsets, w.op("Unsqueeze", last, w.const([1])))  # [B, C, hidden]

    def _layer(self, hidden: str, index: int, layer: LayerSpec) -> str:
        w, config, prefix = self.w, self.config, f"layers.{index}"
        size, inner = config.hidden_size, config.intermediate_size
        attended = self._rms_norm(self._attention(hidden, index, layer), size, f"{prefix}.post_attention_norm")
        hidden = w.op("Add", hidden, attended)
        normed = self._rms_norm(hidden, size)
        both = self._matmul(normed, f"{prefix}.gate_up_proj", size, 2 * inner, f"{prefix}.pre_mlp_norm")
        gate, up = w.ops("Split", both, w.const([inner, inner]), outputs=2, axis=-1)
        gated = w.op("Mul", w.op("Gelu", gate, approximate="tanh"), up)
        down = self._matmul(gated, f"{prefix}.down_proj", inner, size)
        return w.op("Add", hidden, self._rms_norm(down, size, f"{prefix}.post_mlp_norm"))

    def _attention(self, hidden: str, index: int, layer: LayerSpec) -> str:
        w, prefix, size, dim = self.w, f"layers.{index}", self.config.hidden_size, layer.head_dim
        heads, kv_heads = self.config.num_attention_heads, layer.num_key_value_heads
        width = (heads + 2 * kv_heads) * dim
        normed = self._rms_norm(hidden, size)
        projected = self._matmul(normed, f"{prefix}.qkv_proj", size, width, f"{prefix}.input_norm")
        by_head = w.op("Reshape", projected, w.const([0, 0, -1, dim]))
        by_head = w.op("Transpose", self._rms_norm(by_head, dim), perm=[0, 2, 1, 3])  # [B, heads, C, dim]
        queries_keys, values = w.ops("Split", by_head, w.const([heads + kv_heads, kv_heads]), outputs=2, axis=1)
        scale = self._query_key_scale(prefix, heads, kv_heads, dim)
        rotated = w.op("RotaryEmbedding", w.op("Mul", queries_keys, scale), *self.rope[layer.kind])
        queries, keys = w.ops("Split", rotated, w.const([heads, kv_heads]), outputs=2, axis=1)
        context = self.attention.attend(index, queries, keys, values, self._key_scale(index, layer))
        context = w.op("Reshape", w.op("Transpose", context, perm=[0, 2, 1, 3]), w.const([0, 0, -1]))
        return self._matmul(context, f"{prefix}.o_proj", heads * dim, size)

    def _query_key_scale(self, prefix: str, heads: int, kv_heads: int, dim: int) -> str:
        def load() -> list[Array]:
            parts = (("q_norm", heads), ("k_norm", kv_heads))
            tiled = [np.tile(self.weights.float32(f"{prefix}.{name}.weight"), (n, 1, 1)) for name, n in parts]
            return [self._number_of(np.concatenate(tiled))]

        return self.w.weight(f"{prefix}.qk_norm", (heads + kv_heads, 1, dim), self.number, load)

    def _key_scale(self, index: int, layer: LayerSpec) -> str:
        """By what the denoiser divided the keys in the cache, if it did."""
        if cache_dtypes(self.lowering.kv_dtype, layer)[0] != "fp8":
            return ""
        norm = f"layers.{self.config.reads[index]}.self_attn.k_norm.weight"

        def load() -> list[Array]:
            greatest = rms_bound(layer.head_dim) * np.abs(self.source.float32(norm)).max()
            return [self._number_of(power_of_two_scale(greatest))]

        return self.w.weight(f"layers.{index}.key_cache.scale", (), self.number, load)

    def _head(self, hidden: str) -> None:
        w, config, cap = self.w, self.config, self.denoiser.final_logit_softcapping
        f32, length = np.float32, config.canvas_length
        normed = self._rms_norm(hidden, config.hidden_size)
        projected = self._matmul(normed, "output_proj", config.hidden_size, config.denoiser_hidden_size, "norm")
        flat = w.op("Reshape", projected, w.const([-1, config.denoiser_hidden_size]))
        raw = w.op("MatMul", flat, w.op("Transpose", self.embedding, perm=[1, 0]))  # [B * C, V]
        if self.lowering.dtype != TensorProto.FLOAT:
            raw = w.op("Cast", raw, to_=TensorProto.FLOAT)
        logits = w.op("Mul", w.op("Tanh", w.op("Mul", raw, w.const(1 / cap, f32))), w.const(cap, f32))
        top, argmax = w.ops("TopK", logits, w.const([1]), outputs=2, axis=-1)
        others = w.op("ReduceSum", w.op("Exp", w.op("Sub", logits, top)), w.const([1]))
        shape = w.const([-1, length])
        w.op("Cast", w.op("Reshape", argmax, shape), to_=TensorProto.INT32, to="token_ids")
        w.graph_output("token_ids", TensorProto.INT32, ["B", length])
        w.op("Reshape", w.op("Reciprocal", others), shape, to="confidences")
        w.graph_output("confidences", TensorProto.FLOAT, ["B", length])
