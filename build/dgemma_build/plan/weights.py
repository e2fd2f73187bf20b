"""Bytes of an engine's weights, by part and precision. Knows what a graph holds from the graph's own dry run.

What is planned is what the recipe of that precision writes (`dgemma_build.tensorrt.recipe`), byte for byte, scales
included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dgemma_build.checkpoint import TextConfig
from dgemma_build.graph import Lowering, graph_weights
from dgemma_build.onnx_writer import Weight
from dgemma_build.plan.options import PlanOptions
from dgemma_build.tensorrt import recipe

EXPERTS, ATTENTION, DENSE_MLP, EMBEDDING = "experts", "attention", "dense_mlp", "embedding"
SELF_CONDITIONING, REST = "self_conditioning", "router_norms_scalars"
PARTS = (EXPERTS, ATTENTION, DENSE_MLP, EMBEDDING, SELF_CONDITIONING, REST)


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of the graph."""

    name: str
    part: str
    values: int  # of the model; none in scales
    nbytes: int
    is_matrix: bool  # whether tokens are multiplied by it


def planned_weights(config: TextConfig, options: PlanOptions) -> list[PlannedWeight]:
    """Every weight of the graph in the options' precision."""
    lowering = recipe(options.precision, "bf16", options.int4_group_size)
    return [planned for weight in graph_weights(config, lowering) for planned in _planned(config, weight)]


def _planned(config: TextConfig, weight: Weight) -> Iterator[PlannedWeight]:
    """One weight; two where the router shares a matrix with the MLP."""
    shape = weight.declared[1] if weight.declared else weight.shape
    if weight.name.endswith(".mlp_router"):
        stem, (rows, inputs) = weight.name.removesuffix(".mlp_router"), shape
        for name, part, outputs in (
            (f"{stem}.mlp.gate_up", DENSE_MLP, rows - config.num_experts),
            (f"{stem}.router", REST, config.num_experts),
        ):
            yield PlannedWeight(name, part, outputs * inputs, outputs * inputs * weight.dtype.itemsize, True)
        return
    part, is_scale = _part(weight.name), weight.name.endswith((".scales", "_norm.scale"))
    is_matrix = not is_scale and (part != REST or weight.name.endswith(".router"))
    yield PlannedWeight(weight.name, part, 0 if is_scale else math.prod(shape), weight.nbytes, is_matrix)


def built_bytes(config: TextConfig, lowering: Lowering) -> int:
    """What the weights of a built engine take, exactly: every initializer of its graph but the small constants."""
    return sum(weight.nbytes for weight in graph_weights(config, lowering))


def bytes_by_part(weights: Sequence[PlannedWeight]) -> dict[str, int]:
    """Stored bytes of each of PARTS."""
    total = dict.fromkeys(PARTS, 0)
    for weight in weights:
        total[weight.part] += weight.nbytes
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
