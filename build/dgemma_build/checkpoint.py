"""Read a DiffusionGemma checkpoint in transformers' format. Knows no graph and no engine; needs no torch.

Names: encoder and decoder share every weight but `layer_scalar`, and a file may hold either copy of a shared
one. Both are reduced to one canonical name, e.g. `layers.3.self_attn.q_proj.weight`; the two scalars of a layer
are `layers.3.encoder_layer_scalar` and `layers.3.decoder_layer_scalar`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dgemma_build.text_config import Rope, TextConfig, parse_config, read_config, read_json
from dgemma_runtime.contract import SLIDING, checkpoint_sha256
from dgemma_runtime.errors import CheckpointError

__all__ = ["Checkpoint", "Rope", "TextConfig", "canonical_name", "expected_shapes", "parse_config", "read_config"]

Array = npt.NDArray[Any]

_DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# The bits of the exponent: all of them are set in NaN and infinity, and in nothing else.
_EXPONENT = {"F32": 0x7F80_0000, "BF16": 0x7F80, "F16": 0x7C00}
_FETCH = "fetch the checkpoint again"
_PIECE = 1 << 20  # values looked at together, few enough to stay in a cache


@dataclass(frozen=True)
class _Stored:
    """Where one tensor lies: `offset` is in bytes from the start of the file."""

    path: Path
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """An opened checkpoint directory: its config and its text tensors by canonical name.

    Opening reads only headers. A tensor is read when it is asked for, into memory of its own: files are not mapped.
    Raises CheckpointError, naming file, key or tensor, for anything missing, unknown, misshapen or misplaced.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self._where = self._stored_tensors()
        self.left_out = tuple(sorted(name for name in self._where if name.startswith(_VISION)))
        self._canonical = self._match()

    def generation_defaults(self) -> dict[str, Any]:
        """`generation_config.json`; every key it sets, unread."""
        return read_json(self.directory / "generation_config.json")

    def names(self) -> Iterable[str]:
        """Canonical names of the text tensors."""
        return self._canonical.keys()

    def tensor(self, name: str) -> Array:
        """One text tensor in its stored dtype (float32, bfloat16 or float16); raises if it holds NaN or infinity."""
        return self._read(self._canonical[name])

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """`tensor(name)` as float32, exact for every stored dtype."""
        return self.tensor(name).astype(np.float32, copy=False)

    def float32_slice(self, name: str, index: int | slice) -> npt.NDArray[np.float32]:
        """`float32(name)[index]`, reading no more than that: one expert of a stack, some rows of the embedding."""
        return self._read(self._canonical[name], index).astype(np.float32, copy=False)

    def sha256(self) -> str:
        """Hash over the names and contents of config and weight files."""
        return checkpoint_sha256(self.directory, {stored.path for stored in self._where.values()})

    def _read(self, name: str, index: int | slice | None = None) -> Array:
        """The tensor stored as `name`, or the part of it at `index` of its first axis; all its values are finite."""
        stored = self._where[name]
        dtype, shape, skipped = _DTYPES[stored.dtype], stored.shape, 0
        if index is not None:
            rows = range(shape[0])[index]
            assert isinstance(rows, int) or rows.step == 1
            shape, skipped = (shape[1:], rows) if isinstance(rows, int) else ((len(rows), *shape[1:]), rows.start)
        size = math.prod(shape) * dtype.itemsize
        offset = stored.offset + skipped * math.prod(stored.shape[1:]) * dtype.itemsize
        try:
            content = np.fromfile(stored.path, np.uint8, size, offset=offset)
        except OSError as error:
            raise CheckpointError(f"{stored.path}: not readable ({error})") from None
        if content.size != size:
            raise CheckpointError(
                f"{stored.path}: ends within {name}; the file changed after it was opened; build again"
            )
        exponent, bits = _EXPONENT[stored.dtype], content.view(f"<u{dtype.itemsize}")
        for start in range(0, bits.size, _PIECE):
            if ((bits[start : start + _PIECE] & exponent) == exponent).any():
                part = "" if index is None else f"[{index}]"
                raise CheckpointError(f"{stored.path}: {name}{part} holds NaN or infinite values; {_FETCH}")
        return content.view(dtype).reshape(shape)

    def _stored_tensors(self) -> dict[str, _Stored]:
        """Every tensor of the weight files by stored name; an index must tell the truth about each of them."""
        index_file = self.directory / "model.safetensors.index.json"
        if not index_file.exists():
            return _header(self._weight_file("model.safetensors"))
        if (self.directory / "model.safetensors").exists():
            raise CheckpointError(f"{index_file}: model.safetensors is there too; remove what does not belong")
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index_file}: has no weight_map from tensors to files")
        where: dict[str, _Stored] = {}
        for shard in sorted(set(weight_map.values())):
            for name, stored in _header(self._weight_file(shard)).items():
                if name in where:
                    raise CheckpointError(f"{self.directory}: {name} is both in {where[name].path.name} and in {shard}")
                where[name] = stored
        if lost := sorted(set(weight_map) - set(where)):
            raise CheckpointError(f"{index_file}: lists tensors that no shard holds: {_some(lost)}")
        if unlisted := sorted(set(where) - set(weight_map)):
            raise CheckpointError(f"{index_file}: does not list what the shards hold: {_some(unlisted)}")
        for name, stored in where.items():
            if stored.path != self.directory / weight_map[name]:
                raise CheckpointError(f"{index_file}: lists {name} in {weight_map[name]}, it is in {stored.path.name}")
        return where

    def _weight_file(self, name: str) -> Path:
        """The file `name` of the directory; neither the name nor a link may lead out of it.

        A download cache keeps its files in `blobs` and links to them from `snapshots/REVISION`; that is inside.
        """
        path, home = self.directory / name, self.directory.resolve()
        homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        try:
            target, found = path.resolve(), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a name too long or with a zero byte; links in a circle
            raise CheckpointError(f"{self.directory}: {name!r} names no weight file ({error})") from None
        plain = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not plain or not any(target.is_relative_to(folder) for folder in homes):
            raise CheckpointError(f"{path}: this weight file lies outside of the checkpoint directory, at {target}")
        if not found:
            raise CheckpointError(f"{path}: weight file not found; the checkpoint is incomplete, {_FETCH}")
        return path

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
                continue
            where, first = self._where[stored], found.setdefault(name, stored)
            if where.shape != expected[name]:
                raise CheckpointError(
                    f"{where.path}: the shape of {stored} is {list(where.shape)}, config.json asks for "
                    f"{list(expected[name])}; take both from one checkpoint"
                )
            if where.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{where.path}: {stored} has dtype {where.dtype}, expected one of {', '.join(_DTYPES)}; take the "
                    "checkpoint as it was released, not one that was converted or quantised"
                )
            if first != stored and not np.array_equal(self._read(first), self._read(stored)):
                raise CheckpointError(
                    f"{where.path}: {stored} differs from {first}; encoder and decoder share it, {_FETCH}"
                )
        missing = sorted(set(expected) - set(found))
        if unknown or missing:
            parts = [f"missing {_some(missing)}"] if missing else []
            parts += [f"unknown {_some(unknown)}"] if unknown else []
            raise CheckpointError(
                f"{self.directory}: tensors do not match config.json: {'; '.join(parts)}; take both from one checkpoint"
            )
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


def _header(path: Path) -> dict[str, _Stored]:
    """Every tensor of one safetensors file by stored name.

    The library holds the header to the file (sizes, gaps, overlaps, length) but does not tell offsets.
    """
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); {_FETCH}") from None
    header.pop("__metadata__", None)
    return {
        name: _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
