"""What a drafter is: its own sizes and the denoiser that it belongs to. Knows no weights and no graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dgemma_build.text_config import TextConfig
from dgemma_runtime.contract import LayerSpec, ModelSpec
from dgemma_runtime.errors import CheckpointError

MODEL_TYPE = "dgemma_drafter"


@dataclass(frozen=True)
class DrafterConfig:
    """`config.json` of a drafter checkpoint, beside `model_type`."""

    denoiser_sha256: str  # of the denoiser's checkpoint, as in the manifests of its engines
    vocab_size: int
    canvas_length: int  # tokens
    denoiser_hidden_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    reads: tuple[int, ...]  # per layer of the drafter: the denoiser's layer whose keys and values it attends to

    def document(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    def layers(self, denoiser: TextConfig) -> tuple[LayerSpec, ...]:
        """The attention of each layer: that of the denoiser's layer it reads."""
        return tuple(denoiser.spec.layers[index] for index in self.reads)

    def spec(self, denoiser: TextConfig) -> ModelSpec:
        """The drafter as a model: its own layers over the denoiser's tokens."""
        theirs = denoiser.spec
        return ModelSpec(
            vocab_size=theirs.vocab_size,
            hidden_size=self.hidden_size,
            canvas_length=theirs.canvas_length,
            sliding_window=theirs.sliding_window,
            max_position_embeddings=theirs.max_position_embeddings,
            layers=self.layers(denoiser),
        )


def parse_config(raw: Mapping[str, Any], path: Path) -> DrafterConfig:
    """The values of a `config.json`, each of its type; raises CheckpointError naming `path`, field and value."""
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: model_type is {raw.get('model_type')!r}, expected {MODEL_TYPE!r}; give the directory of a drafter"
        )
    known = {item.name for item in fields(DrafterConfig)}
    if unknown := sorted(set(raw) - known - {"model_type"}):
        raise CheckpointError(f"{path}: {unknown[0]} is not a field of a drafter's config; remove it")
    if missing := sorted(known - set(raw)):
        raise CheckpointError(f"{path}: {missing[0]} is missing; take the config that was written with the weights")
    values = dict(raw)
    values.pop("model_type")
    for name in known - {"denoiser_sha256", "reads"}:
        if type(values[name]) is not int or values[name] < 1:
            raise _wrong(path, name, values[name], "a whole number above 0")
    digest, reads = values["denoiser_sha256"], values["reads"]
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise _wrong(path, "denoiser_sha256", digest, "64 hexadecimal digits")
    if (
        not isinstance(reads, list | tuple)
        or not reads
        or not all(type(index) is int and index >= 0 for index in reads)
    ):
        raise _wrong(path, "reads", reads, "a list of the denoiser's layers, counted from 0")
    return DrafterConfig(**values | {"reads": tuple(reads)})


def check_config(config: DrafterConfig, denoiser: TextConfig, denoiser_sha256: str, path: Path) -> None:
    """Raises CheckpointError where a drafter was not made for this denoiser."""
    if config.denoiser_sha256 != denoiser_sha256:
        raise CheckpointError(
            f"{path}: denoiser_sha256 is {config.denoiser_sha256[:12]}…, the denoiser's {denoiser_sha256[:12]}…; "
            "give --checkpoint the denoiser that the drafter was trained for, or train another drafter"
        )
    check_sizes(config, denoiser, path)


def check_sizes(config: DrafterConfig, denoiser: TextConfig, path: Path) -> None:
    """Raises CheckpointError for sizes that do not fit the denoiser's."""
    spec = denoiser.spec
    for name, theirs in (
        ("vocab_size", spec.vocab_size),
        ("canvas_length", spec.canvas_length),
        ("denoiser_hidden_size", spec.hidden_size),
    ):
        if (ours := getattr(config, name)) != theirs:
            raise _wrong(path, name, ours, f"the denoiser's, which is {theirs}; train a drafter for this denoiser")
    if max(config.reads) >= len(spec.layers):
        raise _wrong(path, "reads", list(config.reads), f"layers of the denoiser, which has {len(spec.layers)}")
    if list(config.reads) != sorted(set(config.reads)):  # a layer's cache takes the keys of one layer of the drafter
        raise _wrong(path, "reads", list(config.reads), "different layers, in ascending order")
    for layer in config.layers(denoiser):
        if config.num_attention_heads % layer.num_key_value_heads:
            expected = f"a multiple of the {layer.num_key_value_heads} key/value heads of the layers it reads"
            raise _wrong(path, "num_attention_heads", config.num_attention_heads, expected)


def _wrong(path: Path, name: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} is {value!r}, expected {expected}")
