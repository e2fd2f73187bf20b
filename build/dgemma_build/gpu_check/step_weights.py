"""Random weights and inputs of a whole denoising step, made on the device layer by layer. Knows no kernel's answer.

What is quantised: the experts in each precision's own format; attention and dense MLP to E4M3 with one scale per output
in fp8, and not at all in int4, whose kernels are those of the experts. Embedding, router and norms keep 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma_build.gpu_check.inputs import Behind, Canvases, cache_behind, expert_bytes, generator, size_of
from dgemma_build.gpu_check.machine import Machine
from dgemma_build.gpu_check.sizes import ModelSizes
from dgemma_build.kernels.attention import AttentionSizes
from dgemma_build.kernels.packing import ExpertWeights, pack_experts, to_fp8
from dgemma_build.kernels.small import Rotation

THETA = {False: 1e4, True: 1e6}  # of rotation, for sliding and full layers
ROTATED = {False: 1.0, True: 0.25}  # share of the angles that are not zero


@dataclass(frozen=True)
class Dense:
    """A matrix that every token is multiplied by."""

    weight: Tensor  # [out, in], 16 bits or E4M3
    scale: Tensor | None  # [1, out] float32, of E4M3

    def tensors(self) -> Iterator[Tensor]:
        yield self.weight
        if self.scale is not None:
            yield self.scale


@dataclass(frozen=True)
class LayerWeights:
    attention: AttentionSizes
    qkv: Dense
    qk_norm: Tensor  # [heads + kv_heads, D]
    output: Dense
    attention_norm: Tensor  # [H]
    gate_up: Dense
    down: Dense
    router: Tensor  # [E, H]
    per_expert: Tensor  # [E] float32
    experts: ExpertWeights
    norms: Tensor  # [3, H]: after the dense MLP, after the experts, after their sum
    scalar: Tensor  # [1] float32

    def shared(self) -> Iterator[Tensor]:
        """All that is read whatever experts are chosen."""
        for dense in (self.qkv, self.output, self.gate_up, self.down):
            yield from dense.tensors()
        yield from (self.qk_norm, self.attention_norm, self.router, self.per_expert, self.norms, self.scalar)

    def one_expert_bytes(self) -> float:
        """Of one expert."""
        return expert_bytes(self.experts) / len(self.experts.gate_up)


@dataclass(frozen=True)
class StepWeights:
    embedding: Tensor  # [V, H]
    signal_gate_up: Dense  # of self-conditioning
    signal_down: Dense
    norm: Tensor  # [H], before the head
    layers: tuple[LayerWeights, ...]

    def shared_bytes(self) -> int:
        """All but the experts."""
        own = (self.embedding, *self.signal_gate_up.tensors(), *self.signal_down.tensors(), self.norm)
        return sum(map(size_of, own)) + sum(size_of(part) for layer in self.layers for part in layer.shared())


@dataclass(frozen=True)
class StepInputs:
    ids: Tensor  # [T] int64, of all rows
    soft: Tensor  # [C, H]; the first C tokens are those of canvases
    temperature: Tensor  # [C] float32
    uniforms: Tensor  # [C] float32
    behind: tuple[Behind, ...]  # of each layer
    rotations: dict[AttentionSizes, Rotation]


def random_weights(
    machine: Machine, sizes: ModelSizes, layers: tuple[AttentionSizes, ...], precision: str, branch: float
) -> StepWeights:
    """`branch` is the size of what a branch adds to the residual, whose own is about 1."""
    random = generator(machine, 4)

    def normal(*shape: int, spread: float, mean: float = 0.0) -> Tensor:
        drawn = torch.empty(shape, dtype=sizes.dtype, device=machine.device)
        return drawn.normal_(mean, spread, generator=random)

    def dense(outputs: int, inputs: int) -> Dense:
        weight = normal(outputs, inputs, spread=inputs**-0.5)
        if precision != "fp8":
            return Dense(weight, None)
        values, scale = to_fp8(weight)
        return Dense(values, scale[None, :])

    def layer(kind: AttentionSizes) -> LayerWeights:
        hidden, shape = sizes.hidden, sizes.experts
        slots = kind.heads + kind.kv_heads * (2 if kind.window else 1)
        gate_up = normal(shape.experts, 2 * shape.inner, hidden, spread=hidden**-0.5)
        down = normal(shape.experts, hidden, shape.inner, spread=shape.inner**-0.5)
        return LayerWeights(
            attention=kind,
            qkv=dense(slots * kind.head_dim, hidden),
            qk_norm=normal(kind.heads + kind.kv_heads, kind.head_dim, spread=0.1, mean=1) * key_spread(kind),
            output=dense(hidden, kind.heads * kind.head_dim),
            attention_norm=normal(hidden, spread=0.1 * branch, mean=branch),
            gate_up=dense(2 * sizes.dense_inner, hidden),
            down=dense(hidden, sizes.dense_inner),
            router=normal(shape.experts, hidden, spread=2 * hidden**-0.5),
            per_expert=1 + 0.1 * torch.randn(shape.experts, generator=random, device=machine.device),
            experts=pack_experts(gate_up, down, sizes.form(precision)),
            norms=normal(3, hidden, spread=0.1 * branch, mean=branch),
            scalar=torch.full((1,), 0.97, dtype=torch.float32, device=machine.device),
        )

    return StepWeights(
        embedding=normal(sizes.vocabulary, sizes.hidden, spread=4 * sizes.hidden**-0.5),
        signal_gate_up=dense(2 * sizes.dense_inner, sizes.hidden),
        signal_down=dense(sizes.hidden, sizes.dense_inner),
        norm=normal(sizes.hidden, spread=0.1, mean=1.0),
        layers=tuple(layer(kind) for kind in layers),
    )


def key_spread(kind: AttentionSizes) -> float:
    """Of queries and keys after their norms, so that scores vary by 2."""
    return float(2**0.5 * kind.head_dim**-0.25)


def random_inputs(
    machine: Machine, sizes: ModelSizes, layers: tuple[AttentionSizes, ...], rows: Canvases, cache: torch.dtype
) -> StepInputs:
    """Of one step over `rows`."""
    random = generator(machine, 5)
    tokens = rows.count * rows.tokens
    canvases = tokens - rows.commits * rows.tokens
    device = machine.device
    position = torch.arange(rows.context, rows.context + rows.tokens, device=device).repeat(rows.count)
    return StepInputs(
        ids=torch.randint(0, sizes.vocabulary, (tokens,), generator=random, device=device),
        soft=torch.randn(canvases, sizes.hidden, generator=random, device=device).to(sizes.dtype),
        temperature=torch.full((canvases,), 0.6, device=device),
        uniforms=torch.rand(canvases, generator=random, device=device),
        behind=tuple(
            cache_behind(machine, kind, rows, sizes.dtype, cache, random, key_spread(kind)) for kind in layers
        ),
        rotations={kind: rotation(kind, position) for kind in set(layers)},
    )


def rotation(kind: AttentionSizes, position: Tensor) -> Rotation:
    """Of tokens at `position` [T]."""
    half = kind.head_dim // 2
    full = kind.window == 0
    index = torch.arange(half, dtype=torch.float32, device=position.device)
    frequency = THETA[full] ** (-2 * index / kind.head_dim)
    frequency = torch.where(index < ROTATED[full] * half, frequency, torch.zeros_like(frequency))
    angle = position.float()[:, None] * frequency
    return Rotation(angle.cos(), angle.sin())
