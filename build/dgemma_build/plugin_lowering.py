"""Parts of the graph as nodes that TensorRT finds its plugins by: the head, the experts, attention over pages.

Knows the operations by name (`kernels.operations` has what they do) and needs neither torch nor Triton nor TensorRT:
those are for the build of the engine, which registers the plugins first (`kernels.plugins.register`).

A node has the plugin's name, its namespace and version, and `aot`, which asks for the kernel compiled ahead of time.
What one kernel leaves for the next are ordinary tensors between nodes, so TensorRT plans their memory with all other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from dgemma_build.checkpoint import TextConfig
from dgemma_build.moe import Float32, MoeWeights
from dgemma_build.onnx_writer import Array, GraphWriter
from dgemma_build.quantize import GroupFormat, quantize_rows, to_fp8
from dgemma_runtime.errors import ConfigurationError

NAMESPACE = "dgemma"
TYPE_IDS = {"fp32": 0, "fp16": 1, "bf16": 7}  # TensorRT's numbers of types
_OF_ONNX: dict[int, int] = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 1, TensorProto.BFLOAT16: 7}


def _plugin(w: GraphWriter, name: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
    named: dict[str, Any] = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
    return w.ops(name, *inputs, outputs=outputs, domain=NAMESPACE, **named, **attributes)


# ---------------------------------------------------------------- head


def add_head(w: GraphWriter, normed: str, embedding: str, config: TextConfig, dtype: int) -> None:
    """In place of `head.add_head`: the same outputs over the same inputs, logits nowhere.

    A call without canvas rows has one row of zeros here, as a kernel cannot be launched over nothing.
    """
    hidden, cap = config.spec.hidden_size, float(config.final_logit_softcapping)
    shape = w.op("Shape", "uniforms")  # [R, L]
    count = w.op("Mul", w.op("Gather", shape, w.const([0])), w.op("Gather", shape, w.const([1])))
    missing = w.op("Max", w.op("Sub", w.const([1]), count), w.const([0]))  # [1]

    def filled(rows: str, value: float, kind: npt.DTypeLike, *, wide: bool) -> str:
        none = w.const([0])
        ends = [none, none, missing, none] if wide else [none, missing]
        return w.op("Pad", rows, w.op("Concat", *ends, axis=0), w.const(value, kind))

    element = helper.tensor_dtype_to_np_dtype(dtype)
    flat = filled(w.op("Reshape", normed, w.const([-1, hidden])), 0, element, wide=True)
    per_row = w.op("Expand", w.op("Unsqueeze", "temperature", w.const([1])), shape)
    temperature = filled(w.op("Reshape", per_row, w.const([-1])), 1, np.float32, wide=False)
    uniforms = filled(w.op("Reshape", "uniforms", w.const([-1])), 0, np.float32, wide=False)

    read = (flat, embedding, temperature)
    relative, *statistics = _plugin(w, "head_tiles", *read, outputs=5, cap=cap)
    chosen = _plugin(w, "head_choose", *read, uniforms, *statistics, outputs=4, cap=cap)
    [part] = _plugin(w, "head_soft", relative, chosen[3], embedding, outputs=1)
    [soft] = _plugin(w, "head_sum", part, outputs=1, scale=hidden**0.5, type_id=_OF_ONNX[dtype])

    def output(rows: str, name: str, kind: int, *wide: int) -> None:
        kept = w.op("Slice", rows, w.const([0]), count, w.const([0]))
        full = w.op("Concat", shape, w.const(list(wide)), axis=0) if wide else shape
        w.op("Reshape", kept, full, allowzero=1, to=name)
        w.graph_output(name, kind, ["R", "L", *wide])

    output(chosen[0], "argmax_ids", TensorProto.INT32)
    output(chosen[2], "entropies", TensorProto.FLOAT)
    output(chosen[1], "sampled_ids", TensorProto.INT32)
    output(soft, "next_soft_embedding", dtype, hidden)


# ---------------------------------------------------------------- experts


@dataclass(frozen=True)
class ExpertFormat:
    """How the plugins' expert weights are stored: `plain`, `fp8` or `int4` with its group, as in `kernels.packing`."""

    kind: str = "plain"
    group: int = 0  # inputs of one scale; 0 unless int4

    def run(self, inputs: int) -> int:
        """Inputs of one run of int4 values in rows of `inputs`; ConfigurationError where rows cannot be cut so."""
        for run in (128, 64):
            if run <= 2 * self.group and inputs % run == 0:
                return run
        raise ConfigurationError(f"int4 weights with {inputs} inputs: the number must be a multiple of 64")


@dataclass(frozen=True)
class _Converted:
    values: Array  # [1, out, in], int4 as bytes [1, out, in / 2]
    scales: Array  # fp8 [1, out], int4 [1, out, groups]


