"""The denoiser as one ONNX graph for encode and denoise. Knows the model's mathematics, no engine library.

Every row of a call has a phase. An encode row is causal, takes the encoder's layer scalars and no
self-conditioning, and goes through no head. A canvas row is bidirectional, takes the decoder's scalars, the
previous step's soft embedding and the head. Rows of both kinds may share a call.

Each layer's keys and values of the context stand in a cache given as input; `attention.py` has two styles of it.
Sliding layers get the tail of the context that their window covers, `sliding_length` tokens, full layers all of it.

Norm weights are folded into the matrices behind them (in float32, before rounding to the graph's precision).

Inputs (B rows, L tokens a row, R canvas rows, S cache slots, H hidden, C = canvas length):
    token_ids       [B, L] int32
    position        [B] int64     tokens of context before this row's first token
    sliding_length  [B] int64     min(position, window - 1): context tokens in the sliding caches
    is_canvas       [B] bool
    canvas_rows     [R] int64     the rows with is_canvas, in order
    soft_embedding  [R, L, H]     of the previous step, zeros at the first
    temperature     [R] float32
    uniforms        [R, L] float32 in [0, 1)
    key_cache_i, value_cache_i   see `attention.py`
Outputs:
    argmax_ids, sampled_ids  [R, L] int32;  entropies [R, L] float32, nats;  next_soft_embedding [R, L, H]
    key_cache_i_out, value_cache_i_out (in place), or new_keys_i, new_values_i [B, kv_heads, L, head_dim]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from dgemma_build import plugin_lowering
from dgemma_build.attention import Attention, ContextCache, InPlaceCache
from dgemma_build.checkpoint import TextConfig
from dgemma_build.head import add_head
from dgemma_build.moe import MOE_LOWERINGS, MoeWeights
from dgemma_build.onnx_writer import Array, GraphWriter, Weight
from dgemma_build.products import Fp8, GroupedIntegers, Int4, Matrix, Plain, Products, rms_bound
from dgemma_build.quantize import GroupFormat, power_of_two_scale
from dgemma_build.tensorrt_llm_experts import mixture_of_experts
from dgemma_runtime.contract import FULL, SLIDING, LayerSpec, cache_dtypes

Float32 = npt.NDArray[np.float32]

_EXPERTS = MOE_LOWERINGS | plugin_lowering.PLUGIN_LOWERINGS | {"tensorrt_llm": mixture_of_experts}
_EMBEDDING_ROWS = 8192  # read at once


@dataclass(frozen=True)
class Lowering:
    """How the graph is written for one backend."""

    moe: str = "grouped"  # a key of MOE_LOWERINGS or PLUGIN_LOWERINGS, or tensorrt_llm
    dtype: int = TensorProto.FLOAT  # of weights and activations; norms' sums, router and head are float32 always
    weights: str = "plain"  # plain, integers, fp8 or int4: of experts, attention and MLP; the rest has `dtype`
    groups: GroupFormat | None = None  # of `integers` and `int4`
    in_place: bool = True  # which style of attention, see `attention.py`
    plugin_head: bool = False  # the fused head of `plugin_lowering.py`
    kv_dtype: str = "fp32"  # of the cache, as in a manifest; that of `dtype` or, if not in place, fp8


def _products(lowering: Lowering) -> Products:
    if lowering.weights == "plain":
        return Plain(lowering.dtype, turned=lowering.in_place)
    if lowering.weights == "fp8":
        return Fp8(lowering.dtype)
    assert lowering.groups, lowering
    return GroupedIntegers(lowering.groups) if lowering.weights == "integers" else Int4(lowering.dtype, lowering.groups)


def layer_output(index: int) -> str:
    """The name of the value that layer `index` makes, [B, L, H]."""
    return f"layers.{index}.output"


class WeightSource(Protocol):
    """Where values come from, by canonical name (see `checkpoint.py`)."""

    def float32(self, name: str) -> Float32:
        """A whole tensor."""
        ...

    def float32_slice(self, name: str, index: int | slice) -> Float32:
        """Part of it, along its first axis."""
        ...


def author_graph(config: TextConfig, source: WeightSource, lowering: Lowering) -> GraphWriter:
    """The whole graph; `source` is read only when the writer's weights are."""
    writer = GraphWriter()
    _DenoiserGraph(config, source, writer, lowering).write()
    return writer


