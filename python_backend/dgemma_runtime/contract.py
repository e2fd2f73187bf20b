"""What builder, scheduler and engines agree on: the manifest of an engine directory and the engine interface.

Knows no engine library. `dgemma_build` writes manifests with it, `dgemma_runtime` reads them and drives engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dgemma_runtime.errors import ManifestError

if TYPE_CHECKING:
    from dgemma_runtime.drafter_manifest import DrafterManifest

MANIFEST_FILE = "config.json"
FORMAT_VERSION = 3
SLIDING, FULL = "sliding_attention", "full_attention"

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerSpec:
    """Attention of one layer: `kind` is `sliding_attention` or `full_attention`."""

    kind: str
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """What serving needs to know of the model; all from the checkpoint's config."""

    vocab_size: int
    hidden_size: int
    canvas_length: int  # tokens
    sliding_window: int  # tokens; a canvas sees the last sliding_window - 1 cached ones in sliding layers
    max_position_embeddings: int  # tokens
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True)
class Manifest:
    """`config.json` of an engine directory: everything fixed at build time."""

    model: ModelSpec
    checkpoint: str  # name, for people
    checkpoint_sha256: str  # of the checkpoint's config and weight files
    backend: str  # onnxruntime, tensorrt, tensorrt_rtx
    backend_version: str
    target: str  # e.g. "cpu", "sm_90"
    precision: str  # of the weights: fp32, bf16, fp16, fp8, int8, int4
    kv_dtype: str  # of keys and values: fp32, bf16, fp16, fp8
    onnx_sha256: str
    max_model_len: int  # tokens, prompt and output together
    max_batch_size: int  # canvases in one denoising step; 0 where the engine sets no limit
    files: dict[str, str]  # relative path -> SHA-256
    generation_defaults: dict[str, Any]  # of the checkpoint's generation_config.json
    max_encode_tokens: int = 0  # of one row in one encode call; 0 where the engine sets no limit
    scratch_bytes: int = 0  # device memory that a call works in, as the builder reports it; 0 where it does not
    num_attention_heads: int = 0  # this and the next say what a call works in where the builder does not report it
    layer_values: int = 0  # of one token in one layer: residual stream, dense MLP, the chosen experts' rows
    format_version: int = FORMAT_VERSION

    def save(self, directory: Path) -> None:
        """Write `config.json` last, so that a directory with a manifest is complete."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        temporary = directory / (MANIFEST_FILE + ".tmp")
        temporary.write_text(text)
        temporary.replace(directory / MANIFEST_FILE)

    @staticmethod
    def load(directory: Path, verify_hashes: bool = True) -> Manifest:
        """Read and check `config.json`; raises ManifestError naming what is wrong and what to do."""
        path = directory / MANIFEST_FILE
        rebuild = "build the engine again with `dgemma-build engine`"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ManifestError(f"{path}: not found; {rebuild}") from None
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: not readable as JSON ({error}); {rebuild}") from None
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version") if isinstance(raw, dict) else type(raw).__name__
            raise ManifestError(f"{path}: format_version is {found!r}, this runtime reads {FORMAT_VERSION}; {rebuild}")
        try:
            model = dict(raw.pop("model"))
            layers = tuple(LayerSpec(**_checked(LayerSpec, layer)) for layer in model.pop("layers"))
            spec = ModelSpec(layers=layers, **_checked(ModelSpec, model))
            manifest = Manifest(model=spec, **_checked(Manifest, raw))
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{path}: not a manifest ({error}); {rebuild}") from None
        root = directory.resolve()
        for name, expected in manifest.files.items():
            file = (directory / name).resolve()
            if not file.is_relative_to(root):
                raise ManifestError(f"{path}: the file {name!r} lies outside of the engine directory")
            if not file.is_file():
                raise ManifestError(f"{directory / name}: listed in the manifest but missing; {rebuild}")
            if verify_hashes and (digest := file_sha256(file)) != expected:
                raise ManifestError(
                    f"{directory / name}: SHA-256 is {digest[:12]}…, the manifest says {expected[:12]}…; {rebuild}"
                )
        return manifest


_JSON_TYPES: dict[str, type] = {"str": str, "int": int, "dict[str, str]": dict, "dict[str, Any]": dict}


def _checked(record: type[LayerSpec | ModelSpec | Manifest], values: dict[str, Any]) -> dict[str, Any]:
    """The values, each of its field's type; raises TypeError naming the one that is not."""
    for item in fields(record):
        expected, value = _JSON_TYPES.get(str(item.type)), values.get(item.name)
        if item.name in values and expected and type(value) is not expected:
            raise TypeError(f"{item.name} is {value!r}, expected {item.type}")
        if item.type == "dict[str, str]" and value and not all(isinstance(entry, str) for entry in value.values()):
            raise TypeError(f"{item.name} is {value!r}, expected {item.type}")
    return values


