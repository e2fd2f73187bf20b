"""The manifest of a drafter's engine directory, and whether it belongs to a denoiser's. Knows no engine library."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dgemma_runtime.contract import MANIFEST_FILE, Manifest, file_sha256
from dgemma_runtime.errors import ConfigurationError, ManifestError

DRAFTER_FORMAT_VERSION = 1
_NEEDED = {  # by backend that takes a drafter: the files that it loads
    "onnxruntime": ("model.onnx", "model.onnx.data"),
    "tensorrt": ("rank0.engine",),
    "tensorrt_rtx": ("rank0.engine",),
}
DRAFTING_BACKENDS = tuple(_NEEDED)
_REBUILD = "build it again with `dgemma-build engine --drafter`"


@dataclass(frozen=True)
class DrafterManifest:
    """`config.json` of a drafter's engine directory: everything fixed at build time."""

    denoiser: str  # name of its checkpoint, for people
    denoiser_sha256: str  # the checkpoint_sha256 of that denoiser's engines
    drafter: str  # name of the drafter's checkpoint
    drafter_sha256: str  # of the drafter's config and weights
    vocab_size: int
    canvas_length: int  # tokens
    reads: tuple[int, ...]  # the denoiser's layers whose keys and values it attends to, in ascending order
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    denoiser_hidden_size: int
    backend: str  # one of DRAFTING_BACKENDS
    backend_version: str
    target: str  # cpu, or GPUs as in the denoiser's manifest
    precision: str  # fp32 or bf16
    onnx_sha256: str
    files: dict[str, str]  # relative path -> SHA-256
    kv_dtype: str = "fp32"  # of the denoiser's caches; the first drafters' manifests do not name these four
    max_model_len: int = 0  # tokens; 0: any
    max_batch_size: int = 0  # canvases; 0: any
    scratch_bytes: int = 0  # that a call may need beside the weights; 0: unknown
    drafter_format_version: int = DRAFTER_FORMAT_VERSION

    def save(self, directory: Path) -> None:
        """Write `config.json` last, so that a directory with a manifest is complete."""
        temporary = directory / (MANIFEST_FILE + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(directory / MANIFEST_FILE)

    @staticmethod
    def load(directory: Path, verify_hashes: bool = True) -> DrafterManifest:
        """Read and check `config.json`; raises ManifestError naming what is wrong and what to do."""
        path = directory / MANIFEST_FILE
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ManifestError(f"{path}: not found; {_REBUILD}") from None
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: not readable as JSON ({error}); {_REBUILD}") from None
        found = raw.get("drafter_format_version") if isinstance(raw, dict) else None
        if found != DRAFTER_FORMAT_VERSION:
            raise ManifestError(
                f"{path}: drafter_format_version is {found!r}, this runtime reads {DRAFTER_FORMAT_VERSION}; give the "
                "directory of a drafter's engine, which `dgemma-build engine --drafter` makes"
            )
        try:
            manifest = DrafterManifest(**_checked(raw))
        except (TypeError, ValueError) as error:
            raise ManifestError(f"{path}: not a drafter's manifest ({error}); {_REBUILD}") from None
        _check_files(directory, manifest, verify_hashes)
        return manifest


def _checked(raw: dict[str, Any]) -> dict[str, Any]:
    """The values, each of its field's type; raises TypeError naming the one that is not."""
    values = {item.name: item.default for item in fields(DrafterManifest) if item.default is not MISSING} | raw
    for item in fields(DrafterManifest):
        value = values.get(item.name)
        if item.type == "tuple[int, ...]":
            good = isinstance(value, list) and value and all(type(entry) is int and entry >= 0 for entry in value)
            good = good and value == sorted({*(value or ())})
            values[item.name] = tuple(value or ()) if good else value
        elif item.type == "dict[str, str]":
            good = isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())
        else:
            good = type(value) is {"str": str, "int": int}[str(item.type)]
        if not good:
            order = ", in ascending order" if item.name == "reads" else ""
            raise TypeError(f"{item.name} is {value!r}, expected {item.type}{order}")
    return values


def _check_files(directory: Path, manifest: DrafterManifest, verify_hashes: bool) -> None:
    root, needed = directory.resolve(), _NEEDED.get(manifest.backend, ())
    if missing := [name for name in needed if verify_hashes and name not in manifest.files]:
        raise ManifestError(f"{directory / MANIFEST_FILE}: files does not list {' and '.join(missing)}; {_REBUILD}")
    for name, expected in manifest.files.items():
        file = (directory / name).resolve()
        if not file.is_relative_to(root):
            raise ManifestError(
                f"{directory / MANIFEST_FILE}: the file {name!r} lies outside of the drafter's directory; {_REBUILD}"
            )
        if not file.is_file():
            raise ManifestError(f"{directory / name}: listed in the manifest but missing; {_REBUILD}")
        if verify_hashes and (digest := file_sha256(file)) != expected:
            raise ManifestError(
                f"{directory / name}: SHA-256 is {digest[:12]}…, the manifest says {expected[:12]}…; {_REBUILD}"
            )


def check_drafter(directory: Path, drafter: DrafterManifest, denoiser: Manifest) -> None:
    """Raises ConfigurationError for a drafter that was not made for this engine's denoiser."""
    if denoiser.backend not in DRAFTING_BACKENDS:
        raise ConfigurationError(
            f"draft_model is {str(directory)!r}, and {denoiser.backend} engines take no drafter; leave it out, or take "
            f"an engine of {' or '.join(DRAFTING_BACKENDS)}"
        )
    spec, train = denoiser.model, "give --draft-model a drafter of this denoiser, or leave it out"
    expected = {"vocab_size": spec.vocab_size, "canvas_length": spec.canvas_length}
    for name, theirs in (expected | {"denoiser_hidden_size": spec.hidden_size}).items():
        if (ours := getattr(drafter, name)) != theirs:
            raise ConfigurationError(f"{directory}: the drafter's {name} is {ours}, the denoiser's {theirs}; {train}")
    if drafter.denoiser_sha256 != denoiser.checkpoint_sha256:
        raise ConfigurationError(
            f"{directory}: the drafter belongs to {drafter.denoiser!r} with checkpoint_sha256 "
            f"{drafter.denoiser_sha256[:12]}…, the engine was built from {denoiser.checkpoint!r} with "
            f"{denoiser.checkpoint_sha256[:12]}…; {train}"
        )
    if max(drafter.reads) >= len(spec.layers):
        raise ConfigurationError(
            f"{directory}: the drafter reads layer {max(drafter.reads)}, the denoiser has {len(spec.layers)}; {train}"
        )
    if drafter.backend != denoiser.backend:
        raise ConfigurationError(
            f"{directory}: the drafter was built for {drafter.backend}, the engine for {denoiser.backend}; {_REBUILD} "
            f"--backend {denoiser.backend}"
        )
    if drafter.kv_dtype != denoiser.kv_dtype:
        raise ConfigurationError(
            f"{directory}: the drafter reads keys and values of kv_dtype {drafter.kv_dtype}, the engine's are "
            f"{denoiser.kv_dtype}; {_REBUILD} --kv-precision {denoiser.kv_dtype}"
        )
