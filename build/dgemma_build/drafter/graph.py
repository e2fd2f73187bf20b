"""The drafter as an ONNX graph for ONNX Runtime. Knows the network's mathematics, no engine library.

It runs over the denoiser's own rows of caches, those of the layers it reads. Each of its layers writes its keys and
values behind the context, into the places where the denoiser's next step writes its own before it reads them.

Norm weights are folded into the matrices behind them.

Inputs (B rows, S cache slots, C = canvas length):
    last_ids        [B] int32     the token before the canvas
    position        [B] int64     tokens of context
    sliding_length  [B] int64     min(position, window - 1): context tokens in the sliding caches
    key_cache_i, value_cache_i    [B, kv_heads, S, head_dim] of the i-th layer that is read
Outputs:
    token_ids [B, C] int32;  confidences [B, C] float32, the probability of each;  key_cache_i_out, value_cache_i_out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from onnx import TensorProto

from dgemma_build.attention import InPlaceCache
from dgemma_build.drafter.config import DrafterConfig
from dgemma_build.onnx_writer import Array, GraphWriter, Weight
from dgemma_build.products import Float32, Matrix, Plain
from dgemma_build.text_config import TextConfig
from dgemma_runtime.contract import LayerSpec

_EMBEDDING, _EMBEDDING_ROWS = "embed_tokens.weight", 8192  # rows read at once


class DrafterWeights(Protocol):
    """The drafter's tensors by name."""

    def float32(self, name: str) -> Float32: ...


class Embedding(Protocol):
    """The denoiser's weights."""

    def float32_slice(self, name: str, index: int | slice) -> Float32: ...


def author_drafter(
    config: DrafterConfig, denoiser: TextConfig, weights: DrafterWeights, embedding: Embedding
) -> GraphWriter:
    """The whole graph; `weights` and `embedding` are read only when the writer's weights are."""
    writer = GraphWriter()
    _DrafterGraph(config, denoiser, weights, embedding, writer).write()
    return writer


def drafter_weights(config: DrafterConfig, denoiser: TextConfig) -> list[Weight]:
    """Every weight that the graph has, from the configs alone."""

    class Nothing:
        def float32(self, name: str) -> Float32:
            raise LookupError(f"{name} was read from a config")

        def float32_slice(self, name: str, index: int | slice) -> Float32:
            raise LookupError(f"{name}[{index}] was read from a config")

    return list(author_drafter(config, denoiser, Nothing(), Nothing()).weights.values())


class _DrafterGraph:
    def __init__(
        self,
        config: DrafterConfig,
        denoiser: TextConfig,
        weights: DrafterWeights,
        embedding: Embedding,
        writer: GraphWriter,
    ) -> None:
        self.config, self.denoiser, self.spec = config, denoiser, config.spec(denoiser)
        self.weights, self.source, self.w = weights, embedding, writer
        self.attention = InPlaceCache(writer, self.spec, TensorProto.FLOAT)
        self.products = Plain(TensorProto.FLOAT, turned=True)

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
            self.rope[kind] = (w.op("Cos", angles), w.op("Sin", angles))
        everywhere = w.op("GreaterOrEqual", start, w.const(0))  # every row is a canvas, [B, 1]
        self.attention.prepare(steps, w.const(length), everywhere)
        hidden = self._start()
        for index, layer in enumerate(self.spec.layers):
            hidden = self._layer(hidden, index, layer)
        self._head(hidden)

    # ------------------------------------------------------------ weights

    def _weight(self, name: str, shape: Sequence[int]) -> str:
        return self.w.weight(name, shape, np.float32, lambda: [self.weights.float32(name)])

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
            yield self.source.float32_slice(_EMBEDDING, slice(start, min(start + _EMBEDDING_ROWS, count)))

    def _rms_norm(self, value: str, dim: int, norm: str = "") -> str:
        scale = self._weight(f"{norm}.weight", (dim,)) if norm else self.w.const(np.ones(dim), np.float32)
        eps = self.denoiser.rms_norm_eps
        return self.w.op("RMSNormalization", value, scale, axis=-1, epsilon=eps, stash_type=TensorProto.FLOAT)

    # ------------------------------------------------------------ graph

    def _start(self) -> str:
        w, config = self.w, self.config
        theirs, ours = config.denoiser_hidden_size, config.hidden_size
        self.embedding = w.weight(_EMBEDDING, (config.vocab_size, theirs), np.float32, self._embedding_rows)
        embedded = w.op("Mul", w.op("Gather", self.embedding, "last_ids"), w.const(theirs**0.5, np.float32))
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
        context = self.attention.attend(index, queries, keys, values, "")
        context = w.op("Reshape", w.op("Transpose", context, perm=[0, 2, 1, 3]), w.const([0, 0, -1]))
        return self._matmul(context, f"{prefix}.o_proj", heads * dim, size)

    def _query_key_scale(self, prefix: str, heads: int, kv_heads: int, dim: int) -> str:
        def load() -> list[Float32]:
            parts = (("q_norm", heads), ("k_norm", kv_heads))
            tiled = [np.tile(self.weights.float32(f"{prefix}.{name}.weight"), (n, 1, 1)) for name, n in parts]
            return [np.concatenate(tiled)]

        return self.w.weight(f"{prefix}.qk_norm", (heads + kv_heads, 1, dim), np.float32, load)

    def _head(self, hidden: str) -> None:
        w, config, cap = self.w, self.config, self.denoiser.final_logit_softcapping
        f32, length = np.float32, config.canvas_length
        normed = self._rms_norm(hidden, config.hidden_size)
        projected = self._matmul(normed, "output_proj", config.hidden_size, config.denoiser_hidden_size, "norm")
        flat = w.op("Reshape", projected, w.const([-1, config.denoiser_hidden_size]))
        raw = w.op("MatMul", flat, w.op("Transpose", self.embedding, perm=[1, 0]))  # [B * C, V]
        logits = w.op("Mul", w.op("Tanh", w.op("Mul", raw, w.const(1 / cap, f32))), w.const(cap, f32))
        top, argmax = w.ops("TopK", logits, w.const([1]), outputs=2, axis=-1)
        others = w.op("ReduceSum", w.op("Exp", w.op("Sub", logits, top)), w.const([1]))
        shape = w.const([-1, length])
        w.op("Cast", w.op("Reshape", argmax, shape), to_=TensorProto.INT32, to="token_ids")
        w.graph_output("token_ids", TensorProto.INT32, ["B", length])
        w.op("Reshape", w.op("Reciprocal", others), shape, to="confidences")
        w.graph_output("confidences", TensorProto.FLOAT, ["B", length])