def sliding_slots(spec: ModelSpec) -> int:
    """Cache slots of a sliding layer in a TensorRT engine: what its window needs, rounded up to a multiple of 8."""
    return -(-(spec.sliding_window - 1) // 8) * 8


def cache_dtypes(kv_dtype: str, layer: LayerSpec) -> tuple[str, str]:
    """Types of a layer's keys and of its values in an engine's cache.

    With fp8, keys of full layers stay in bf16: scores over a long context magnify what E4M3 rounds away.
    """
    return ("bf16" if kv_dtype == "fp8" and layer.kind == FULL else kv_dtype), kv_dtype


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_sha256(directory: Path, weights: Iterable[Path]) -> str:
    """The `checkpoint_sha256` of engines: over the names and contents of the config and of the weight files."""
    files = (directory / "config.json", *sorted(weights))
    lines = [f"{path.name} {file_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- engine


@dataclass(frozen=True)
class SequencePages:
    """Where one sequence's keys and values live.

    `full[i]` holds positions [i * page_size, (i + 1) * page_size) of the full-attention layers. `sliding[i]` holds the
    same positions of the sliding layers, or -1 where they have left every window and the page was given back.
    """

    full: Int32Array  # [pages]
    sliding: Int32Array  # [pages]


@dataclass(frozen=True)
class EncodeRow:
    """A chunk of clean tokens to encode causally: prefill or commit."""

    token_ids: Int32Array  # [n], 1 <= n <= EngineLimits.max_encode_tokens
    position: int  # tokens of this sequence already in the cache
    pages: SequencePages  # has room for position + n tokens


@dataclass(frozen=True)
class CommitRow:
    """The canvas that has just ended in `slot`, to encode causally behind its context."""

    slot: int  # as in DenoiseRow; its next canvas begins at position + canvas_length
    token_ids: Int32Array  # [canvas_length]
    position: int  # that of the canvas's own rows
    pages: SequencePages  # has room for position + canvas_length tokens


@dataclass(frozen=True)
class DenoiseRow:
    """One step of one canvas."""

    slot: int  # 0 <= slot < EngineLimits.max_batch_size; the engine keeps this canvas's state under it
    canvas_ids: Int32Array  # [canvas_length]
    uniforms: Float32Array  # [canvas_length], in [0, 1), for the categorical sample
    temperature: float  # > 0
    position: int  # context length: tokens in the cache before the canvas
    pages: SequencePages
    first_step: bool  # the soft embedding starts from zeros and the context may have grown


@dataclass(frozen=True)
class DenoiseResult:
    """Per row and canvas position, from the tempered logits."""

    argmax_ids: Int32Array  # [B, canvas_length]
    sampled_ids: Int32Array  # [B, canvas_length]
    entropies: Float32Array  # [B, canvas_length], nats


@dataclass(frozen=True)
class DraftRow:
    """A canvas that is about to begin, for the engine's drafter to propose."""

    slot: int  # as in DenoiseRow
    position: int  # context length, at least 1
    pages: SequencePages
    last_id: int  # the token at position - 1


@dataclass(frozen=True)
class DraftResult:
    """What the drafter proposes, per row and canvas position."""

    token_ids: Int32Array  # [B, canvas_length]
    confidences: Float32Array  # [B, canvas_length], the drafter's probability of each token


@dataclass(frozen=True)
class EngineLimits:
    """What an engine instance was given to work with."""

    max_batch_size: int  # canvases per denoise call, and the number of slots
    max_encode_tokens: int  # tokens per EncodeRow
    page_size: int  # tokens per KV page
    full_pages: int  # pages for the full-attention layers
    sliding_pages: int  # pages for the sliding layers


class Engine(Protocol):
    """Owns weights and KV memory. Called from one thread only.

    From a slot's first canvas to its `release` the slot belongs to one sequence, whose pages only grow, so an engine
    may keep its context laid out from canvas to canvas. Sequences may share pages; nobody writes to a shared one.

    Calls raise EngineMemoryError when there was no memory for them: nothing of the call counts then, and the engine can
    go on once slots are released. They raise another EngineError when the engine can no longer run.
    """

    manifest: Manifest
    limits: EngineLimits
    drafter: DrafterManifest | None  # of the drafter that it was opened with

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Encode each row's tokens and write their keys and values into the row's pages."""
        ...

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        """One denoising step of `rows`, which keep their soft embeddings for their slots' next steps; `commits` are
        encoded beside them, in the same pass where the engine can. All slots are distinct; either may be empty.
        """
        ...

    def draft(self, rows: Sequence[DraftRow]) -> DraftResult:
        """Propose canvases for slots whose next call is the first step of those canvases; only with a drafter.

        Their contexts are laid out as that step would. A proposal changes nothing of what the step gives; whatever a
        draft raises, the engine can go on.
        """
        ...

    def release(self, slot: int) -> None:
        """The sequence in `slot` is over, or starts its canvas again; what was laid out for it may be dropped.

        After a call that found no memory it is also called for slots where nothing was laid out.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds; no other call may follow."""
        ...
