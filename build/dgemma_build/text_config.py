"""The `config.json` of a checkpoint in transformers' format, resolved and checked. Knows no weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import FULL, SLIDING, LayerSpec, ModelSpec
from dgemma_runtime.errors import CheckpointError

_ARCHITECTURE = "DiffusionGemma"  # what the name of every class that holds these weights begins with
_OTHERS = "engines are built from DiffusionGemma checkpoints only"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: `inverse_frequencies` [head_dim // 2], zero where a pair is not rotated."""

    inverse_frequencies: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextConfig:
    """The text model's `config.json`, resolved: nothing optional is left, both spellings are read."""

    spec: ModelSpec
    num_attention_heads: int
    intermediate_size: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    rms_norm_eps: float
    final_logit_softcapping: float
    rope: dict[str, Rope]  # by layer kind


def layer_values(config: TextConfig) -> int:
    """Of one token in one layer: residual stream, dense MLP, and the chosen experts' rows before and after."""
    hidden, inner = config.spec.hidden_size, config.moe_intermediate_size
    return 4 * hidden + 3 * config.intermediate_size + config.top_k_experts * (2 * hidden + 3 * inner)


def read_config(directory: Path) -> TextConfig:
    """The `config.json` of a checkpoint directory, whatever else is there."""
    path = directory / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], path: Path) -> TextConfig:
    """What `config.json` holds; errors name `path`."""
    if raw.get("model_type") != "diffusion_gemma":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'diffusion_gemma'; {_OTHERS}")
    names = raw.get("architectures") or [_ARCHITECTURE]
    if not isinstance(names, list) or not any(str(name).startswith(_ARCHITECTURE) for name in names):
        raise CheckpointError(f"{path}: architectures is {names!r}, expected a class of {_ARCHITECTURE}; {_OTHERS}")
    return _text_config(raw, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; is this a checkpoint in transformers' format?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, expected an object")
    return raw


class _Fields:
    """The values of one object of the config, each checked when it is asked for; `prefix` says where it stands."""

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def need(self, key: str, kind: type = object) -> Any:
        value = self.values.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: {self.prefix}{key} is missing")
        if not isinstance(value, kind):
            raise self.wrong(key, value, f"a {kind.__name__}")
        return value

    def count(self, key: str, override: object = None, default: int | None = None) -> int:
        """`override` and `default` stand for the value where they are given: before it, and where there is none."""
        value = override
        if value is None:
            value = default if default is not None and self.values.get(key) is None else self.need(key)
        if type(value) is not int or value < 1:
            raise self.wrong(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Positive and finite; `default` where the key is absent."""
        value = default if default is not None and key not in self.values else self.need(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a number above 0")
        return float(value)

    def part(self, key: str) -> _Fields:
        return _Fields(self.need(key, dict), self.path, f"{self.prefix}{key}.")

    def wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{key} is {value!r}, expected {expected}")


def _text_config(raw: dict[str, Any], path: Path) -> TextConfig:
    whole = _Fields(raw, path)
    fields = whole.part("text_config")
    for key, supported in _FIXED.items():
        if (value := fields.values.get(key, supported[0])) not in supported:
            raise fields.wrong(key, value, " or ".join(map(repr, supported)))
    spec = ModelSpec(
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        canvas_length=whole.count("canvas_length", default=256),
        sliding_window=fields.count("sliding_window"),
        max_position_embeddings=fields.count("max_position_embeddings"),
        layers=_layers(fields),
    )
    config = TextConfig(
        spec=spec,
        num_attention_heads=fields.count("num_attention_heads"),
        intermediate_size=fields.count("intermediate_size"),
        num_experts=fields.count("num_experts"),
        top_k_experts=fields.count("top_k_experts"),
        moe_intermediate_size=fields.count("moe_intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        final_logit_softcapping=fields.number("final_logit_softcapping", 30.0),
        rope={layer.kind: Rope(_inverse_frequencies(fields, layer)) for layer in spec.layers},
    )
    if config.top_k_experts > config.num_experts:
        raise fields.wrong("top_k_experts", config.top_k_experts, f"at most num_experts, which is {config.num_experts}")
    for layer in spec.layers:
        if config.num_attention_heads % layer.num_key_value_heads:
            raise fields.wrong(
                "num_attention_heads",
                config.num_attention_heads,
                f"a multiple of the {layer.num_key_value_heads} key/value heads of its {layer.kind} layers",
            )
    return config


# What changes the computation in ways the graph does not cover is refused, not ignored.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("diffusion_gemma_text",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, "vision"),
    "tie_word_embeddings": (True,),
}


def _layers(fields: _Fields) -> tuple[LayerSpec, ...]:
    kinds, count = fields.need("layer_types", list), fields.count("num_hidden_layers")
    if len(kinds) != count:
        raise fields.wrong("num_hidden_layers", count, f"the length of layer_types, which is {len(kinds)}")
    layers = tuple(_layer_spec(fields, index, kind) for index, kind in enumerate(kinds))
    for kind in (SLIDING, FULL):
        if len(sizes := {layer.head_dim for layer in layers if layer.kind == kind}) > 1:
            raise fields.wrong("head_dim", sorted(sizes), f"one size for all {kind} layers")
    return layers


def _layer_spec(fields: _Fields, index: int, kind: str) -> LayerSpec:
    if kind not in (SLIDING, FULL):
        raise fields.wrong(f"layer_types[{index}]", kind, f"{SLIDING!r} or {FULL!r}")
    text = fields.values
    override: dict[str, Any] = {}
    if text.get("per_layer_config"):
        per_layer = fields.part("per_layer_config")
        key = str(index) if per_layer.values.get(str(index)) else kind
        override = per_layer.part(key).values if per_layer.values.get(key) else {}
    elif kind == FULL and "per_layer_config" not in text:
        override = {
            "head_dim": text.get("global_head_dim", 512),
            "num_key_value_heads": text.get("num_global_key_value_heads"),
        }
    heads, dim = (fields.count(key, override.get(key)) for key in ("num_key_value_heads", "head_dim"))
    if dim % 2:
        raise fields.wrong("head_dim", dim, f"an even number, for the rotary embedding of the {kind} layers")
    return LayerSpec(kind=kind, num_key_value_heads=heads, head_dim=dim)


def _inverse_frequencies(fields: _Fields, layer: LayerSpec) -> npt.NDArray[np.float32]:
    rope = fields.part("rope_parameters").part(layer.kind)
    if (kind := rope.values.get("rope_type")) not in ("default", "proportional"):
        raise rope.wrong("rope_type", kind, "'default' or 'proportional'")
    half, factor = layer.head_dim // 2, rope.number("partial_rotary_factor", 1.0)
    if factor > 1:
        raise rope.wrong("partial_rotary_factor", factor, "at most 1")
    if kind == "default" and factor != 1.0:
        raise rope.wrong("partial_rotary_factor", factor, "rope_type 'proportional' beside it")
    rotated = half if kind == "default" else int(factor * layer.head_dim // 2)
    exponents = np.arange(0, 2 * rotated, 2, dtype=np.float32) / np.float32(layer.head_dim)
    frequencies = np.zeros(half, np.float32)
    frequencies[:rotated] = 1.0 / np.power(np.float32(rope.number("rope_theta")), exponents)
    return frequencies / np.float32(rope.number("factor", 1.0))
