"""Profiles: which engine a model gets, named by a stable id and a tag. Knows machines by their facts, starts nothing.

tensorrt-fp8-h100-262144        backend, precision, GPU, tokens of context
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dgemma_nim.machine import Machine
from dgemma_runtime.errors import ConfigurationError

# Best first. A precision without calibration comes before one whose steps differ more from the original model's.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "tensorrt": ("fp8", "bf16", "int4", "fp32"),
    "tensorrt_rtx": ("fp8", "int4", "bf16", "fp32"),
    "onnxruntime": ("fp32", "int8", "int4"),
}
CPU = "cpu"
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU that profiles are made for."""

    backend: str
    card: str  # as `dgemma-build plan --gpu` calls it
    words: tuple[str, ...]  # in the driver's name of it


GPUS: dict[str, Gpu] = {
    "h200": Gpu("tensorrt", "h200-141", ("H200",)),
    "h100": Gpu("tensorrt", "h100-80", ("H100",)),
    "rtx5090": Gpu("tensorrt_rtx", "rtx5090-32", ("RTX 5090",)),
    "rtx4090": Gpu("tensorrt_rtx", "rtx4090-24", ("RTX 4090",)),
}


@dataclass(frozen=True)
class Profile:
    """One kind of engine of one model."""

    backend: str
    precision: str
    gpu: str  # of GPUS, or cpu
    context: int  # tokens of prompt and output together

    @property
    def tag(self) -> str:
        return f"{self.backend}-{self.precision}-{self.gpu}-{self.context}"

    @property
    def id(self) -> str:
        """Depends on these four values and on nothing else."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def kv_dtype(self) -> str:
        """Of its engine's keys and values: the exporter's own choice, as `flags` leave it."""
        return "fp32" if self.backend == "onnxruntime" or self.precision == "fp32" else "bf16"

    @property
    def flags(self) -> tuple[str, ...]:
        """Of `dgemma-build engine`."""
        return (
            "--backend",
            self.backend,
            "--precision",
            self.precision,
            "--max-model-len",
            str(self.context),
        )


def all_profiles(context: int) -> tuple[Profile, ...]:
    """Over a model's whole context, best first."""
    accelerated = [
        Profile(gpu.backend, precision, name, context)
        for name, gpu in GPUS.items()
        for precision in PRECISIONS[gpu.backend]
    ]
    return (*accelerated, *(Profile("onnxruntime", each, CPU, context) for each in PRECISIONS["onnxruntime"]))


@dataclass(frozen=True)
class Compatibility:
    """Whether a profile can be built and served here. Memory in bytes; 0 where it is not known."""

    profile: Profile
    incompatible: str = ""  # why; empty: it is compatible
    needs_bytes: int = 0  # in use, over the whole context
    has_bytes: int = 0
    remedy: str = ""  # where memory is short

    @property
    def runnable(self) -> bool:
        return not self.incompatible and not self.low_memory

    @property
    def low_memory(self) -> bool:
        return not self.incompatible and self.needs_bytes > self.has_bytes


@dataclass(frozen=True)
class Need:
    """What one sequence over the whole context and the weights take, at least."""

    bytes: int
    remedy: str = ""


def compatibilities(
    profiles: tuple[Profile, ...], machine: Machine, needs: Mapping[tuple[str, str], Need]
) -> tuple[Compatibility, ...]:
    """In the order of `profiles`; `needs` by GPU and precision."""
    return tuple(_compatibility(profile, machine, needs) for profile in profiles)


def _compatibility(profile: Profile, machine: Machine, needs: Mapping[tuple[str, str], Need]) -> Compatibility:
    library = LIBRARIES[profile.backend]
    if library not in machine.libraries:
        return Compatibility(profile, f"{library} is not installed")
    need = needs.get((profile.gpu, profile.precision), Need(0))
    if profile.gpu == CPU:
        return Compatibility(profile, "", need.bytes, machine.memory_bytes, need.remedy)
    if not machine.gpus:
        return Compatibility(profile, "no GPU was found")
    words = GPUS[profile.gpu].words
    fitting = [gpu for gpu in machine.gpus if any(word in gpu.name for word in words)]
    if not fitting:
        return Compatibility(profile, f"the GPU is {machine.gpus[0].name}")
    return Compatibility(profile, "", need.bytes, max(gpu.memory_bytes for gpu in fitting), need.remedy)


def choose(name: str | None, found: tuple[Compatibility, ...]) -> Profile:
    """The profile of that id or tag, or the best one that runs here; raises ConfigurationError."""
    if name is None:
        best = next((each.profile for each in found if each.runnable), None)
        if best is None:
            short = [f"{each.profile.tag}: {each.remedy or 'memory is short'}" for each in found if each.low_memory]
            reasons = "; ".join(short) or "; ".join(f"{each.profile.tag}: {each.incompatible}" for each in found)
            raise ConfigurationError(f"no profile runs on this machine ({reasons}); name one with NIM_MODEL_PROFILE")
        return best
    known = {each.profile.id: each for each in found} | {each.profile.tag: each for each in found}
    chosen = known.get(name) or _shorter(name, found)
    if chosen is None:
        raise ConfigurationError(
            f"NIM_MODEL_PROFILE is {name!r}, which is none of this model's profiles; `list-model-profiles` lists them"
        )
    if chosen.incompatible:
        raise ConfigurationError(f"the profile {chosen.profile.tag} does not run here: {chosen.incompatible}")
    return chosen.profile


def _shorter(tag: str, found: tuple[Compatibility, ...]) -> Compatibility | None:
    """A listed profile with less context than it is listed with, as in tensorrt-fp8-h100-65536."""
    stem, _, tokens = tag.rpartition("-")
    for each in found:
        profile = each.profile
        if stem == profile.tag.rpartition("-")[0] and tokens.isdecimal() and 0 < int(tokens) <= profile.context:
            shorter = Profile(profile.backend, profile.precision, profile.gpu, int(tokens))
            return Compatibility(shorter, each.incompatible)
    return None
