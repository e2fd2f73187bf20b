"""Lowerings of the mixture of experts to ONNX: `grouped` and `dense`. Knows no checkpoint and no attention.

Both take tokens [N, H], chosen expert ids [N, k] and their weights [N, k], and return [N, H]. `grouped` sorts the
(token, expert) pairs by expert and gives every expert just its tokens, so an expert that no token chose costs an
empty product. `dense` runs every expert over every token in two large products, which is right where the weights
are read anyway and a matrix unit is idle, and needs no data-dependent shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from dgemma_build.onnx_writer import GraphWriter
from dgemma_build.products import Matrix, rms_bound

Float32 = npt.NDArray[np.float32]

MOST_PARTS = 8  # of the sum over experts


@dataclass(frozen=True)
class MoeWeights:
    """One layer's experts; `gate_up` and `down` give one expert's matrix, ready to be multiplied from the right."""

    matmul: Callable[[str, str, Matrix, float | None], str]  # of a value, a name, a weight and a bound: see `products`
    gate_up: Callable[[int], Float32]  # [H, 2 * intermediate_size]
    down: Callable[[int], Float32]  # [intermediate_size, H]
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: np.dtype[np.generic]


def grouped(w: GraphWriter, weights: MoeWeights, prefix: str, tokens: str, ids: str, share: str) -> str:
    """Every expert multiplies only the tokens that chose it; rows are sorted by expert and put back."""
    experts, inner = weights.num_experts, weights.intermediate_size
    pairs = w.op("Reshape", ids, w.const([-1]))  # [N * k]
    count = w.op("Shape", pairs)
    _, order = w.ops("TopK", pairs, count, outputs=2, axis=0, largest=0)  # pairs in order of their expert
    rows = w.op("Gather", tokens, w.op("Div", order, w.const(weights.top_k)))  # [N * k, H]
    chosen = w.op("Equal", w.op("Unsqueeze", pairs, w.const([1])), w.const(np.arange(experts)))
    sizes = w.op("ReduceSum", w.op("Cast", chosen, to_=7), w.const([0]), keepdims=0)  # [experts] int64

    def multiply(value: str, name: str, shape: tuple[int, int], matrix: Callable[[int], Float32]) -> str:
        parts = w.ops("Split", value, sizes, outputs=experts, axis=0)
        products = []
        for expert, part in enumerate(parts):
            weight = Matrix(*shape, partial(_one, matrix, expert))
            products.append(weights.matmul(part, f"{prefix}.experts.{expert}.{name}", weight, None))
        return w.op("Concat", *products, axis=0)

    both = multiply(rows, "gate_up", (weights.hidden_size, 2 * inner), weights.gate_up)
    gate, up = w.ops("Split", both, w.const([inner, inner]), outputs=2, axis=-1)
    gated = w.op("Mul", w.op("Gelu", gate, approximate="tanh"), up)
    weight = w.op("Gather", w.op("Reshape", share, w.const([-1, 1])), order)
    shape = (inner, weights.hidden_size)
    products = multiply(w.op("Mul", gated, weight), "down", shape, weights.down)  # [N * k, H]
    places = w.op("Range", w.const(0), w.op("Squeeze", count), w.const(1))
    back = w.op("ScatterElements", places, order, places, axis=0)  # where each pair went
    in_order = w.op("Reshape", w.op("Gather", products, back), w.const([-1, weights.top_k, weights.hidden_size]))
    return w.op("ReduceSum", in_order, w.const([1]), keepdims=0)


def dense(w: GraphWriter, weights: MoeWeights, prefix: str, tokens: str, ids: str, share: str) -> str:
    """Every expert multiplies every token; what a token did not choose has weight zero.

    Experts are cut into parts. A sum of all experts' downs at once has few tiles for a GPU (44 of 128 x 128 values for
    a canvas of the released model), one output an expert would fill its memory; and TensorRT unpacks int4 weights
    of one product that is for all of them.
    """
    experts, inner, hidden = weights.num_experts, weights.intermediate_size, weights.hidden_size
    parts = max(size for size in range(1, MOST_PARTS + 1) if experts % size == 0)
    together = experts // parts  # experts of a part

    def gate_up() -> Iterator[Float32]:
        for first in range(0, experts, together):
            yield np.concatenate([weights.gate_up(first + i).T for i in range(together)])

    def down() -> Iterator[Float32]:
        for first in range(0, experts, together):
            yield np.concatenate([weights.down(first + i).T for i in range(together)], axis=1)

    zeros = w.op("Expand", w.const(0, weights.dtype), w.op("Concat", _rows(w, tokens), w.const([experts]), axis=0))
    routing = w.op("ScatterElements", zeros, ids, share, axis=1)
    by_part = w.op("Reshape", routing, w.const([-1, parts, together, 1]))
    routing = w.op("Transpose", by_part, perm=[1, 0, 2, 3])  # [parts, N, together, 1]
    matrix = Matrix(hidden, together * 2 * inner, gate_up, stack=parts)
    name = f"{prefix}.experts.gate_up"
    both = weights.matmul(w.op("Unsqueeze", tokens, w.const([0])), name, matrix, rms_bound(hidden))
    both = w.op("Reshape", both, w.const([parts, -1, together, 2 * inner]))
    gate, up = w.ops("Split", both, w.const([inner, inner]), outputs=2, axis=-1)
    gated = w.op("Mul", w.op("Mul", w.op("Gelu", gate, approximate="tanh"), up), routing)
    by_part = w.op("Reshape", gated, w.const([parts, -1, together * inner]))
    matrix = Matrix(together * inner, hidden, down, stack=parts)
    return w.op("ReduceSum", weights.matmul(by_part, f"{prefix}.experts.down", matrix, None), w.const([0]), keepdims=0)


def _one(matrix: Callable[[int], Float32], expert: int) -> list[Float32]:
    return [matrix(expert).T]


def _rows(w: GraphWriter, tokens: str) -> str:
    return w.op("Gather", w.op("Shape", tokens), w.const([0]))


MOE_LOWERINGS: dict[str, Callable[[GraphWriter, MoeWeights, str, str, str, str], str]] = {
    "grouped": grouped,
    "dense": dense,
}
