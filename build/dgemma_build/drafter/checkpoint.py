"""A drafter's checkpoint, `config.json` and `model.safetensors`. Knows no graph and no training; needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dgemma_build.drafter.config import DrafterConfig, check_config, parse_config
from dgemma_build.text_config import TextConfig, read_json
from dgemma_runtime.contract import file_sha256
from dgemma_runtime.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_NORMS = ("input_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")
_DTYPES = ("BF16", "F16", "F32")  # as safetensors names them
_AGAIN = "write it again with `python -m dgemma_build.drafter.train`"

Float32 = npt.NDArray[np.float32]


def expected_shapes(config: DrafterConfig, denoiser: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, as the torch module names them."""
    size, inner, theirs = config.hidden_size, config.intermediate_size, config.denoiser_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "offset_embedding": (config.canvas_length, size),
        "last_token_proj.weight": (size, theirs),
        "norm.weight": (size,),
        "output_proj.weight": (theirs, size),
    }
    for index, layer in enumerate(config.layers(denoiser)):
        prefix, heads, dim = f"layers.{index}", config.num_attention_heads, layer.head_dim
        shapes[f"{prefix}.qkv_proj.weight"] = ((heads + 2 * layer.num_key_value_heads) * dim, size)
        shapes[f"{prefix}.o_proj.weight"] = (size, heads * dim)
        shapes[f"{prefix}.gate_up_proj.weight"] = (2 * inner, size)
        shapes[f"{prefix}.down_proj.weight"] = (size, inner)
        shapes[f"{prefix}.q_norm.weight"] = shapes[f"{prefix}.k_norm.weight"] = (dim,)
        shapes |= {f"{prefix}.{norm}.weight": (size,) for norm in _NORMS}
    return shapes


class DrafterCheckpoint:
    """An opened drafter, which belongs to the denoiser with this config and hash.

    Raises CheckpointError, naming file, field or tensor, where it does not, or where something is missing or damaged.
    """

    def __init__(self, directory: Path, denoiser: TextConfig, denoiser_sha256: str) -> None:
        path = directory / CONFIG_FILE
        self.directory, self.denoiser = directory, denoiser
        self.config = parse_config(read_json(path), path)
        check_config(self.config, denoiser, denoiser_sha256, path)
        self._tensors = self._read(expected_shapes(self.config, denoiser))

    def float32(self, name: str) -> Float32:
        """A whole tensor."""
        return self._tensors[name].astype(np.float32)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def sha256(self) -> str:
        """Hash over the names and contents of config and weights."""
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            digest.update(f"{name} {file_sha256(self.directory / name)}\n".encode())
        return digest.hexdigest()

    def _read(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.generic]]:
        path = self.directory / WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; the drafter is incomplete, {_AGAIN}")
        try:
            with safe_open(path, framework="numpy") as file:
                names = list(file.keys())
                for name in names:
                    if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                        raise CheckpointError(f"{path}: {name} is {dtype}, expected {', '.join(_DTYPES)}; {_AGAIN}")
                found = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); {_AGAIN}") from None
        if differing := sorted(set(found) ^ set(expected)):
            what = "is missing" if differing[0] in expected else "is unknown"
            raise CheckpointError(f"{path}: {differing[0]} {what}; take config.json and weights from one drafter")
        for name, tensor in found.items():
            if tensor.shape != expected[name]:
                raise CheckpointError(
                    f"{path}: the shape of {name} is {list(tensor.shape)}, config.json asks for "
                    f"{list(expected[name])}; take both from one drafter"
                )
            if not np.isfinite(tensor.astype(np.float32)).all():
                raise CheckpointError(f"{path}: {name} holds NaN or infinite values; {_AGAIN}")
        return found


def write_drafter(directory: Path, config: DrafterConfig, tensors: Mapping[str, Float32]) -> None:
    """Both files; weights in bfloat16, as in the denoiser's checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(rounded, directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(config.document(), indent=2) + "\n")