def graph_weights(config: TextConfig, lowering: Lowering) -> list[Weight]:
    """Every weight that a graph has, from the config alone: names, shapes, dtypes."""

    class Nothing:
        def float32(self, name: str) -> Float32:
            raise LookupError(f"{name} was read from a config")

        def float32_slice(self, name: str, index: int | slice) -> Float32:
            raise LookupError(f"{name}[{index}] was read from a config")

    return list(author_graph(config, Nothing(), lowering).weights.values())


class _DenoiserGraph:
    def __init__(self, config: TextConfig, source: WeightSource, writer: GraphWriter, lowering: Lowering) -> None:
        self.source = source
        self.config = config
        self.spec = config.spec
        self.w = writer
        self.lowering = lowering
        self.numpy_dtype = helper.tensor_dtype_to_np_dtype(lowering.dtype)
        self.products = _products(lowering)
        self.attention: Attention
        if lowering.in_place:
            self.attention = InPlaceCache(writer, config.spec, lowering.dtype)
        else:
            heads = config.num_attention_heads
            self.attention = ContextCache(writer, config.spec, lowering.dtype, lowering.kv_dtype, heads)

    # ------------------------------------------------------------ weights

    def load(self, name: str) -> Float32:
        return self.source.float32(name)

    def weight(self, name: str, shape: Sequence[int], load: Callable[[], Float32]) -> str:
        """In the graph's precision."""
        return self.w.weight(name, shape, self.numpy_dtype, lambda: [load().astype(self.numpy_dtype, copy=False)])

    def matmul(self, value: str, name: str, matrix: Matrix, bound: float | None) -> str:
        """`value` times a weight in the lowering's format; see `products.Products`."""
        return self.products.multiply(self.w, value, name, matrix, bound)

    def to_float(self, value: str) -> str:
        return value if self.lowering.dtype == TensorProto.FLOAT else self.w.op("Cast", value, to_=TensorProto.FLOAT)

    def from_float(self, value: str) -> str:
        return value if self.lowering.dtype == TensorProto.FLOAT else self.w.op("Cast", value, to_=self.lowering.dtype)

    def rms_norm(self, value: str, weight: str, dim: int) -> str:
        """RMS norm over the last axis; `weight` is a tensor's name, or "" for none."""
        if weight:
            scale = self.weight(weight, (dim,), lambda: self.load(weight))
        else:
            scale = self.w.const(np.ones(dim), self.numpy_dtype)
        return self.w.op(
            "RMSNormalization", value, scale, axis=-1, epsilon=self.config.rms_norm_eps, stash_type=TensorProto.FLOAT
        )

    # ------------------------------------------------------------ graph

    def write(self) -> None:
        w, spec = self.w, self.spec
        w.input("token_ids", TensorProto.INT32, ["B", "L"])
        w.input("position", TensorProto.INT64, ["B"])
        w.input("sliding_length", TensorProto.INT64, ["B"])
        w.input("is_canvas", TensorProto.BOOL, ["B"])
        w.input("canvas_rows", TensorProto.INT64, ["R"])
        w.input("soft_embedding", self.lowering.dtype, ["R", "L", spec.hidden_size])
        w.input("temperature", TensorProto.FLOAT, ["R"])
        w.input("uniforms", TensorProto.FLOAT, ["R", "L"])
        self.attention.declare()
        self._shared()
        hidden = self._embed()
        for index, layer in enumerate(spec.layers):
            hidden = self._layer(hidden, index, layer)
        self._head(hidden)

    def _shared(self) -> None:
        """Once per call: positions, rotary tables, masks, layer scalars."""
        w = self.w
        length = w.op("Gather", w.op("Shape", "token_ids"), w.const(1))
        steps = w.op("Range", w.const(0), length, w.const(1))  # [L]
        self.canvas_column = w.op("Unsqueeze", "is_canvas", w.const([1]))  # [B, 1]
        start = w.op("Unsqueeze", "position", w.const([1]))
        positions = w.op("Cast", w.op("Add", start, steps), to_=TensorProto.FLOAT)  # [B, L]
        self.rope = {}
        for kind in sorted({layer.kind for layer in self.spec.layers}):
            frequencies = self.config.rope[kind].inverse_frequencies
            table = w.array(f"inverse_frequencies/{kind}", frequencies)
            angles = w.op("Mul", w.op("Unsqueeze", positions, w.const([2])), table)  # [B, L, head_dim / 2]
            self.rope[kind] = tuple(self.from_float(w.op(name, angles)) for name in ("Cos", "Sin"))
        self.attention.prepare(steps, length, self.canvas_column)
        count = len(self.spec.layers)

        def scalars() -> Float32:
            sides = ("encoder", "decoder")
            return np.array([[self.load(f"layers.{i}.{side}_layer_scalar")[0] for i in range(count)] for side in sides])

        phase = w.op("Cast", "is_canvas", to_=TensorProto.INT64)
        per_row = w.op("Gather", self.weight("layer_scalars", (2, count), scalars), phase)  # [B, layers]
        per_row = w.op("Unsqueeze", per_row, w.const([2]))
        self.scalars = w.ops("Split", per_row, outputs=count, axis=1, num_outputs=count)  # each [B, 1, 1]

    def _embed(self) -> str:
        w, spec = self.w, self.spec
        self.embedding = w.weight(
            "embed_tokens.weight", (spec.vocab_size, spec.hidden_size), self.numpy_dtype, self._embedding_rows
        )
        scale = w.const(spec.hidden_size**0.5, self.numpy_dtype)
        tokens = w.op("Mul", w.op("Gather", self.embedding, "token_ids"), scale)  # [B, L, H]
        canvas = w.op("Gather", tokens, "canvas_rows")  # [R, L, H]
        normed = self.rms_norm("soft_embedding", "", spec.hidden_size)
        signal = self._gated_mlp(normed, "self_conditioning", "self_conditioning.pre_norm.weight")
        conditioned = self.rms_norm(w.op("Add", canvas, signal), "", spec.hidden_size)
        return w.op("ScatterND", tokens, w.op("Unsqueeze", "canvas_rows", w.const([1])), conditioned)

    def _embedding_rows(self) -> Iterator[Array]:
        count = self.spec.vocab_size
        for start in range(0, count, _EMBEDDING_ROWS):
            chunk = slice(start, min(start + _EMBEDDING_ROWS, count))
            yield self.source.float32_slice("embed_tokens.weight", chunk).astype(self.numpy_dtype, copy=False)

    def _gated_mlp(self, normed: str, prefix: str, norm: str) -> str:
        """down(gelu(gate(x)) * up(x)) of x = normed times the weight `norm`."""
        inner, hidden = self.config.intermediate_size, self.spec.hidden_size
        matrix = Matrix(hidden, 2 * inner, lambda: self._gate_up(prefix, norm))
        both = self.matmul(normed, f"{prefix}.gate_up", matrix, rms_bound(hidden))
        gate, up = self.w.ops("Split", both, self.w.const([inner, inner]), outputs=2, axis=-1)
        return self._gated_down(gate, up, prefix)

    def _gate_up(self, prefix: str, norm: str) -> list[Float32]:
        parts = [self.load(f"{prefix}.{name}_proj.weight") for name in ("gate", "up")]
        return [np.concatenate(parts) * self.load(norm)]

    def _gated_down(self, gate: str, up: str, prefix: str) -> str:
        gated = self.w.op("Mul", self.w.op("Gelu", gate, approximate="tanh"), up)
        name = f"{prefix}.down_proj.weight"
        matrix = Matrix(self.config.intermediate_size, self.spec.hidden_size, lambda: [self.load(name)])
        return self.matmul(gated, name, matrix, None)

    def _layer(self, hidden: str, index: int, layer: LayerSpec) -> str:
        w, prefix, size = self.w, f"layers.{index}", self.spec.hidden_size
        attended = self._attention(self.rms_norm(hidden, "", size), index, layer)
        hidden = w.op("Add", hidden, self.rms_norm(attended, f"{prefix}.post_attention_layernorm.weight", size))
        normed = self.rms_norm(hidden, "", size)  # dense MLP, router and experts read it through weights of their own
        dense, router_logits = self._mlp_and_router(normed, prefix)
        dense = self.rms_norm(dense, f"{prefix}.post_feedforward_layernorm_1.weight", size)
        sparse = self._moe(normed, router_logits, prefix)
        sparse = self.rms_norm(sparse, f"{prefix}.post_feedforward_layernorm_2.weight", size)
        both = self.rms_norm(w.op("Add", dense, sparse), f"{prefix}.post_feedforward_layernorm.weight", size)
        return w.op("Mul", w.op("Add", hidden, both), self.scalars[index], to=layer_output(index))

    def _attention(self, normed: str, index: int, layer: LayerSpec) -> str:
        w, prefix = self.w, f"layers.{index}.self_attn"
        heads, kv_heads, dim = self.config.num_attention_heads, layer.num_key_value_heads, layer.head_dim
        names = ["q_proj", "k_proj"] + (["v_proj"] if layer.kind == SLIDING else [])
        hidden, width = self.spec.hidden_size, (heads + (len(names) - 1) * kv_heads) * dim

        def matrix() -> list[Float32]:
            parts = [self.load(f"{prefix}.{name}.weight") for name in names]
            return [np.concatenate(parts) * self.load(f"layers.{index}.input_layernorm.weight")]

        projected = self.matmul(normed, f"{prefix}.qkv", Matrix(hidden, width, matrix), rms_bound(hidden))
        by_head = w.op("Reshape", projected, w.const([0, 0, -1, dim]))
        by_head = w.op("Transpose", self.rms_norm(by_head, "", dim), perm=[0, 2, 1, 3])  # [B, heads, L, dim]
        if layer.kind == FULL:  # values are the normed keys without weight and without rotation
            queries_keys = by_head
            _, values = w.ops("Split", by_head, w.const([heads, kv_heads]), outputs=2, axis=1)
        else:
            queries_keys, values = w.ops("Split", by_head, w.const([heads + kv_heads, kv_heads]), outputs=2, axis=1)

        def scale() -> Float32:
            parts = (("q_norm", heads), ("k_norm", kv_heads))
            return np.concatenate([np.tile(self.load(f"{prefix}.{name}.weight"), (n, 1, 1)) for name, n in parts])

        scaled = w.op("Mul", queries_keys, self.weight(f"{prefix}.qk_norm", (heads + kv_heads, 1, dim), scale))
        rotated = w.op("RotaryEmbedding", scaled, *self.rope[layer.kind])
        queries, keys = w.ops("Split", rotated, w.const([heads, kv_heads]), outputs=2, axis=1)
        context = self.attention.attend(index, queries, keys, values, self._key_scale(prefix, layer))
        context = w.op("Reshape", w.op("Transpose", context, perm=[0, 2, 1, 3]), w.const([0, 0, -1]))
        matrix_out = Matrix(heads * dim, hidden, lambda: [self.load(f"{prefix}.o_proj.weight")])
        # a mean of values, whose norms are at most those of their RMS norm
        return self.matmul(context, f"{prefix}.o_proj", matrix_out, rms_bound(dim))

    def _key_scale(self, prefix: str, layer: LayerSpec) -> str:
        """For keys in E4M3: none is longer than sqrt(dim) times its norm's greatest weight."""
        if cache_dtypes(self.lowering.kv_dtype, layer)[0] != "fp8":
            return ""

        def load() -> Float32:
            return power_of_two_scale(rms_bound(layer.head_dim) * np.abs(self.load(f"{prefix}.k_norm.weight")).max())

        return self.weight(f"{prefix}.k_norm.scale", (), load)

    def _mlp_and_router(self, normed: str, prefix: str) -> tuple[str, str]:
        """The dense MLP's output [B, L, H] and the router's logits [B, L, experts]."""
        inner, experts, hidden = self.config.intermediate_size, self.config.num_experts, self.spec.hidden_size
        norm = f"{prefix}.pre_feedforward_layernorm.weight"

        def router() -> Float32:
            scale = self.load(f"{prefix}.router.scale") * np.float32(hidden**-0.5)
            return np.asarray(self.load(f"{prefix}.router.proj.weight") * scale)

        if self.lowering.weights == "plain":  # one product for all three
            both = Matrix(hidden, 2 * inner + experts, lambda: [*self._gate_up(f"{prefix}.mlp", norm), router()])
            product = self.matmul(normed, f"{prefix}.mlp_router", both, None)
            gate, up, logits = self.w.ops("Split", product, self.w.const([inner, inner, experts]), outputs=3, axis=-1)
            return self._gated_down(gate, up, f"{prefix}.mlp"), logits
        # the router is small and decides much: it keeps its precision
        weight = self.weight(f"{prefix}.router", (hidden, experts), lambda: router().T)
        return self._gated_mlp(normed, f"{prefix}.mlp", norm), self.w.op("MatMul", normed, weight)

    def _moe(self, normed: str, router_logits: str, prefix: str) -> str:
        """Experts' weighted sum, [B, L, H]."""
        w, config, hidden = self.w, self.config, self.spec.hidden_size
        flat = w.op("Reshape", normed, w.const([-1, hidden]))
        logits = self.to_float(w.op("Reshape", router_logits, w.const([-1, config.num_experts])))
        top, ids = w.ops("TopK", w.op("Softmax", logits, axis=-1), w.const([config.top_k_experts]), outputs=2, axis=-1)
        share = w.op("Div", top, w.op("ReduceSum", top, w.const([-1])))
        name = f"{prefix}.router.per_expert_scale"
        per_expert = w.weight(name, (config.num_experts,), np.float32, lambda: [self.load(name)])
        share = self.from_float(w.op("Mul", share, w.op("Gather", per_expert, ids)))
        norm = f"{prefix}.pre_feedforward_layernorm_2.weight"
        weights = MoeWeights(
            gate_up=lambda expert: (self.expert(f"{prefix}.experts.gate_up_proj", expert) * self.load(norm)).T,
            down=lambda expert: self.expert(f"{prefix}.experts.down_proj", expert).T,
            num_experts=config.num_experts,
            top_k=config.top_k_experts,
            hidden_size=hidden,
            intermediate_size=config.moe_intermediate_size,
            dtype=self.numpy_dtype,
            matmul=self.matmul,
        )
        mixed = _EXPERTS[self.lowering.moe](w, weights, prefix, flat, ids, share)
        return w.op("Reshape", mixed, w.op("Shape", normed))

    def expert(self, name: str, expert: int) -> Float32:
        return self.source.float32_slice(name, expert)

    def _head(self, hidden: str) -> None:
        w, spec = self.w, self.spec
        canvas = w.op("Gather", hidden, "canvas_rows")
        normed = self.rms_norm(canvas, "norm.weight", spec.hidden_size)
        if self.lowering.plugin_head:
            plugin_lowering.add_head(w, normed, self.embedding, self.config, self.lowering.dtype)
        else:
            add_head(w, normed, self.embedding, self.config, self.lowering.dtype, keep_logits=self.lowering.in_place)
