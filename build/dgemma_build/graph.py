"""The denoiser as one ONNX graph for encode and denoise. Knows the model's mathematics, no engine library.

Every row of a call has a phase. An encode row is causal, takes the encoder's layer scalars and no
self-conditioning, and goes through no head. A canvas row is bidirectional, takes the decoder's scalars, the
previous step's soft embedding and the head. Rows of both kinds may share a call.

Each layer's keys and values stand in a cache given as input, context first. The call writes its own tokens behind
the context and returns the cache; an engine binds input and output to the same memory, so nothing is copied.
Sliding layers get the tail of the context that their window covers, `sliding_length` tokens, full layers all of it.

Norm weights are folded into the matrices behind them (in float32, before rounding to the graph's precision).

Inputs (B rows, L tokens a row, R canvas rows, S cache slots, H hidden, C = canvas length):
    token_ids       [B, L] int32
    position        [B] int64     tokens of context before this row's first token
    sliding_length  [B] int64     min(position, what the window needs): context tokens in the sliding caches
    is_canvas       [B] bool
    canvas_rows     [R] int64     the rows with is_canvas, in order
    soft_embedding  [R, L, H]     of the previous step, zeros at the first
    temperature     [R] float32
    uniforms        [R, L] float32 in [0, 1)
    key_cache_i, value_cache_i   [B, kv_heads, S, head_dim]
Outputs:
    argmax_ids, sampled_ids  [R, L] int32;  entropies [R, L] float32, nats;  next_soft_embedding [R, L, H]
    key_cache_i_out, value_cache_i_out
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from dgemma_build.checkpoint import TextConfig
from dgemma_build.head import add_head
from dgemma_build.moe import MOE_LOWERINGS, MoeWeights
from dgemma_build.onnx_writer import Array, GraphWriter, Weight
from dgemma_build.quantize import GroupFormat, Quantized, quantize
from dgemma_runtime.contract import FULL, SLIDING, LayerSpec

Float32 = npt.NDArray[np.float32]

_EMBEDDING_ROWS = 8192  # read at once


@dataclass(frozen=True)
class Lowering:
    """How the graph is written for one backend."""

    moe: str = "grouped"  # a key of MOE_LOWERINGS
    dtype: int = TensorProto.FLOAT  # of weights and activations; norms' sums, router and head are float32 always
    cache_slots: tuple[int, int] | None = None  # fixed slots of sliding and full caches; dynamic without
    quantized: GroupFormat | None = None  # of the matrices of experts, attention and MLP; the rest has `dtype`


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


class _Remembered:
    """One quantized matrix between the writing of its integers and of its scales, the next weight of the file."""

    def __init__(self, make: Callable[[], Quantized]) -> None:
        self._make = make
        self._kept: Quantized | None = None

    def get(self) -> Quantized:
        self._kept = self._make()
        return self._kept

    def take(self) -> Quantized:
        """The last time it is asked for; made again where a resumed build had its integers already."""
        kept, self._kept = self._kept, None
        return kept or self._make()


class _DenoiserGraph:
    def __init__(self, config: TextConfig, source: WeightSource, writer: GraphWriter, lowering: Lowering) -> None:
        self.source = source
        self.config = config
        self.spec = config.spec
        self.w = writer
        self.lowering = lowering
        self.numpy_dtype = helper.tensor_dtype_to_np_dtype(lowering.dtype)

    # ------------------------------------------------------------ weights

    def load(self, name: str) -> Float32:
        return self.source.float32(name)

    def weight(self, name: str, shape: Sequence[int], load: Callable[[], Float32]) -> str:
        """In the graph's precision."""
        return self.w.weight(name, shape, self.numpy_dtype, lambda: [load().astype(self.numpy_dtype, copy=False)])

    def matmul(self, value: str, name: str, shape: tuple[int, int], load: Callable[[], Float32]) -> str:
        """`value` times a weight [in, out], which is quantized where the lowering says so."""
        form = self.lowering.quantized
        if form is None:
            return self.w.op("MatMul", value, self.weight(name, shape, load))
        inputs, outputs = shape
        quantized = _Remembered(lambda: quantize(load(), form))
        packed = self.w.weight(
            f"{name}.packed", form.packed_shape(inputs, outputs), np.uint8, lambda: [quantized.get().packed]
        )
        scales = self.w.weight(
            f"{name}.scales", (outputs, form.groups(inputs)), np.float32, lambda: [quantized.take().scales]
        )
        sizes: dict[str, Any] = {"K": inputs, "N": outputs, "bits": form.bits, "block_size": form.group_size}
        return self.w.op("MatMulNBits", value, packed, scales, domain="com.microsoft", accuracy_level=1, **sizes)

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
        for index, layer in enumerate(spec.layers):
            for name in ("key_cache", "value_cache"):
                w.input(f"{name}_{index}", self.lowering.dtype, self._cache_shape(layer))
        self._shared()
        hidden = self._embed()
        for index, layer in enumerate(spec.layers):
            hidden = self._layer(hidden, index, layer)
        self._head(hidden)

    def _cache_shape(self, layer: LayerSpec) -> list[int | str]:
        slots: tuple[int | str, int | str] = self.lowering.cache_slots or ("S_sliding", "S_full")
        return ["B", layer.num_key_value_heads, slots[layer.kind == FULL], layer.head_dim]

    def _shared(self) -> None:
        """Once per call: positions, rotary tables, masks, write offsets, layer scalars."""
        w = self.w
        length = w.op("Gather", w.op("Shape", "token_ids"), w.const(1))
        steps = w.op("Range", w.const(0), length, w.const(1))  # [L]
        self.canvas_column = w.op("Unsqueeze", "is_canvas", w.const([1]))  # [B, 1]
        start = w.op("Unsqueeze", "position", w.const([1]))
        positions = w.op("Cast", w.op("Add", start, steps), to_=TensorProto.FLOAT)  # [B, L]
        self.rope, self.mask, self.offset = {}, {}, {}
        for kind in sorted({layer.kind for layer in self.spec.layers}):
            frequencies = self.config.rope[kind].inverse_frequencies
            table = w.array(f"inverse_frequencies/{kind}", frequencies)
            angles = w.op("Mul", w.op("Unsqueeze", positions, w.const([2])), table)  # [B, L, head_dim / 2]
            self.rope[kind] = tuple(self.from_float(w.op(name, angles)) for name in ("Cos", "Sin"))
            self.offset[kind] = "sliding_length" if kind == SLIDING else "position"
            self.mask[kind] = self._mask(kind, steps, length)
        count = len(self.spec.layers)

        def scalars() -> Float32:
            sides = ("encoder", "decoder")
            return np.array([[self.load(f"layers.{i}.{side}_layer_scalar")[0] for i in range(count)] for side in sides])

        phase = w.op("Cast", "is_canvas", to_=TensorProto.INT64)
        per_row = w.op("Gather", self.weight("layer_scalars", (2, count), scalars), phase)  # [B, layers]
        per_row = w.op("Unsqueeze", per_row, w.const([2]))
        self.scalars = w.ops("Split", per_row, outputs=count, axis=1, num_outputs=count)  # each [B, 1, 1]

    def _mask(self, kind: str, steps: str, length: str) -> str:
        """Additive mask [B, 1, L, S] over cache slots: a canvas row sees all it was given, an encode row the past."""
        w = self.w
        index = next(i for i, layer in enumerate(self.spec.layers) if layer.kind == kind)
        slots = w.op("Gather", w.op("Shape", f"key_cache_{index}"), w.const(2))
        slot = w.op("Range", w.const(0), slots, w.const(1))  # [S]
        offset = w.op("Unsqueeze", self.offset[kind], w.const([1]))  # [B, 1]
        own = w.op("Add", offset, steps)  # [B, L], the slot each token is written to
        last = w.op("Add", offset, w.op("Sub", length, w.const(1)))
        newest = w.op("Unsqueeze", w.op("Where", self.canvas_column, last, own), w.const([2]))
        visible = w.op("LessOrEqual", slot, newest)  # [B, L, S]
        if kind == SLIDING:
            behind = w.op("Sub", own, w.const(self.spec.sliding_window))
            oldest = w.op("Unsqueeze", w.op("Where", self.canvas_column, w.const(-1), behind), w.const([2]))
            visible = w.op("And", visible, w.op("Greater", slot, oldest))
        dtype = self.numpy_dtype
        mask = w.op("Where", visible, w.const(0, dtype), w.const(float("-inf"), dtype))
        return w.op("Unsqueeze", mask, w.const([1]))

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
        inner = self.config.intermediate_size

        def matrix() -> Float32:
            parts = [self.load(f"{prefix}.{name}_proj.weight") for name in ("gate", "up")]
            return (np.concatenate(parts) * self.load(norm)).T

        both = self.matmul(normed, f"{prefix}.gate_up", (self.spec.hidden_size, 2 * inner), matrix)
        gate, up = self.w.ops("Split", both, self.w.const([inner, inner]), outputs=2, axis=-1)
        return self._gated_down(gate, up, prefix)

    def _gated_down(self, gate: str, up: str, prefix: str) -> str:
        gated = self.w.op("Mul", self.w.op("Gelu", gate, approximate="tanh"), up)
        name, shape = f"{prefix}.down_proj.weight", (self.config.intermediate_size, self.spec.hidden_size)
        return self.matmul(gated, name, shape, lambda: self.load(name).T)

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
        return w.op("Mul", w.op("Add", hidden, both), self.scalars[index])

    def _attention(self, normed: str, index: int, layer: LayerSpec) -> str:
        w, prefix = self.w, f"layers.{index}.self_attn"
        heads, kv_heads, dim = self.config.num_attention_heads, layer.num_key_value_heads, layer.head_dim
        names = ["q_proj", "k_proj"] + (["v_proj"] if layer.kind == SLIDING else [])
        hidden, width = self.spec.hidden_size, (heads + (len(names) - 1) * kv_heads) * dim

        def matrix() -> Float32:
            parts = [self.load(f"{prefix}.{name}.weight") for name in names]
            return (np.concatenate(parts) * self.load(f"layers.{index}.input_layernorm.weight")).T

        projected = self.matmul(normed, f"{prefix}.qkv", (hidden, width), matrix)
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
        caches = []
        for name, new in (("key_cache", keys), ("value_cache", values)):
            written = f"{name}_{index}_out"
            w.op("TensorScatter", f"{name}_{index}", new, self.offset[layer.kind], axis=-2, to=written)
            w.graph_output(written, self.lowering.dtype, self._cache_shape(layer))
            caches.append(written)
        context = w.op("Attention", queries, *caches, self.mask[layer.kind], scale=1.0)
        context = w.op("Reshape", w.op("Transpose", context, perm=[0, 2, 1, 3]), w.const([0, 0, -1]))
        return self.matmul(
            context, f"{prefix}.o_proj", (heads * dim, hidden), lambda: self.load(f"{prefix}.o_proj.weight").T
        )

    def _mlp_and_router(self, normed: str, prefix: str) -> tuple[str, str]:
        """The dense MLP's output [B, L, H] and the router's logits [B, L, experts]."""
        inner, experts, hidden = self.config.intermediate_size, self.config.num_experts, self.spec.hidden_size

        def gate_up() -> Float32:
            norm = self.load(f"{prefix}.pre_feedforward_layernorm.weight")
            parts = [self.load(f"{prefix}.mlp.{name}_proj.weight") for name in ("gate", "up")]
            return (np.concatenate(parts) * norm).T

        def router() -> Float32:
            scale = self.load(f"{prefix}.router.scale") * np.float32(hidden**-0.5)
            return (self.load(f"{prefix}.router.proj.weight") * scale).T

        if self.lowering.quantized:  # the router is small and decides much: it keeps its precision
            logits = self.w.op("MatMul", normed, self.weight(f"{prefix}.router", (hidden, experts), router))
            both = self.matmul(normed, f"{prefix}.mlp.gate_up", (hidden, 2 * inner), gate_up)
            gate, up = self.w.ops("Split", both, self.w.const([inner, inner]), outputs=2, axis=-1)
        else:  # one product for all three
            name, shape = f"{prefix}.mlp_router", (hidden, 2 * inner + experts)
            product = self.matmul(normed, name, shape, lambda: np.concatenate([gate_up(), router()], axis=1))
            gate, up, logits = self.w.ops("Split", product, self.w.const([inner, inner, experts]), outputs=3, axis=-1)
        return self._gated_down(gate, up, f"{prefix}.mlp"), logits

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
            gate_up=lambda expert: np.multiply(
                self.expert(f"{prefix}.experts.gate_up_proj", expert).T, self.load(norm)[:, None], order="C"
            ),
            down=lambda expert: self.expert(f"{prefix}.experts.down_proj", expert).T,
            num_experts=config.num_experts,
            top_k=config.top_k_experts,
            hidden_size=hidden,
            intermediate_size=config.moe_intermediate_size,
            dtype=self.numpy_dtype,
            matmul=self.matmul,
        )
        mixed = MOE_LOWERINGS[self.lowering.moe](w, weights, prefix, flat, ids, share)
        return w.op("Reshape", mixed, w.op("Shape", normed))

    def expert(self, name: str, expert: int) -> Float32:
        return self.source.float32_slice(name, expert)

    def _head(self, hidden: str) -> None:
        w, spec = self.w, self.spec
        canvas = w.op("Gather", hidden, "canvas_rows")
        normed = self.rms_norm(canvas, "norm.weight", spec.hidden_size)
        add_head(w, normed, self.embedding, self.config, self.lowering.dtype)
