"""The sampling head in ONNX: logits, softcap, temperature, argmax, categorical sample, entropy, soft embedding.

All in float32 and all on the device: per canvas position one argmax id, one sampled id and one entropy leave the
graph, the logits never do. The sample is by inverse CDF in vocabulary order, the first id whose cumulative
probability exceeds the position's uniform number, found in two levels: first a group of ids, then the id in it.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper

from dgemma_build.checkpoint import TextConfig
from dgemma_build.onnx_writer import GraphWriter


def group_size(vocab_size: int) -> int:
    """Ids in a group of the two-level search: the power of two nearest to the square root of `vocab_size`."""
    return 1 << round(math.log2(vocab_size) / 2)


def add_head(
    w: GraphWriter, normed: str, embedding: str, config: TextConfig, dtype: int, keep_logits: bool = True
) -> None:
    """Add the head over `normed` [R, L, H] and the outputs it makes; `embedding` is the [V, H] weight's name.

    Without `keep_logits`, argmax and entropy come from the probabilities alone: a logarithm of each, which a CPU feels,
    for an array of the vocabulary's width less, which a GPU's memory does.
    """
    vocab, hidden, cap = config.spec.vocab_size, config.spec.hidden_size, config.final_logit_softcapping
    f32 = np.float32
    flat = w.op("Reshape", normed, w.const([-1, hidden]))  # [R * L, H]
    raw = w.op("MatMul", flat, w.op("Transpose", embedding, perm=[1, 0]))
    if dtype != TensorProto.FLOAT:
        raw = w.op("Cast", raw, to_=TensorProto.FLOAT)
    capped = w.op("Tanh", w.op("Mul", raw, w.const(1 / cap, f32)))
    rows = w.op("Shape", "uniforms")  # [R, L]
    per_row = w.op("Div", w.const(cap, f32), w.op("Unsqueeze", "temperature", w.const([1])))
    scale = w.op("Reshape", w.op("Expand", per_row, rows), w.const([-1, 1]))  # [R * L, 1]
    logits = w.op("Mul", capped, scale)  # tempered, [R * L, V]
    probabilities = w.op("Softmax", logits, axis=-1, to="probabilities")

    # Axes are counted from the front: of a call without canvas rows, whose arrays are empty, onnxruntime 1.31 reduces a
    # negative axis to a wrong shape.
    top, argmax = w.ops("TopK", logits if keep_logits else probabilities, w.const([1]), outputs=2, axis=-1)
    w.op("Cast", w.op("Reshape", argmax, rows), to_=TensorProto.INT32, to="argmax_ids")
    w.graph_output("argmax_ids", TensorProto.INT32, ["R", "L"])
    if keep_logits:  # log-sum-exp from the largest element: its logit is m and its probability exp(m - lse)
        log_top = w.op("Log", w.op("GatherElements", probabilities, argmax, axis=1))
        expected = w.op("ReduceSum", w.op("Mul", probabilities, logits), w.const([1]))
        entropy = w.op("Sub", w.op("Sub", top, log_top), expected)
    else:
        surprise = w.op("Log", w.op("Max", probabilities, w.const(np.finfo(f32).tiny, f32)))
        entropy = w.op("Neg", w.op("ReduceSum", w.op("Mul", probabilities, surprise), w.const([1])))
    w.op("Reshape", entropy, rows, to="entropies")
    w.graph_output("entropies", TensorProto.FLOAT, ["R", "L"])

    sample = _sample(w, probabilities, vocab)
    w.op("Cast", w.op("Reshape", sample, rows), to_=TensorProto.INT32, to="sampled_ids")
    w.graph_output("sampled_ids", TensorProto.INT32, ["R", "L"])

    if dtype != TensorProto.FLOAT:
        probabilities = w.op("Cast", probabilities, to_=dtype)
    soft = w.op("MatMul", probabilities, embedding)
    soft = w.op("Mul", soft, w.const(hidden**0.5, helper.tensor_dtype_to_np_dtype(dtype)))
    w.op("Reshape", soft, w.op("Concat", rows, w.const([hidden]), axis=0), to="next_soft_embedding")
    w.graph_output("next_soft_embedding", dtype, ["R", "L", hidden])


def _sample(w: GraphWriter, probabilities: str, vocab: int) -> str:
    """Sampled ids [R * L] int64 from probabilities [R * L, V]."""
    size = group_size(vocab)
    groups = -(-vocab // size)
    if vocab % size:  # ids that do not exist have probability zero
        padding = w.const([0, 0, 0, groups * size - vocab])
        probabilities = w.op("Pad", probabilities, padding, w.const(0, np.float32))
    by_group = w.op("Reshape", probabilities, w.const([-1, groups, size]))
    mass = w.op("ReduceSum", by_group, w.const([2]), keepdims=0)  # [N, groups]
    until = w.op("CumSum", mass, w.const(1))
    uniforms = w.op("Reshape", "uniforms", w.const([-1, 1]))
    group = _count_up_to(w, until, uniforms, groups)  # [N, 1]
    own = w.op("GatherElements", mass, group, axis=1)
    before = w.op("Sub", w.op("GatherElements", until, group, axis=1), own)
    position = w.op("Range", w.const(0), w.op("Squeeze", w.op("Gather", w.op("Shape", mass), w.const([0]))), w.const(1))
    index = w.op("Add", w.op("Mul", position, w.const(groups)), w.op("Squeeze", group, w.const([1])))
    within = w.op("Gather", w.op("Reshape", by_group, w.const([-1, size])), index)  # [N, size]
    inner = w.op("CumSum", within, w.const(1))
    left = w.op("Sub", uniforms, before)
    # Rounding may put the number at or past the group's own total; the largest float below it keeps the id possible.
    total = w.op("Gather", inner, w.const([size - 1]), axis=1)
    left = w.op("Min", left, w.op("Mul", total, w.const(1 - 2**-23, np.float32)))
    offset = _count_up_to(w, inner, left, size)
    return w.op("Squeeze", w.op("Add", w.op("Mul", group, w.const(size)), offset), w.const([1]))


def _count_up_to(w: GraphWriter, cumulative: str, bound: str, width: int) -> str:
    """First index [N, 1] int64 whose cumulative value exceeds `bound`, at most width - 1."""
    passed = w.op("Cast", w.op("LessOrEqual", cumulative, bound), to_=TensorProto.FLOAT)
    count = w.op("ReduceSum", passed, w.const([1]))
    return w.op("Cast", w.op("Min", count, w.const(width - 1, np.float32)), to_=TensorProto.INT64)
