"""Bytes of an engine's weights, by part and precision. Knows what the graph holds from the graph's own dry run.

What a backend builds is known byte for byte from its lowering (`built_bytes`). A plan for a GPU starts from the graph
in bf16, fp16 or fp32 and computes fp8 and int4 from the same list of matrices. Quantised are those of the experts, of
attention, of the dense MLP and of self-conditioning:

    fp8   E4M3, one fp32 scale per output channel (of each expert)
    int4  two weights a byte in groups along the input dimension, one bf16 scale a group and output channel; a last
          group that is not full is padded to one

The embedding (the head too), the router, norms and scalars stay in bf16; `fp8_embedding` puts the embedding in E4M3
with one fp32 scale per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto

from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering, graph_weights
from dgemma_build.plan.options import PlanOptions

EXPERTS, ATTENTION, DENSE_MLP, EMBEDDING = "experts", "attention", "dense_mlp", "embedding"
SELF_CONDITIONING, REST = "self_conditioning", "router_norms_scalars"
PARTS = (EXPERTS, ATTENTION, DENSE_MLP, EMBEDDING, SELF_CONDITIONING, REST)
QUANTISED = (EXPERTS, ATTENTION, DENSE_MLP, SELF_CONDITIONING)  # matrices; none of these parts holds anything else
_DTYPES = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of the graph before quantisation."""

    name: str
    part: str
    shape: tuple[int, ...]  # of a matrix: [..., input, output]
    element_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied by it."""
        return self.part != REST or self.name.endswith(".router")

    def stored_bytes(self, options: PlanOptions) -> int:
        """With its scales."""
        if self.part == EMBEDDING and options.quantised and options.fp8_embedding:
            return self.elements + 4 * self.shape[0]
        if self.part not in QUANTISED or not options.quantised:
            return self.elements * self.element_bytes
        *stack, inputs, outputs = self.shape
        columns = math.prod(stack) * outputs
        if options.precision == "fp8":
            return self.elements + 4 * columns
        groups, size = -(-inputs // options.int4_group_size), options.int4_group_size
        return columns * groups * (size // 2 + 2)


def planned_weights(config: TextConfig, activations: str) -> list[PlannedWeight]:
    """Every weight of the graph in fp32, bf16 or fp16. The router is told from the MLP that it shares a matrix with."""
    found = []
    for weight in graph_weights(config, Lowering(moe="dense", dtype=_DTYPES[activations])):
        element = weight.dtype.itemsize
        if weight.name.endswith(".mlp_router"):
            rows, columns = weight.shape
            inner = columns - config.num_experts
            stem = weight.name.removesuffix(".mlp_router")
            found.append(PlannedWeight(f"{stem}.mlp.gate_up", DENSE_MLP, (rows, inner), element))
            found.append(PlannedWeight(f"{stem}.router", REST, (rows, config.num_experts), element))
        else:
            found.append(PlannedWeight(weight.name, _part(weight.name), weight.shape, element))
    return found


def built_bytes(config: TextConfig, lowering: Lowering) -> int:
    """What the weights of a built engine take, exactly: every initializer of its graph but the small constants."""
    return sum(weight.nbytes for weight in graph_weights(config, lowering))


def bytes_by_part(weights: Sequence[PlannedWeight], options: PlanOptions) -> dict[str, int]:
    """Stored bytes of each of PARTS."""
    total = dict.fromkeys(PARTS, 0)
    for weight in weights:
        total[weight.part] += weight.stored_bytes(options)
    return total


def _part(name: str) -> str:
    if name.startswith("embed_tokens"):
        return EMBEDDING
    if name.startswith("self_conditioning."):
        return SELF_CONDITIONING
    for piece, part in ((".experts.", EXPERTS), (".mlp.", DENSE_MLP), (".qkv", ATTENTION), (".o_proj", ATTENTION)):
        if piece in name:
            return part
    return REST
