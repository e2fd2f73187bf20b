"""Read a DiffusionGemma checkpoint in transformers' format. Knows no graph and no engine; needs no torch.

Names: encoder and decoder share every weight but `layer_scalar`, and a file may hold either copy of a shared
one. Both are reduced to one canonical name, e.g. `layers.3.self_attn.q_proj.weight`; the two scalars of a layer
are `layers.3.encoder_layer_scalar` and `layers.3.decoder_layer_scalar`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dgemma_runtime.contract import FULL, SLIDING, LayerSpec, ModelSpec, file_sha256
from dgemma_runtime.errors import CheckpointError

Array = npt.NDArray[Any]

_DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


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


class Checkpoint:
    """An opened checkpoint directory: its config and its text tensors by canonical name.

    Raises CheckpointError, naming file, key or tensor, for anything missing, unknown or misshapen.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        raw = _read_json(directory / "config.json")
        if raw.get("model_type") != "diffusion_gemma":
            raise CheckpointError(
                f"{directory / 'config.json'}: model_type is {raw.get('model_type')!r}, expected 'diffusion_gemma'"
            )
        self.config = _text_config(raw, directory / "config.json")
        self._where = self._index()
        self.left_out = tuple(sorted(name for name in self._where if name.startswith(_VISION)))
        self._canonical = self._match()

    def generation_defaults(self) -> dict[str, Any]:
        """`generation_config.json`; every key it sets, unread."""
        return _read_json(self.directory / "generation_config.json")

    def names(self) -> Iterable[str]:
        """Canonical names of the text tensors."""
        return self._canonical.keys()

    def tensor(self, name: str) -> Array:
        """One text tensor in its stored dtype (float32, bfloat16 or float16)."""
        stored = self._canonical[name]
        with safe_open(self._where[stored], framework="numpy") as file:
            array: Array = file.get_tensor(stored)
        return array

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """One text tensor as float32 (exact for bfloat16 and float16); raises if it holds NaN or infinity."""
        array = self.tensor(name).astype(np.float32)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self._canonical[name]}: holds NaN or infinite values")
        return array

    def float32_slice(self, name: str, index: int | slice) -> npt.NDArray[np.float32]:
        """`float32(name)[index]`, reading no more than that: one expert of a stack, some rows of the embedding."""
        stored = self._canonical[name]
        with safe_open(self._where[stored], framework="numpy") as file:
            array: npt.NDArray[np.float32] = file.get_slice(stored)[index].astype(np.float32)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{stored}[{index}]: holds NaN or infinite values")
        return array

    def sha256(self) -> str:
        """Hash over the names and contents of config and weight files."""
        digest = hashlib.sha256()
        for path in [self.directory / "config.json", *sorted(set(self._where.values()))]:
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
        return digest.hexdigest()

    def _index(self) -> dict[str, Path]:
        index_file = self.directory / "model.safetensors.index.json"
        if index_file.exists():
            weight_map = _read_json(index_file).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index_file}: has no weight_map")
            shards = sorted(set(weight_map.values()))
        else:
            weight_map, shards = None, ["model.safetensors"]
        where: dict[str, Path] = {}
        for shard in shards:
            path = self.directory / str(shard)
            if not path.resolve().is_relative_to(self.directory.resolve()):
                raise CheckpointError(f"{index_file}: the shard {shard!r} lies outside of the checkpoint directory")
            if not path.is_file():
                raise CheckpointError(f"{path}: weight file not found; the checkpoint is incomplete")
            try:
                with safe_open(path, framework="numpy") as file:
                    where |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
        if weight_map is not None and (lost := sorted(set(weight_map) - set(where))):
            raise CheckpointError(f"{index_file}: lists tensors that no shard holds: {_some(lost)}")
        return where

    def _match(self) -> dict[str, str]:
        expected = expected_shapes(self.config)
        found: dict[str, str] = {}
        unknown = []
        for stored in sorted(self._where):
            if stored.startswith(_VISION):
                continue
            name = canonical_name(stored)
            if name not in expected:
                unknown.append(stored)
            elif name not in found:
                found[name] = stored
        missing = sorted(set(expected) - set(found))
        if unknown or missing:
            parts = [f"missing {_some(missing)}"] if missing else []
            parts += [f"unknown {_some(unknown)}"] if unknown else []
            raise CheckpointError(f"{self.directory}: tensors do not match the config: {'; '.join(parts)}")
        for name, stored in found.items():
            with safe_open(self._where[stored], framework="numpy") as file:
                view = file.get_slice(stored)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if shape != expected[name]:
                raise CheckpointError(f"{stored}: shape is {list(shape)}, the config asks for {list(expected[name])}")
            if dtype not in _DTYPES:
                raise CheckpointError(f"{stored}: dtype is {dtype}, expected one of {', '.join(_DTYPES)}")
        return found


def canonical_name(stored: str) -> str:
    """Canonical name of a stored tensor; unknown prefixes are kept, so that they match nothing."""
    for prefix, side in ((_DECODER, "decoder"), (_ENCODER, "encoder")):
        if stored.startswith(prefix):
            name = stored.removeprefix(prefix)
            return name.replace(".layer_scalar", f".{side}_layer_scalar")
    return "embed_tokens.weight" if stored == "lm_head.weight" else stored


