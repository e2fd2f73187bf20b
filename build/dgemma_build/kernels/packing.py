"""The experts' weights as their kernels read them: plain, fp8, or int4 in groups. Knows no kernel.

int4 values are 0 to 15 and stand for (value - 8) * scale, one scale per `group` inputs of an output. Two share a
byte so that a kernel needs no shuffling: a row is cut into runs, and byte j of a run has input j of the run's first
half in its low four bits and input j of the second half in its high four. Both halves then multiply contiguous
activations, and neither crosses a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma_runtime.errors import ConfigurationError

FP8_MAX = 448.0
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class WeightFormat:
    """`plain` (the activations' type), `fp8` (E4M3 and a scale per output) or `int4` (with its group)."""

    kind: str
    group: int = 0  # inputs of one scale; 0 unless int4

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "fp8", "int4"):
            raise ConfigurationError(f"expert weights {self.kind}: choose plain, fp8 or int4")
        if self.group not in (GROUPS if self.kind == "int4" else (0,)):
            raise ConfigurationError(
                f"group {self.group} of {self.kind} weights: choose one of {GROUPS} for int4, else 0"
            )

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.group}" if self.group else self.kind

    def stored(self, dtype: str) -> str:
        """Triton's name of the weights' type beside activations of `dtype`."""
        return {"plain": dtype, "fp8": "fp8e4nv", "int4": "u8"}[self.kind]

    def scale(self, dtype: str) -> str:
        """Triton's name of the scales' type; plain weights have none, and their own pointer stands in."""
        return {"plain": dtype, "fp8": "fp32", "int4": dtype}[self.kind]

    def run(self, inputs: int) -> int:
        """Inputs of one run of int4 values in rows of `inputs`."""
        for run in (128, 64):
            if run <= 2 * self.group and inputs % run == 0:
                return run
        raise ConfigurationError(f"int4 weights with {inputs} inputs: the number must be a multiple of 64")


@dataclass(frozen=True)
class ExpertWeights:
    """All experts of a layer; for int4 the matrices' last axis is bytes."""

    form: WeightFormat
    gate_up: Tensor  # [E, 2 I, H]
    down: Tensor  # [E, H, I]
    gate_up_scale: Tensor  # fp8: [E, 2 I]; int4: [E, 2 I, ceil(H / group)]; plain: gate_up again
    down_scale: Tensor  # fp8: [E, H]; int4: [E, H, ceil(I / group)]; plain: down again


def pack_experts(gate_up: Tensor, down: Tensor, form: WeightFormat) -> ExpertWeights:
    """Quantise float weights [E, 2 I, H] and [E, H, I] by round to nearest; scales of int4 have the weights' type."""
    if form.kind == "plain":
        return ExpertWeights(form, gate_up, down, gate_up, down)
    convert = to_fp8 if form.kind == "fp8" else lambda weights: to_int4(weights, form)
    (first, first_scale), (second, second_scale) = convert(gate_up), convert(down)
    return ExpertWeights(form, first, second, first_scale, second_scale)


def to_fp8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [..., out, in] and float32 scales [..., out]."""
    scale = weights.float().abs().amax(dim=-1).clamp(min=1e-12) / FP8_MAX
    return (weights.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def to_int4(weights: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor]:
    """Bytes [..., out, in / 2] and scales [..., out, groups] of weights [..., out, in], rounded to nearest.

    Scales meet each group's greatest value; `dgemma_build.quantize` finds better ones, for `int4_weights`.
    """
    inputs = weights.shape[-1]
    form.run(inputs)
    padding = -inputs % form.group
    grouped = torch.nn.functional.pad(weights.float(), (0, padding))
    grouped = grouped.reshape(*weights.shape[:-1], -1, form.group)
    scale = (grouped.abs().amax(dim=-1).clamp(min=1e-12) / 7).to(weights.dtype)
    values = (grouped / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8)
    return int4_weights(values.flatten(-2)[..., :inputs], scale, form, weights.dtype)


def int4_weights(values: Tensor, scale: Tensor, form: WeightFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the kernels read, bytes [..., out, in / 2] and scales in `dtype`, of any quantiser's integers.

    values [..., out, in] are int8 from -8 to 7, or uint8 from 0 to 15 with 8 for zero; scale [..., out, groups]. Raises
    ConfigurationError for scales that `dtype` does not hold exactly, as the weights would be others than were chosen.
    """
    groups = -(-values.shape[-1] // form.group)
    if scale.shape != (*values.shape[:-1], groups):
        raise ConfigurationError(
            f"scales {tuple(scale.shape)}: values {tuple(values.shape)} in groups of {form.group} need "
            f"{(*values.shape[:-1], groups)}"
        )
    if values.dtype not in (torch.int8, torch.uint8):
        raise ConfigurationError(f"int4 values in {values.dtype}: give int8 (-8 to 7) or uint8 (0 to 15)")
    stored = (values + 8).to(torch.uint8) if values.dtype == torch.int8 else values
    if stored.numel() and int(stored.max()) > 15:
        raise ConfigurationError(f"int4 values in {values.dtype}: give -8 to 7 as int8 or 0 to 15 as uint8")
    kept = scale.to(dtype)
    if not torch.equal(kept.to(scale.dtype), scale):
        raise ConfigurationError(
            f"int4 scales: {dtype} does not hold them exactly; round them before values are chosen"
        )
    return pack_int4(stored, form), kept


def split_pairs(pairs: Tensor) -> Tensor:
    """Values 0 to 15 [..., in] of bytes [..., in / 2], low halves first: the order of `dgemma_build.quantize`."""
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)


def pack_int4(values: Tensor, form: WeightFormat) -> Tensor:
    """Bytes [..., out, in / 2] of uint8 values 0 to 15 [..., out, in]."""
    run = form.run(values.shape[-1])
    halves = values.reshape(*values.shape[:-1], -1, 2, run // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def unpack_int4(packed: Tensor, form: WeightFormat) -> Tensor:
    """What `pack_int4` was given."""
    run = form.run(2 * packed.shape[-1])
    by_run = packed.reshape(*packed.shape[:-1], -1, run // 2)
    return torch.stack([by_run & 15, by_run >> 4], dim=-2).flatten(-3)


def dequantised(stored: Tensor, scale: Tensor, form: WeightFormat) -> Tensor:
    """The numbers [..., out, in] that stored weights stand for: float32, but plain ones as they are."""
    if form.kind == "plain":
        return stored
    if form.kind == "fp8":
        return stored.float() * scale[..., None]
    values = unpack_int4(stored, form).float() - 8
    return values * scale.float().repeat_interleave(form.group, dim=-1)[..., : values.shape[-1]]