def _convert(form: ExpertFormat, dtype: npt.DTypeLike, rows: Float32) -> _Converted:
    if form.kind == "fp8":
        values, scales = to_fp8(rows)
        return _Converted(values[None], scales[None])
    quantized = quantize_rows(rows, GroupFormat(4, form.group, bfloat16_scales=True))
    pairs = quantized.packed.reshape(len(rows), -1)[:, : rows.shape[1] // 2]
    numbers = np.stack([pairs & 15, pairs >> 4], axis=-1)
    halves = numbers.reshape(len(rows), -1, 2, form.run(rows.shape[1]) // 2)
    packed = halves[:, :, 0] | np.left_shift(halves[:, :, 1], 4, dtype=np.uint8)
    return _Converted(packed.reshape(1, len(rows), -1).view(np.int8), quantized.scales.astype(dtype)[None])


def _stack(
    w: GraphWriter, weights: MoeWeights, form: ExpertFormat, name: str, shape: tuple[int, int], matrix: Any
) -> tuple[str, str]:
    """All experts' matrices [E, out, in] and their scales; plain ones have none, and stand in themselves."""
    outputs, inputs = shape

    def rows() -> Iterator[Float32]:
        for expert in range(weights.num_experts):
            yield np.ascontiguousarray(matrix(expert).T)

    if form.kind == "plain":
        values = w.weight(
            name,
            (weights.num_experts, *shape),
            weights.dtype,
            lambda: (each.astype(weights.dtype, copy=False)[None] for each in rows()),
        )
        return values, values
    convert: Callable[[Float32], _Converted] = partial(_convert, form, weights.dtype)
    groups = () if form.kind == "fp8" else (-(-inputs // form.group),)
    stored, kind, scale_kind = {
        "fp8": (inputs, np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float32)),
        "int4": (inputs // 2, np.dtype(np.int8), weights.dtype),
    }[form.kind]
    values = w.weight(
        f"{name}.{form.kind}",
        (weights.num_experts, outputs, stored),
        kind,
        lambda: (convert(each).values for each in rows()),
    )
    scales = w.weight(
        f"{name}.scales",
        (weights.num_experts, outputs, *groups),
        scale_kind,
        lambda: (convert(each).scales for each in rows()),
    )
    return values, scales


def experts(
    form: ExpertFormat, w: GraphWriter, weights: MoeWeights, prefix: str, tokens: str, ids: str, share: str
) -> str:
    """Behind `partial(experts, form)` a lowering like those of `dgemma_build.moe`."""
    inner, hidden, top_k = weights.intermediate_size, weights.hidden_size, weights.top_k
    gate_up = _stack(w, weights, form, f"{prefix}.experts.gate_up", (2 * inner, hidden), weights.gate_up)
    down = _stack(w, weights, form, f"{prefix}.experts.down", (hidden, inner), weights.down)
    chosen = w.op("Cast", ids, to_=TensorProto.INT32)
    order, begin = _plugin(w, "experts_sort", chosen, outputs=2, experts=weights.num_experts)
    sizes = {"group": form.group}
    [gated] = _plugin(w, "experts_gate_up", tokens, *gate_up, order, begin, outputs=1, top_k=top_k, **sizes)
    weight = w.op("Cast", share, to_=TensorProto.FLOAT)
    [products] = _plugin(w, "experts_down", gated, *down, order, begin, weight, outputs=1, **sizes)
    return _plugin(w, "experts_sum", products, outputs=1, top_k=top_k)[0]


PLUGIN_LOWERINGS = {
    "plugins": partial(experts, ExpertFormat()),
    "plugins-fp8": partial(experts, ExpertFormat("fp8")),
    "plugins-int4": partial(experts, ExpertFormat("int4", 64)),
}


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Pages:
    """Names of one layer's keys and values in pages [pages, kv_heads, page, head_dim], and where rows have theirs."""

    keys: str
    values: str
    table: str  # [B, width] int32
    position: str  # [B] int32
    length: str  # [B] int32, tokens of the call
    is_canvas: str  # [B] int32
    key_scale: float = 1.0  # of fp8 pages
    value_scale: float = 1.0


def paged_attention(w: GraphWriter, query: str, pages: Pages, head_dim: int, window: int, dtype: int) -> str:
    """Attention [B, L, heads, head_dim] of queries of that shape; `window` is 0 in full layers."""
    part, log_sum = _plugin(
        w,
        "attention_parts",
        query,
        *(pages.keys, pages.values, pages.table, pages.position, pages.length, pages.is_canvas),
        outputs=2,
        head_dim=head_dim,
        window=window,
        key_scale=pages.key_scale,
        value_scale=pages.value_scale,
    )
    return _plugin(w, "attention_sum", part, log_sum, pages.length, outputs=1, type_id=_OF_ONNX[dtype])[0]