def expected_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every text tensor of a checkpoint with this config."""
    spec = config.spec
    hidden, inner, experts = spec.hidden_size, config.intermediate_size, config.num_experts
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, hidden), "norm.weight": (hidden,)}
    shapes["self_conditioning.pre_norm.weight"] = (hidden,)
    for prefix in ("self_conditioning", *(f"layers.{index}.mlp" for index in range(len(spec.layers)))):
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, inner)
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}"
        queries, keys = config.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (keys, hidden)
        if layer.kind == SLIDING:
            shapes[f"{prefix}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, queries)
        for norm in ("q_norm", "k_norm"):
            shapes[f"{prefix}.self_attn.{norm}.weight"] = (layer.head_dim,)
        for norm in LAYER_NORMS:
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        shapes[f"{prefix}.router.proj.weight"] = (experts, hidden)
        shapes[f"{prefix}.router.scale"] = (hidden,)
        shapes[f"{prefix}.router.per_expert_scale"] = (experts,)
        shapes[f"{prefix}.experts.gate_up_proj"] = (experts, 2 * config.moe_intermediate_size, hidden)
        shapes[f"{prefix}.experts.down_proj"] = (experts, hidden, config.moe_intermediate_size)
        shapes[f"{prefix}.encoder_layer_scalar"] = shapes[f"{prefix}.decoder_layer_scalar"] = (1,)
    return shapes


LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
    "pre_feedforward_layernorm_2",
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; is this a checkpoint in transformers' format?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, expected an object")
    return raw


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _text_config(raw: dict[str, Any], path: Path) -> TextConfig:
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{path}: has no text_config")

    def need(key: str) -> Any:
        if text.get(key) is None:
            raise CheckpointError(f"{path}: text_config.{key} is missing")
        return text[key]

    for key, supported in _FIXED.items():
        if text.get(key, supported[0]) not in supported:
            raise CheckpointError(
                f"{path}: text_config.{key} is {text[key]!r}, supported: {', '.join(map(repr, supported))}"
            )
    kinds = need("layer_types")
    if len(kinds) != need("num_hidden_layers") or set(kinds) - {SLIDING, FULL}:
        raise CheckpointError(f"{path}: text_config.layer_types does not fit num_hidden_layers={len(kinds)}: {kinds}")
    layers = tuple(_layer_spec(text, index, kind) for index, kind in enumerate(kinds))
    spec = ModelSpec(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        canvas_length=raw.get("canvas_length") or 256,
        sliding_window=need("sliding_window"),
        max_position_embeddings=need("max_position_embeddings"),
        layers=layers,
    )
    rope = {layer.kind: Rope(_inverse_frequencies(need("rope_parameters"), layer, path)) for layer in layers}
    return TextConfig(
        spec=spec,
        num_attention_heads=need("num_attention_heads"),
        intermediate_size=need("intermediate_size"),
        num_experts=need("num_experts"),
        top_k_experts=need("top_k_experts"),
        moe_intermediate_size=need("moe_intermediate_size"),
        rms_norm_eps=float(need("rms_norm_eps")),
        final_logit_softcapping=float(text.get("final_logit_softcapping", 30.0)),
        rope=rope,
    )


# What changes the computation in ways the graph does not cover is refused, not ignored.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, "vision"),
    "tie_word_embeddings": (True,),
}


def _layer_spec(text: dict[str, Any], index: int, kind: str) -> LayerSpec:
    override: dict[str, Any] = {}
    if "per_layer_config" in text:
        per_layer = text["per_layer_config"] or {}
        override = per_layer.get(str(index)) or per_layer.get(kind) or {}
    elif kind == FULL:
        override = {
            "head_dim": text.get("global_head_dim", 512),
            "num_key_value_heads": text.get("num_global_key_value_heads"),
        }
    heads = override.get("num_key_value_heads") or text["num_key_value_heads"]
    return LayerSpec(kind=kind, num_key_value_heads=heads, head_dim=override.get("head_dim") or text["head_dim"])


def _inverse_frequencies(parameters: dict[str, Any], layer: LayerSpec, path: Path) -> npt.NDArray[np.float32]:
    rope = parameters.get(layer.kind)
    if not isinstance(rope, dict) or rope.get("rope_type") not in ("default", "proportional"):
        raise CheckpointError(f"{path}: rope_parameters.{layer.kind} is {rope!r}, supported: default, proportional")
    half, factor = layer.head_dim // 2, float(rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] == "default" and factor != 1.0:
        raise CheckpointError(f"{path}: rope_parameters.{layer.kind}: a partial_rotary_factor needs 'proportional'")
    rotated = half if rope["rope_type"] == "default" else int(factor * layer.head_dim // 2)
    exponents = np.arange(0, 2 * rotated, 2, dtype=np.float32) / np.float32(layer.head_dim)
    frequencies = np.zeros(half, np.float32)
    frequencies[:rotated] = 1.0 / np.power(np.float32(rope["rope_theta"]), exponents)
    return frequencies / np.float32(rope.get("factor", 1.0))
