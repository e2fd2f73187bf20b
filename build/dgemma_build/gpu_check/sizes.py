"""Sizes of the model and of what is measured. Knows no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dgemma_build.kernels.attention import AttentionSizes
from dgemma_build.kernels.catalogue import DENSE_INNER, EXPERTS, FULL, HIDDEN, SLIDING, VOCABULARY
from dgemma_build.kernels.experts import ExpertSizes
from dgemma_build.kernels.packing import WeightFormat

PRECISIONS = ("bf16", "fp8", "int4")


@dataclass(frozen=True)
class ModelSizes:
    """The model's dimensions; `dtype` is that of activations and of weights that are not quantised."""

    hidden: int
    vocabulary: int
    canvas: int  # tokens
    dense_inner: int
    experts: ExpertSizes
    sliding: AttentionSizes
    full: AttentionSizes
    period: int  # every period-th layer is a full one
    softcap: float
    eps: float
    group: int  # inputs of one scale of int4 weights
    dtype: torch.dtype

    def layers(self, count: int) -> Iterator[AttentionSizes]:
        """The first `count` layers."""
        for index in range(count):
            yield self.full if (index + 1) % self.period == 0 else self.sliding

    def form(self, precision: str) -> WeightFormat:
        """Of the experts' weights."""
        if precision == "int4":
            return WeightFormat("int4", self.group)
        return WeightFormat("fp8" if precision == "fp8" else "plain")


@dataclass(frozen=True)
class Scope:
    """How much is measured."""

    contexts: tuple[int, ...]  # tokens behind a canvas, for attention; multiples of a page
    step_contexts: tuple[int, ...]  # of whole steps; the bar is for the first
    canvases: int  # where several are measured
    full_step: int  # rows of a step in which the last is a commit
    chunk: int  # tokens of a chunk of prefill
    chunk_context: int  # tokens behind it
    layers: int  # of a whole step
    repetitions: int  # of a timed kernel
    step_repetitions: int
    probe_bytes: int  # read and copied to measure the card's bandwidth
    probe_side: int  # of square products that measure its arithmetic


RELEASED = ModelSizes(
    hidden=HIDDEN,
    vocabulary=VOCABULARY,
    canvas=256,
    dense_inner=DENSE_INNER,
    experts=EXPERTS,
    sliding=SLIDING,
    full=FULL,
    period=6,
    softcap=30.0,
    eps=1e-6,
    group=64,
    dtype=torch.bfloat16,
)
WHOLE = Scope(
    contexts=(1024, 8192, 65_536, 262_144 - 256),  # the last: with its canvas all that the model's context holds
    step_contexts=(1024, 8192),
    canvases=4,
    full_step=8,
    chunk=2048,
    chunk_context=8192,
    layers=30,
    repetitions=30,
    step_repetitions=20,
    probe_bytes=4 * 2**30,
    probe_side=8192,
)
QUICK = replace(WHOLE, contexts=(1024, 8192), step_contexts=(1024,), layers=6, repetitions=10, step_repetitions=10)
